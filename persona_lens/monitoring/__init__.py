"""Monitoring: how a model will behave before it answers, while it does, and afterwards; shown on its tokens."""

from __future__ import annotations

from persona_lens.monitoring.alarms import Alarm, AlarmKind, Alert
from persona_lens.monitoring.baseline import Baseline, BaselineSettings, measure_baseline
from persona_lens.monitoring.calibration import (
    MonitorCalibration,
    Threshold,
    calibrate,
    monitor_calibration,
    threshold_for,
)
from persona_lens.monitoring.conditions import Conditions, StudySettings, examples_of, plan_conditions
from persona_lens.monitoring.conversation import ConversationMonitor, Turn
from persona_lens.monitoring.drift import Drift, DriftRow, DriftSettings, drift
from persona_lens.monitoring.gauges import Gauge, MonitoringError, Panel, TraitReading
from persona_lens.monitoring.heatmap import TokenHeatmap
from persona_lens.monitoring.markup import Strip
from persona_lens.monitoring.prediction import Correlations, Observations, correlate
from persona_lens.monitoring.reply import TokenReading
from persona_lens.monitoring.scoring import ScoredTranscript, prompt_projections, score_transcripts
from persona_lens.monitoring.study import Study, StudyRow, study, study_experiment

__all__ = [
    "Alarm",
    "AlarmKind",
    "Alert",
    "Baseline",
    "BaselineSettings",
    "Conditions",
    "ConversationMonitor",
    "Correlations",
    "Drift",
    "DriftRow",
    "DriftSettings",
    "Gauge",
    "MonitorCalibration",
    "MonitoringError",
    "Observations",
    "Panel",
    "ScoredTranscript",
    "Strip",
    "Study",
    "StudyRow",
    "StudySettings",
    "Threshold",
    "TokenHeatmap",
    "TokenReading",
    "TraitReading",
    "Turn",
    "calibrate",
    "correlate",
    "drift",
    "examples_of",
    "measure_baseline",
    "monitor_calibration",
    "plan_conditions",
    "prompt_projections",
    "score_transcripts",
    "study",
    "study_experiment",
    "threshold_for",
]

"""Monitoring: how a model will behave before it answers, while it does, and afterwards; shown on its tokens."""

from __future__ import annotations

from persona_lens.monitoring.calibration import (
    MonitorCalibration,
    Observations,
    calibrate,
    is_calibrated,
    monitor_calibration,
)
from persona_lens.monitoring.conversation import ConversationMonitor, TraitReading, Turn
from persona_lens.monitoring.correlation import Correlations, correlate, examples_of
from persona_lens.monitoring.curves import MonitoringError
from persona_lens.monitoring.findings import StudyRow
from persona_lens.monitoring.gauges import Alarm, AlarmKind, Alert, Gauge, Panel, Threshold, TokenReading, threshold_for
from persona_lens.monitoring.heatmap import TokenHeatmap
from persona_lens.monitoring.markup import Strip
from persona_lens.monitoring.scoring import ScoredTranscript, prompt_projections, score_transcripts
from persona_lens.monitoring.study import Conditions, Study, StudySettings, study, study_work

__all__ = [
    "Alarm",
    "AlarmKind",
    "Alert",
    "Conditions",
    "ConversationMonitor",
    "Correlations",
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
    "examples_of",
    "is_calibrated",
    "monitor_calibration",
    "prompt_projections",
    "score_transcripts",
    "study",
    "study_work",
    "threshold_for",
]

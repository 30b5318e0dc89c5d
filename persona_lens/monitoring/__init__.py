"""Monitoring: how a model will behave before it answers, while it does, and afterwards; shown on its tokens."""

from persona_lens.monitoring.calibration import (
    MonitorCalibration,
    Observations,
    calibrate,
    is_calibrated,
    monitor_calibration,
)
from persona_lens.monitoring.conditions import examples_of
from persona_lens.monitoring.conversation import ConversationMonitor, TraitReading, Turn
from persona_lens.monitoring.correlation import Correlations, correlate
from persona_lens.monitoring.encoding import (
    EncodedAnswer,
    EncodedMessage,
    EncodedTranscript,
    encode_answers,
    encode_transcript,
)
from persona_lens.monitoring.errors import MonitoringError
from persona_lens.monitoring.heatmap import Strip, TokenHeatmap
from persona_lens.monitoring.prompts import prompt_projections
from persona_lens.monitoring.scoring import ScoredTranscript, score_transcripts
from persona_lens.monitoring.study import Conditions, Study, StudyRow, StudySettings, rollouts_of, study, study_work
from persona_lens.monitoring.thresholds import Threshold, threshold_for
from persona_lens.monitoring.tokens import TokenPiece, token_pieces
from persona_lens.monitoring.transcripts import (
    BadTranscript,
    Transcript,
    TranscriptFile,
    TranscriptForm,
    messages_of,
    open_transcripts,
)
from persona_lens.monitoring.watching import Alarm, AlarmKind, Alert, Gauge, Panel, TokenReading

__all__ = [
    "Alarm",
    "AlarmKind",
    "Alert",
    "BadTranscript",
    "Conditions",
    "ConversationMonitor",
    "Correlations",
    "EncodedAnswer",
    "EncodedMessage",
    "EncodedTranscript",
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
    "TokenPiece",
    "TokenReading",
    "TraitReading",
    "Transcript",
    "TranscriptFile",
    "TranscriptForm",
    "Turn",
    "calibrate",
    "correlate",
    "encode_answers",
    "encode_transcript",
    "examples_of",
    "is_calibrated",
    "messages_of",
    "monitor_calibration",
    "open_transcripts",
    "prompt_projections",
    "rollouts_of",
    "score_transcripts",
    "study",
    "study_work",
    "threshold_for",
    "token_pieces",
]

"""Monitoring: traits read off a conversation while it goes on or afterwards, and shown on its tokens."""

from persona_lens.monitoring.conversation import ConversationMonitor, TraitReading, Turn
from persona_lens.monitoring.encoding import (
    EncodedAnswer,
    EncodedMessage,
    EncodedTranscript,
    encode_answers,
    encode_transcript,
)
from persona_lens.monitoring.errors import MonitoringError
from persona_lens.monitoring.heatmap import Strip, TokenHeatmap
from persona_lens.monitoring.tokens import TokenPiece, token_pieces
from persona_lens.monitoring.transcripts import (
    BadTranscript,
    Transcript,
    TranscriptFile,
    TranscriptForm,
    open_transcripts,
)
from persona_lens.monitoring.watching import Alarm, AlarmKind, Alert, Gauge, Panel, TokenReading

__all__ = [
    "Alarm",
    "AlarmKind",
    "Alert",
    "BadTranscript",
    "ConversationMonitor",
    "EncodedAnswer",
    "EncodedMessage",
    "EncodedTranscript",
    "Gauge",
    "MonitoringError",
    "Panel",
    "Strip",
    "TokenHeatmap",
    "TokenPiece",
    "TokenReading",
    "TraitReading",
    "Transcript",
    "TranscriptFile",
    "TranscriptForm",
    "Turn",
    "encode_answers",
    "encode_transcript",
    "open_transcripts",
    "token_pieces",
]

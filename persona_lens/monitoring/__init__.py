"""Monitoring: what each token of a conversation shows, where it stands, and what its value is."""

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

__all__ = [
    "BadTranscript",
    "EncodedAnswer",
    "EncodedMessage",
    "EncodedTranscript",
    "MonitoringError",
    "Strip",
    "TokenHeatmap",
    "TokenPiece",
    "Transcript",
    "TranscriptFile",
    "TranscriptForm",
    "encode_answers",
    "encode_transcript",
    "open_transcripts",
    "token_pieces",
]

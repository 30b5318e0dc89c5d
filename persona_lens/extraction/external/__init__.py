"""Responses that another program generated: had from a server, matched to a trait, and read by the model."""

from __future__ import annotations

from persona_lens.extraction.external.generating import Generated, generate_responses, planned_usage
from persona_lens.extraction.external.rollouts import (
    ExternalRollouts,
    ExternalScores,
    Paths,
    ReadRollouts,
    external_rollouts,
)
from persona_lens.extraction.external.rows import ExternalResponse, read_responses
from persona_lens.extraction.means import ExtractionError

__all__ = [
    "ExternalResponse",
    "ExternalRollouts",
    "ExternalScores",
    "ExtractionError",
    "Generated",
    "Paths",
    "ReadRollouts",
    "external_rollouts",
    "generate_responses",
    "planned_usage",
    "read_responses",
]

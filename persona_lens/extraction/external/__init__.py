"""Responses that another program generated: had from a server, matched to a trait, and read by the model."""

from __future__ import annotations

from persona_lens.extraction.external.generating import Generated, generate_responses, planned_usage
from persona_lens.extraction.external.given import GivenRollouts, GivenScores, Paths, ReadRollouts, given_rollouts
from persona_lens.extraction.external.rows import GivenResponse, read_responses
from persona_lens.extraction.means import ExtractionError

__all__ = [
    "ExtractionError",
    "Generated",
    "GivenResponse",
    "GivenRollouts",
    "GivenScores",
    "Paths",
    "ReadRollouts",
    "generate_responses",
    "given_rollouts",
    "planned_usage",
    "read_responses",
]

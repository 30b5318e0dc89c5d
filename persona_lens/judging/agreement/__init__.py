"""Agreement: how far two judges, people among them, score the same responses alike."""

from __future__ import annotations

from persona_lens.judging.agreement.blind import AgreementError, Scored, response_id, write_blinded
from persona_lens.judging.agreement.measures import Agreement, Counts, Cuts, Measure, Pair, Sides, compare
from persona_lens.judging.agreement.sources import read_scored

__all__ = [
    "Agreement",
    "AgreementError",
    "Counts",
    "Cuts",
    "Measure",
    "Pair",
    "Scored",
    "Sides",
    "compare",
    "read_scored",
    "response_id",
    "write_blinded",
]

"""Lenses: what a vector says through the unembedding, and which parts of the model wrote a projection on it."""

from persona_lens.lenses.attribution import Attribution, Contribution, Part, attribute
from persona_lens.lenses.logits import LensLayer, LogitLens, TokenShift, logit_lens
from persona_lens.lenses.readout import FrozenNorm, LensError, Readout, find_readout

__all__ = [
    "Attribution",
    "Contribution",
    "FrozenNorm",
    "LensError",
    "LensLayer",
    "LogitLens",
    "Part",
    "Readout",
    "TokenShift",
    "attribute",
    "find_readout",
    "logit_lens",
]

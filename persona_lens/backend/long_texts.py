"""`LongTexts`: what batches, padding, caches and shared prompts have to give as rows that run alone do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from persona_lens.backend.shared_prompts import SHORTEST_BEGINNING
from persona_lens.backend.tokens import TokenBatch, TokenIds


@dataclass(frozen=True)
class LongTexts:
    """Texts on which all that a backend may do to be fast happens.

    Attributes:
        alike: Two prompts of unequal length that begin alike, each with two responses of unequal length.
        unlike: Of unequal lengths, some of them longer than a window.
    """

    alike: TokenBatch
    unlike: TokenBatch

    @staticmethod
    def of(ids: Sequence[int], longer_than: int = 0) -> LongTexts:
        """Texts made of these ids, longer than so many tokens."""
        length = max(SHORTEST_BEGINNING, longer_than) + 1
        beginning, further = _taken(ids, 0, length), _taken(ids, 3, 16)
        prompts = beginning + further[:13], beginning + further[5:6]
        responses = further[2:4], further[1:6]
        alike = [(p, r) for p in prompts for r in responses]
        unlike = [(further[:3], beginning), (beginning, further[:2]), (further[:1], further[2:7])]
        return LongTexts(*(TokenBatch.of(*zip(*rows, strict=True)) for rows in (alike, unlike)))


def _taken(ids: Sequence[int], start: int, length: int) -> TokenIds:
    return tuple(islice(cycle(ids), start, start + length))

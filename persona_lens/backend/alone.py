"""Rows run one at a time: what every faster way, of batches, padding, caches and shared prompts, has to agree with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch

from persona_lens.backend.edits import Edit
from persona_lens.backend.protocol import Backend, ForwardResult
from persona_lens.backend.reads import Read
from persona_lens.backend.shared_prompts import SHORTEST_BEGINNING
from persona_lens.backend.tokens import TokenBatch, TokenIds


def forward_alone(
    backend: Backend, tokens: TokenBatch, edits: Sequence[Edit], means: Sequence[Read], logprobs: bool
) -> ForwardResult:
    """`Backend.forward` with a pass of its own for each row; reads must be means, which have no width."""
    singles = [
        backend.forward(tokens.rows(i, i + 1), [e.rows(i, i + 1) for e in edits], means, logprobs=logprobs)
        for i in range(len(tokens))
    ]
    reads = {name: torch.cat([single.reads[name] for single in singles]) for name in singles[0].reads}
    return ForwardResult(reads, tuple(s.logprobs[0] for s in singles if s.logprobs is not None) if logprobs else None)


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

"""`SingleRowsBackend`: for models whose batches, padding or caches do not give what a row alone gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend.delegating import DelegatingBackend
from persona_lens.backend.edits import Edit
from persona_lens.backend.module import module_of
from persona_lens.backend.protocol import Backend, ForwardResult, Generation, ModelInfo
from persona_lens.backend.reads import Read, ReadError, ReadKind
from persona_lens.backend.streams import Listener, replay
from persona_lens.backend.tokens import Sampling, TokenBatch
from persona_lens.backend.watching import Watch


class SingleRowsBackend(DelegatingBackend):
    """A backend that runs every row of a batch by itself, which no padding reaches.

    Args:
        inner: What runs the rows.
        cached: Whether a generation may keep what a row's earlier tokens left; where not it runs over the whole text
            for every token.
    """

    def __init__(self, inner: Backend, *, cached: bool) -> None:
        super().__init__(inner)
        self.cached = cached

    @property
    def info(self) -> ModelInfo:
        """The model, with the way it runs in the name of the backend."""
        plain = self.inner.info
        return replace(plain, backend=f"{plain.backend}, single rows{'' if self.cached else ' without a cache'}")

    @property
    def module(self) -> Any:
        """See `persona_lens.backend.module`."""
        return module_of(self.inner)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `Backend.generate`."""
        sampling.check_rows(len(prompts))
        if not self.cached:
            sampling = replace(sampling, use_cache=False)
        rows = [
            self.inner.generate([prompt], sampling.rows(i, i + 1), _row(edits, i, len(prompt)), reads)
            for i, prompt in enumerate(TokenBatch.of(prompts).prompts)
        ]
        values = _stacked([row.reads for row in rows])
        return Generation(tuple(row.responses[0] for row in rows), tuple(row.ended[0] for row in rows), values)

    def generate_watched(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Watch,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.watching.WatchableBackend.generate_watched`: told once all rows are done.

        Raises:
            ReadError: If projections are asked for beside.
        """
        if any(read.kind is ReadKind.PROJECTIONS for read in reads):
            raise ReadError("this model runs row by row, and a watch of it takes no read of projections; leave it out")
        found = self.generate(prompts, sampling, edits, (*reads, watch.read))
        values = dict(found.reads)
        projections = values.pop(ReadKind.PROJECTIONS)
        listener = Listener(watch, len(prompts))
        replay(listener, TokenBatch.of(prompts, found.responses), projections)
        return Generation(*listener.cut(found.responses, found.ended), values)

    def forward(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        """See `Backend.forward`."""
        rows = [
            self.inner.forward(tokens.rows(i, i + 1), _row(edits, i, length), reads, logprobs=logprobs)
            for i, length in enumerate(tokens.lengths)
        ]
        chosen = tuple(row.logprobs[0] for row in rows if row.logprobs is not None) if logprobs else None
        return ForwardResult(_stacked([row.reads for row in rows]), chosen)

    def editing(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """See `Backend.editing`."""
        return self.inner.editing(edits)


def _row(edits: Sequence[Edit], row: int, width: int) -> list[Edit]:
    return [edit.rows(row, row + 1, width) for edit in edits]


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Reads of single rows as those of a batch: values of tokens padded on the left with NaN."""
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in (ReadKind.PROJECTIONS, ReadKind.ACTIVATIONS, ReadKind.NORMS):
            width = max(value.shape[2] for value in values)
            values = [_padded(value, width - value.shape[2]) for value in values]
        found[name] = torch.cat(values)
    return found


def _padded(value: Tensor, missing: int) -> Tensor:
    gap = value.new_full((*value.shape[:2], missing, *value.shape[3:]), torch.nan)
    return torch.cat([gap, value], dim=2)

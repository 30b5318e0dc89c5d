"""`ReadRollouts`: forward passes over responses that are there already, saved as generated ones are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from persona_lens.backend import Backend, Read
from persona_lens.backend.batches import MAX_TOKENS
from persona_lens.backend.memory import forward_plan, forward_rows
from persona_lens.backend.tokens import TokenBatch
from persona_lens.pieces import Row
from persona_lens.responses.given import GivenRollouts
from persona_lens.rollouts import RolloutBatches, RolloutSettings
from persona_lens.runs import RunFolder


class ReadRollouts(RolloutBatches):
    """Responses from elsewhere, read by the model in a run folder.

    Batches are planned once: rows of like length together, or, where the backend computes a prompt only once, those of
    the same prompts.

    Args:
        backend: The model.
        given: The responses.
        settings: Its sizes of a batch are used, and nothing else.
        folder: Where to save, under names that begin with ``prefix``; None keeps all in memory.
        reads: What to read.
        prefix: Distinguishes several sets of rollouts in a folder.
    """

    def __init__(
        self,
        backend: Backend,
        given: GivenRollouts,
        settings: RolloutSettings,
        *,
        folder: RunFolder | None = None,
        reads: Sequence[Read] = (),
        prefix: str = "",
    ) -> None:
        self.given = given
        self.settings = settings
        # Above the most that any device is fast at, the limit says nothing.
        limit = settings.batch_tokens if settings.batch_tokens < MAX_TOKENS else None
        batches = forward_plan(backend, given.tokens, (), reads, max_rows=settings.batch_size, max_tokens=limit)
        super().__init__(backend, given.requests, batches, reads=reads, folder=folder, prefix=prefix)

    def calls(self) -> Iterator[TokenBatch]:
        """What `run` would hand to `Backend.forward`, batch by batch."""
        return map(self._tokens, self.batches)

    def _tokens(self, batch: Sequence[int]) -> TokenBatch:
        return TokenBatch(
            tuple(self.given.prompts[i] for i in batch), tuple(self.given.rollouts[i].response_ids for i in batch)
        )

    def _purpose(self, index: int) -> str:
        given = self.given.rollouts[index]
        return json.dumps([super()._purpose(index), given.response_ids, given.response])

    def _make(self, batch: Sequence[int]) -> tuple[list[Row], dict[str, Tensor]]:
        pieces = list(forward_rows(self.backend, self._tokens(batch), (), self.reads))
        tensors = {read.kind.value: torch.cat([p.reads[read.kind.value] for p in pieces]) for read in self.reads}
        return [self._row(index) for index in batch], tensors

    def _row(self, index: int) -> Row:
        row = self.given.rollouts[index].to_row()
        del row["seed"]  # nothing was sampled here
        return row

"""`continuous`: a backend whose calls from several threads run together, row by row, as continuous batching does.

Rows join and leave between steps: one pass runs over the prompts of those that came, the next over one token of every
row. What a row brings does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from persona_lens.backend.continuous.batch import ContinuousBatch
from persona_lens.backend.continuous.rows import RowsRun
from persona_lens.backend.edits import Edit, Edits
from persona_lens.backend.hooked import HookedBackend
from persona_lens.backend.packed.run import PackedBackend
from persona_lens.backend.parts.asked import budgets_for, parts_for
from persona_lens.backend.protocol import Backend, ForwardResult, Generation
from persona_lens.backend.reads import Read, need_last_token
from persona_lens.backend.shared_prompts import can_share_prompts
from persona_lens.backend.sinks import depend_on_sinks
from persona_lens.backend.streaming import Watch
from persona_lens.backend.tokens import Sampling, TokenBatch
from persona_lens.core.threads import OneThread, Turns

ROWS = 32  # that run together unless it is said otherwise


def continuous(backend: Backend, rows: int = ROWS) -> Backend:
    """The backend with its calls from several threads run together, as far as it can.

    Args:
        backend: The model. One that runs several calls at once already is returned as it is, and so is one whose
            module cannot be hooked here, or keeps more than keys and values by row: their calls wait for each other.
        rows: How many rows run together at most.
    """
    if backend.calls_at_once > 1 or not isinstance(backend, HookedBackend) or not can_share_prompts(backend.module):
        return backend
    return ContinuousBackend(backend, rows)


class ContinuousBackend(PackedBackend):
    """A hooked model whose rows join and leave between steps.

    Args:
        hooked: The model.
        rows: How many rows run together at most.
    """

    def __init__(self, hooked: HookedBackend, rows: int = ROWS) -> None:
        self.hooked = hooked
        self.calls_at_once = rows
        self.info, self.tokenizer, self.end_ids = hooked.info, hooked.tokenizer, hooked.end_ids
        self.base_weights, self.shares_prompts = hooked.base_weights, hooked.shares_prompts
        self.context_length = hooked.context_length
        self._turns = Turns(OneThread())
        self._batch = ContinuousBatch(hooked, rows)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.info.in_short}>"

    @property
    def sink_limits(self) -> tuple[float, ...]:
        """See `persona_lens.backend.sinks.sink_limits`."""
        return self.hooked.sink_limits

    def forward(
        self, tokens: TokenBatch, edits: Edits = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        """See `persona_lens.backend.protocol.Backend.forward`; runs between two steps."""
        with self._turns.alone():
            return self.hooked.forward(tokens, edits, reads, logprobs=logprobs)

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """See `persona_lens.backend.protocol.Backend.editing`."""
        return self.hooked.editing(edits)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        watch: Watch | None,
    ) -> Generation:
        tokens = self.hooked.checked_prompts(prompts, sampling, edits, reads)
        if not sampling.use_cache:
            with self._turns.alone():
                if watch is None:
                    return self.hooked.generate(prompts, sampling, edits, reads)
                return self.hooked.generate_watched(prompts, sampling, watch, edits, reads)
        limits = self.sink_limits if depend_on_sinks(edits, reads) else None
        more = watch is not None or need_last_token(reads)
        known: dict[str, Any] = {"n_layers": self.info.n_layers, "end_ids": self.end_ids, "sink_limits": limits}
        known["parts"] = parts_for(self.tokenizer, edits, reads)
        known["budgets"] = budgets_for(self.tokenizer, prompts, sampling)
        run = RowsRun(tokens, edits, reads, sampling=sampling, more=more, watch=watch, **known)
        self._run(run)
        return run.generation(more=more, forward=self.forward)

    def _run(self, run: RowsRun) -> None:
        """Run until every row has ended, in steps of this thread's and of others'."""
        with self._turns.alone():
            self._batch.waiting.extend(run.rows)
        try:
            self._turns.run_for(run, self._batch.step, run.tell)
        finally:
            with self._turns.alone():
                self._batch.forget(run)
        run.raise_error()

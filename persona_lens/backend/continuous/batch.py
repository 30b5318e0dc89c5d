"""`ContinuousBatch`: rows of several calls that take their steps together, and join and leave between them."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from persona_lens.backend.batches import OutOfMemoryError, is_out_of_memory
from persona_lens.backend.continuous.rows import Row, RowsRun, runs_of
from persona_lens.backend.hooked import HookedBackend
from persona_lens.backend.packed.passes import edited_pass
from persona_lens.backend.parts.budget import forcing
from persona_lens.backend.sampling import add_draws
from persona_lens.backend.slots import Slots
from persona_lens.backend.streaming import token_scores
from persona_lens.backend.tokens import TokenBatch, TokenScore, pad_left

Next: TypeAlias = tuple[int, TokenScore | None]  # a token, and how likely it was where somebody asks

PROMPT_TOKENS = 4096  # padded, in a pass over the prompts of rows that came together


class ContinuousBatch:
    """The rows of all runs, and the steps that they take together.

    Attributes:
        waiting: Rows whose prompts have not run yet.

    Args:
        hooked: The model.
        rows: How many run together at most.
    """

    def __init__(self, hooked: HookedBackend, rows: int) -> None:
        self.waiting: deque[Row] = deque()
        self._hooked, self._rows = hooked, rows
        self._most = rows  # fewer where memory ran out
        self._running: list[Row] = []
        self._slots = Slots()
        self._accepted = frozenset(inspect.signature(hooked.module.forward).parameters)

    def forget(self, run: RowsRun) -> None:
        """Let go of a run's rows."""
        run.stop(range(len(run.rows)))
        self._clean()

    def step(self) -> Callable[[], None]:
        """Run a pass.

        Returns:
            What makes its news known.
        """
        self._clean()
        coming = self._coming()
        some = coming or list(self._running)
        try:
            found = self._begin(coming) if coming else self._go_on() if some else []
        except BaseException as error:
            failure = self._fewer(coming, error)
            if failure is not None:
                for run in runs_of(some):
                    run.end(failure)
                self._clean()
            if not isinstance(error, Exception):
                raise
            found = []
        if len(found) < len(some) and torch.cuda.is_available():  # what kept the failed pass's tensors is gone by now
            torch.cuda.empty_cache()

        def tell() -> None:
            for row, following in zip(some, found, strict=False):
                row.take(*following)
            for run in runs_of(some):
                run.hear()

        return tell

    def _clean(self) -> None:
        """Let go of rows that are over."""
        self.waiting = deque(row for row in self.waiting if not row.over)
        self._let_go([row for row in self._running if row.over])
        if not self._running and not self.waiting:
            self._most = self._rows

    def _let_go(self, rows: Sequence[Row]) -> None:
        places = sorted((self._running.index(row) for row in rows), reverse=True)
        self._slots.leave(places)
        for place in places:
            self._running[place] = self._running[-1]
            self._running.pop()

    def _coming(self) -> list[Row]:
        """Rows that there is room for, no longer waiting."""
        coming: list[Row] = []
        longest = 0
        while self.waiting and len(self._running) + len(coming) < self._most:
            longest = max(longest, len(self.waiting[0].text))
            if coming and longest * (len(coming) + 1) > PROMPT_TOKENS:
                break
            coming.append(self.waiting.popleft())
        return coming

    def _fewer(self, coming: Sequence[Row], error: BaseException) -> BaseException | None:
        """Where memory ran out, let fewer rows run together; all that were in the pass begin anew.

        Returns:
            What ends their runs instead.
        """
        some = coming or list(self._running)
        if not is_out_of_memory(error):
            return error
        before = len(self._running) if coming else 0
        if before + len(some) == 1:
            return OutOfMemoryError("one row alone runs out of memory; use a shorter text, or a smaller dtype")
        self._most = before + len(some) // 2
        again = [row for run in runs_of(some) for row in run.rows if not row.over]
        self._let_go([row for row in self._running if row in again])
        self.waiting = deque([*again, *(row for row in self.waiting if row not in again)])
        for run in runs_of(some):
            run.begin_anew()
        return None

    def _begin(self, rows: Sequence[Row]) -> list[Next]:
        """The next token of rows that come."""
        hooked, cache = self._hooked, DynamicCache()
        tokens = pad_left(TokenBatch.of([row.text for row in rows]), hooked.pad_id, hooked.device or "cpu")
        width, lengths = tokens.ids.shape[1], [len(row.text) for row in rows]
        found = self._pass(
            [
                _Part(row, torch.arange(length), torch.arange(length) + number * width + width - length)
                for number, (row, length) in enumerate(zip(rows, lengths, strict=True))
            ],
            {
                "input_ids": tokens.ids,
                "attention_mask": tokens.attention.long(),
                "position_ids": tokens.position_ids,
                "past_key_values": cache,
                "use_cache": True,
                "logits_to_keep": width if any(row.prompt_is_wanted for row in rows) else 1,
            },
        )
        self._slots.join(cache, lengths)
        self._running += rows
        return found

    def _go_on(self) -> list[Next]:
        """The next token of rows that run."""
        newest = [row.text[-1] for row in self._running]
        parts = [
            _Part(row, torch.tensor([length]), torch.tensor([place]))
            for place, (row, length) in enumerate(zip(self._running, self._slots.lengths, strict=True))
        ]
        found = self._pass(parts, self._slots.inputs(newest, self._hooked.device or torch.device("cpu")))
        self._slots.advance()
        return found

    def _pass(self, parts: Sequence[_Part], inputs: dict[str, Any]) -> list[Next]:
        runs = runs_of(part.row for part in parts)
        ids = inputs["input_ids"].flatten()
        for run in runs:
            own = [part for part in parts if part.row.run is run]
            numbers = torch.cat([torch.full_like(part.at, part.row.number) for part in own])
            at, places = torch.cat([part.at for part in own]), torch.cat([part.places for part in own])
            run.running.begin_pass(numbers, at, places, ids)

        def at_block(layer: int, h: Tensor, _: Mapping[str, Any]) -> Tensor:
            changed = edited_pass([run.running for run in runs], layer, h.reshape(-1, h.shape[-1]))
            return h if changed is None else changed.view_as(h)

        given = {name: value for name, value in inputs.items() if name in self._accepted}
        with self._hooked.running({layer for run in runs for layer in run.running.intervention.layers}, at_block):
            logits = self._hooked.module(**given).logits
            for place, part in enumerate(parts):
                if part.row.prompt_is_wanted:
                    part.row.score_prompt(logits[place])
            logits = logits[:, -1].float()
            if self._hooked.device is not None:
                logits = logits.to(self._hooked.device)
            draws = {place: part.row.draws for place, part in enumerate(parts) if part.row.draws is not None}
            tops: dict[int, list[int]] = {}
            for place, part in enumerate(parts):
                if part.row.run.top is not None:
                    tops.setdefault(part.row.run.top, []).append(place)
            plain = {top: logits[some] for top, some in tops.items()}  # copies: draws are added in place
            budgets = {place: part.row.budget for place, part in enumerate(parts) if part.row.budget is not None}
            tokens: list[int] = forcing(add_draws(logits, draws), budgets).argmax(dim=-1).tolist()
            scores: dict[int, TokenScore] = {}
            for top, some in tops.items():
                told = token_scores(plain[top], [tokens[place] for place in some], top)
                scores.update(zip(some, told, strict=True))
        return [(token, scores.get(place)) for place, token in enumerate(tokens)]


@dataclass(frozen=True)
class _Part:
    """Tokens of a row in a pass.

    Attributes:
        row: The row.
        at: Their positions in it.
        places: Their places in the pass.
    """

    row: Row
    at: Int[Tensor, " some"]
    places: Int[Tensor, " some"]

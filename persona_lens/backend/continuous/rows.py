"""`RowsRun`: a call's rows as they come and go in passes, and what is heard of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend.edits import Edit
from persona_lens.backend.packed.checks import check_done
from persona_lens.backend.packed.passes import RunningCall, as_error
from persona_lens.backend.packed.run import PackedRun
from persona_lens.backend.parts.budget import ThinkingBudget
from persona_lens.backend.reads import Read
from persona_lens.backend.sampling import Noise
from persona_lens.backend.streaming import token_scores
from persona_lens.backend.tokens import Sampling, TokenBatch, TokenIds, TokenScore


@dataclass(eq=False)
class Row:
    """A row of a run.

    Attributes:
        run: The run.
        number: Its number there.
        text: Its tokens so far, those of the prompt first.
        draws: What makes its tokens a sample; None for the likeliest ones.
        budget: The thinking that is left to it, if it is limited.
        over: Whether it is given no more.
    """

    run: RowsRun
    number: int
    text: list[int]
    draws: Draws | None
    budget: ThinkingBudget | None = None
    over: bool = False

    def take(self, token: int, score: TokenScore | None) -> None:
        """Note the token that follows, if one does."""
        run = self.run
        given = len(self.text) - len(run.tokens.prompts[self.number])
        if given < run.call.room:
            if score is not None:
                run.scored[self.number].append(score)
            self.text.append(token)
            if self.budget is not None:
                self.budget.take(token)
            given += 1
            self.over = self.over or token in run.call.end_ids or (given == run.call.room and not run.more)
        else:
            self.over = True

    @property
    def prompt_is_wanted(self) -> bool:
        """Whether it is still to be told how likely the tokens of its prompt were."""
        run, number = self.run, self.number
        return run.top_of_prompts and not run.scored_prompts[number] and len(run.tokens.prompts[number]) > 1

    def score_prompt(self, logits: Tensor) -> None:
        """Note it, from the logits of its prompt, those of padding before them."""
        prompt = self.run.tokens.prompts[self.number]
        self.run.scored_prompts[self.number] = token_scores(logits[-len(prompt) : -1], prompt[1:], self.run.top or 0)


class Draws:
    """The draws of one row, see `persona_lens.backend.sampling.add_draws`."""

    def __init__(self, seed: int, sampling: Sampling) -> None:
        self.how = (sampling.temperature, sampling.top_p)
        self._noise, self._made = Noise(seed), 0

    def next(self, size: int, device: torch.device) -> Tensor:
        """See `persona_lens.backend.sampling.Noise`."""
        self._made += 1
        return self._noise.draw(self._made - 1, size, device)


class RowsRun(PackedRun):
    """A call: its rows, and what was heard of them.

    Args:
        tokens: As `PackedRun` takes them, and the rest too.
        edits: What to write.
        reads: What to bring back.
        sampling: How its rows are generated.
        budgets: The thinking that is left to each row, if it is limited.
        more: Whether the last token of each row runs too, because something of it is read.
        rest: The rest.

    Attributes:
        news: Grows whenever something was heard.
        error: What ended it.
    """

    def __init__(
        self,
        tokens: TokenBatch,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        *,
        sampling: Sampling,
        budgets: Sequence[ThinkingBudget],
        more: bool,
        **rest: Any,
    ) -> None:
        super().__init__(tokens, edits, reads, room=sampling.max_new_tokens, **rest)
        self.more, self.news = more, 0
        self.error: BaseException | None = None
        self.running = RunningCall(self.call)
        drawn = [Draws(seed, sampling) for seed in sampling.seeds or ()]
        draws: Sequence[Draws | None] = drawn or [None] * len(tokens)
        left: Sequence[ThinkingBudget | None] = budgets or [None] * len(tokens)
        self.rows = [Row(self, n, list(prompt), draws[n], left[n]) for n, prompt in enumerate(tokens.prompts)]
        self.scored: list[list[TokenScore]] = [[] for _ in self.rows]
        self.scored_prompts: list[list[TokenScore]] = [[] for _ in self.rows]
        self._arrived: deque[Mapping[str, Tensor]] = deque()
        self._found: dict[str, dict[str, Tensor]] | None = None

    def begin_anew(self) -> None:
        """Forget what was read, and go on from the tokens that are there."""
        self.running = RunningCall(self.call)

    def hear(self) -> None:
        """A pass with some of its rows is over."""
        self.news += 1
        if self.call.watched is not None and self.running.error is None:
            self._arrived.append(self.running.intervention.watched())
        if self.running.error is not None:
            self.end()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing follows."""
        self.error = self.error or error
        for row in self.rows:
            row.over = True

    def is_over(self) -> bool:
        """Whether all rows are."""
        return all(row.over for row in self.rows)

    def raise_error(self) -> None:
        """Raise what ended it, if anything did before its time."""
        if self.error is not None:
            raise self.error
        if (failure := self.running.failure()) is not None:
            raise as_error(failure)

    def given(self, row: int) -> TokenIds:
        """See `PackedRun`."""
        return tuple(self.rows[row].text[len(self.tokens.prompts[row]) :])

    def scores(self, row: int) -> Sequence[TokenScore]:
        """See `PackedRun`."""
        return self.scored[row]

    def prompt_scores(self, row: int) -> Sequence[TokenScore]:
        """See `PackedRun`."""
        return self.scored_prompts[row]

    def has_ended(self, row: int) -> bool:
        """See `PackedRun`."""
        return self.rows[row].over

    def stop(self, rows: Sequence[int]) -> None:
        """See `PackedRun`."""
        for row in rows:
            self.rows[row].over = True

    def watched(self) -> list[Mapping[str, Tensor]]:
        """See `PackedRun`."""
        arrived = []
        while self._arrived:  # another thread's step may add to them meanwhile
            arrived.append(self._arrived.popleft())
        return [each for each in arrived if each]

    def check(self, lengths: Sequence[int], partly: Sequence[int] = ()) -> None:
        """See `PackedRun`."""
        check_done(
            self.call, self.running.intervention.masks.settled(), self.found()[0], lengths, partly, self.kinds(lengths)
        )

    def found(self) -> list[dict[str, dict[str, Tensor]]]:
        """See `PackedRun`."""
        if self._found is None:
            self._found = self.running.intervention.results()
        return [self._found]


def runs_of(rows: Iterable[Row]) -> list[RowsRun]:
    """The runs of rows, each once."""
    return list({row.run: None for row in rows})

"""`ThinkingBudget`: the thinking that is left to a response, and the tokens that close it once none is.

Runs where the model runs, see `writing`: at run time it uses nothing but torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import TypedDict

    from jaxtyping import Float
    from torch import Tensor

    class Closing(TypedDict):
        """An automaton in plain values, see `persona_lens.backend.parts.Parts`, and by state what closes thinking."""

        classes: Mapping[int, int]
        following: Sequence[Sequence[int]]
        thinking: Sequence[Sequence[bool]]
        closing: Mapping[int, Sequence[int]]


class ThinkingBudget:
    """That of one row, told of each token that its response takes.

    Once the response holds as many thinking tokens as it may, the ids that close thinking follow wherever it is open:
    at once where none may be, and as soon as another block opens. The tokens behind them are the model's own again.
    Thinking that ends before is left alone.

    A token that has to follow takes the place of the one that was sampled, whose draw is spent: token number n of a
    row is sampled with that row's draw number n, with a budget as without one.

    Args:
        automaton: What tells thinking from answer and how it is closed.
        state: Where that stands as the response begins.
        most: How many thinking tokens the response may have.
    """

    def __init__(self, automaton: Closing, state: int, most: int) -> None:
        self._automaton, self._state, self._left = automaton, state, most
        self._due = self._closing()

    @property
    def forced(self) -> int | None:
        """The token that has to follow; None leaves it to the model."""
        return self._due[0] if self._due else None

    def take(self, token: int) -> None:
        """Note the token that followed."""
        of_class = self._automaton["classes"].get(token, 0)
        self._left -= self._automaton["thinking"][of_class][self._state]
        self._state = self._automaton["following"][of_class][self._state]
        self._due = self._due[1:] or self._closing()

    def _closing(self) -> tuple[int, ...]:
        return tuple(self._automaton["closing"].get(self._state, ())) if self._left <= 0 else ()


def forcing(logits: Float[Tensor, "rows vocab"], budgets: Mapping[int, ThinkingBudget]) -> Float[Tensor, "rows vocab"]:
    """Logits whose largest is, in rows whose thinking is spent, the token that has to follow.

    Args:
        logits: Of each row's next token, its noise added; left as they are.
        budgets: By row, of those that have one.
    """
    due = {row: budget.forced for row, budget in budgets.items() if budget.forced is not None}
    if not due:
        return logits
    rows, ids = (torch.tensor(list(each), device=logits.device) for each in (due.keys(), due.values()))
    forced = logits.clone()
    forced[rows] = -torch.inf
    forced[rows, ids] = 0.0
    return forced

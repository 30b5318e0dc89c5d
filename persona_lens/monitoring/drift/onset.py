"""Where conversations begin to move along a direction: means by turn, the change since the first turn, its onset."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from persona_lens.core.documents import Record
from persona_lens.core.statistics import Estimate, Verdict, bootstrap_mean

Table = Float[NDArray[np.float64], "conversations turns"]
"""Projections by conversation and turn, in residual-stream units; NaN where a reply is empty."""
CHANCE = 0.95  # of random directions that a change has to exceed


@dataclass(frozen=True)
class Movement(Record):
    """What becomes of a projection over the turns of some conversations.

    Attributes:
        means: By turn; None for a turn without a reply.
        changes: By turn, minus the first turn of the same conversation; None for the first.
        onset: Number of the turn, from 1, from which on the change is clear of zero on one side and stays so; None if
            it is not at the last turn.
        size: The last turn's change in standard deviations over conversations; None where there is no spread.
        random_size: What 19 of 20 random directions stay below, whichever way they change; None without them.
        conversations: How many there are.
    """

    means: tuple[Estimate | None, ...]
    changes: tuple[Estimate | None, ...]
    onset: int | None
    size: float | None
    random_size: float | None
    conversations: int

    @property
    def verdict(self) -> Verdict:
        """What may be said of the last turn's change.

        ``clear`` if it has an onset and is larger, in standard deviations, than that of 19 of 20 random directions;
        ``no null`` if it has one with nothing to compare it with; else ``unclear``.
        """
        if self.onset is None or self.size is None:
            return "unclear"
        if self.random_size is None:
            return "no null"
        return "clear" if abs(self.size) > self.random_size else "unclear"

    def to_json(self) -> dict[str, object]:
        """The values by name."""
        return {**super().to_json(), "verdict": self.verdict}


def movement(
    table: Table, random: Float[NDArray[np.float64], "directions conversations turns"] | None = None, seed: int = 0
) -> Movement:
    """How conversations move, turn by turn.

    Args:
        table: Projections on the direction.
        random: Those on random directions, of the same replies.
        seed: Of the resampling.
    """
    moved = changes_of(table)
    changes = tuple(estimates(moved, seed))
    sizes = None if random is None else [_size(changes_of(each)) for each in random]
    known = [abs(size) for size in sizes or () if size is not None]
    return Movement(
        means=tuple(estimates(table, seed)),
        changes=(None, *changes[1:]),
        onset=onset_of(changes[1:]),
        size=_size(moved),
        random_size=float(np.quantile(known, CHANCE)) if known else None,
        conversations=len(table),
    )


def changes_of(table: Table) -> Table:
    """Every turn minus the first of the same conversation."""
    found: Table = table - table[:, :1]
    return found


def estimates(table: Table, seed: int = 0) -> list[Estimate | None]:
    """The mean of each turn over the conversations that have a value there, with its interval."""
    known = [column[np.isfinite(column)] for column in table.T]
    return [bootstrap_mean(column.tolist(), seed) if len(column) else None for column in known]


def onset_of(changes: tuple[Estimate | None, ...]) -> int | None:
    """The first turn from which on a change is clear of zero on the same side as at the last turn, without a break.

    Args:
        changes: Of the second turn and those after it.

    Returns:
        Number of the turn, from 1; None if the last one's is not clear of zero.
    """
    sides = [0 if change is None else change.side for change in changes]
    if not sides or not sides[-1]:
        return None
    lasting = len(list(takewhile(lambda side: side == sides[-1], reversed(sides))))
    return len(sides) - lasting + 2


def _size(moved: Table) -> float | None:
    """The last turn's mean change in standard deviations over conversations."""
    last = moved[:, -1][np.isfinite(moved[:, -1])]
    spread = float(last.std(ddof=1)) if len(last) > 1 else 0.0
    return float(last.mean()) / spread if spread > 0 else None

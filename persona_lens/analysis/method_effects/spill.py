"""`Moves`: what several scores move by, question by question, and what that comes to without what noise adds.

The square of a mean is estimated by products of changes at different questions, to which noise adds nothing on the
average. Absolute values of means keep what it adds, the more the fewer questions there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persona_lens.core.statistics import CHANGES, PLAIN, Ends, Estimate, jackknifed
from persona_lens.extraction.experiment import estimated
from persona_lens.steering.arms import Change

Table = NDArray[np.float64]


def mean_square(table: Table, groups: NDArray[np.int64]) -> float:
    """The mean over cells of the squared mean change, without what noise adds to it; NaN where no cell has two values.

    Args:
        table: Changes [cells, questions], NaN where there is none.
        groups: int64 [questions]: each has a mean of its own, such as each random direction.
    """
    above, below = np.zeros(len(table)), np.zeros(len(table))
    for group in np.unique(groups):
        part = table[:, groups == group]
        counts = np.isfinite(part).sum(axis=1)
        above += np.nansum(part, axis=1) ** 2 - np.nansum(part**2, axis=1)
        below += counts * (counts - 1)
    there = below > 0
    return float(np.mean(above[there] / below[there])) if there.any() else float("nan")


@dataclass(frozen=True)
class Spill:
    """What the other traits move by, over all questions.

    Attributes:
        off: Root mean square change of their scores, points, with that of random directions and the difference of the
            squares beside it.
        entanglement: That over the change of the trait itself; None where it does not clearly move.
        random_entanglement: What random directions move them by, over the change of the trait itself; None likewise.
    """

    off: Change | None
    entanglement: Estimate | None
    random_entanglement: Estimate | None


@dataclass(frozen=True, eq=False)
class Moves:
    """Changes of scores, question by question.

    Attributes:
        off: Of other traits under the steering [cells, questions], NaN where there is none.
        random: The same under random directions.
        directions: int64 [questions]: the random direction of each.
        on: [questions]: of the traits that are steered, towards where they are steered.
    """

    off: Table
    random: Table
    directions: NDArray[np.int64]
    on: Table

    @property
    def moved(self) -> bool:
        """Whether the traits themselves clearly move."""
        found = estimated(dict(enumerate(self.on[np.isfinite(self.on)].tolist())), CHANGES)
        return found is not None and found.side == 1

    @property
    def _asked(self) -> int:
        return int(np.isfinite(self.off).any(axis=0).sum()) if len(self.off) else 0

    def squares(self, rows: NDArray[np.intp]) -> Table:
        """Over some questions: mean squares off target, of random directions, their difference, and over on target."""
        own = mean_square(self.off[:, rows], np.zeros(len(rows), dtype=np.int64))
        null = mean_square(self.random[:, rows], self.directions[rows])
        there = self.on[rows][np.isfinite(self.on[rows])]
        over = there.mean() ** 2 if there.any() else float("nan")
        return np.array([own, null, own - null, own / over, null / over])

    def spill(self) -> Spill:
        """What they come to."""
        every = np.arange(len(self.on))
        both = zip(self.squares(every).tolist(), jackknifed(self.squares, every.tolist(), PLAIN), strict=True)
        own, null, apart, over, null_over = (_root(value, ends, self._asked) for value, ends in both)
        # The difference alone has a sign; a square below nothing is noise.
        own, null, over, null_over = map(_from_nothing, (own, null, over, null_over))
        if not self.moved:
            over = null_over = None
        return Spill(Change(own, null, apart) if own else None, over, null_over)

    def less(self, other: Moves) -> Estimate | None:
        """The entanglement of these and of others: the difference of the squares as a root with its sign.

        None where a trait itself does not clearly move.
        """

        def apart(rows: NDArray[np.intp]) -> Table:
            return np.array([self.squares(rows)[3] - other.squares(rows)[3]])

        if not (self.moved and other.moved):
            return None
        every = np.arange(len(self.on))
        (ends,) = jackknifed(apart, every.tolist(), PLAIN)
        return _root(float(apart(every)[0]), ends, min(self._asked, other._asked))


def _root(square: float, ends: Ends | None, count: int) -> Estimate | None:
    """A mean square as a root with its sign; where its interval is not known, it counts as a single unit's."""
    if np.isnan(square):
        return None
    mean, low, high = (float(np.sign(each) * np.sqrt(abs(each))) for each in (square, *(ends or (square, square))))
    return Estimate(mean, low, high, count if ends else 1)


def _from_nothing(found: Estimate | None) -> Estimate | None:
    return found and Estimate(max(found.mean, 0.0), max(found.low, 0.0), max(found.high, 0.0), found.n)

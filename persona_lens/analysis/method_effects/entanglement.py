"""Entanglement: what else moves when a model is steered along one trait, beside random directions.

It is the root mean square of the changes of the other traits' scores over the change of the trait itself. Squares,
since what noise adds to them can be taken out: the square of a mean is estimated by products of changes at different
questions, to which noise adds nothing on the average. Absolute values keep it, the more the fewer questions there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity

from persona_lens.analysis.method_effects.harmonic import harmonic
from persona_lens.analysis.method_effects.outcomes import Outcomes
from persona_lens.analysis.method_effects.plan import PROMPTED, prompted
from persona_lens.core.statistics import CHANGES, PLAIN, Ends, Estimate, jackknifed
from persona_lens.extraction.experiment import averaged, estimated, json_of
from persona_lens.steering.comparison import Change, beside_null, minus

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

    @staticmethod
    def of(off: Table, random: Table, directions: NDArray[np.int64], on: Table) -> Spill:
        """What changes come to.

        Args:
            off: Of other traits under the steering [cells, questions], NaN where there is none.
            random: The same under random directions.
            directions: int64 [questions]: the random direction of each.
            on: [questions]: of the traits that are steered, towards where they are steered.
        """
        every = np.arange(off.shape[1])

        def squares(rows: NDArray[np.intp]) -> Table:
            own = mean_square(off[:, rows], np.zeros(len(rows), dtype=np.int64))
            null = mean_square(random[:, rows], directions[rows])
            there = on[rows][np.isfinite(on[rows])]
            over = there.mean() ** 2 if there.any() else float("nan")
            return np.array([own, null, own - null, own / over, null / over])

        counted = int(np.isfinite(off).any(axis=0).sum()) if len(off) else 0
        both = zip(squares(every).tolist(), jackknifed(squares, every.tolist(), PLAIN), strict=True)
        own, null, apart, over, null_over = (_root(value, ends, counted) for value, ends in both)
        # The difference alone has a sign; a square below nothing is noise.
        own, null, over, null_over = map(_from_nothing, (own, null, over, null_over))
        moved = estimated(dict(enumerate(on[np.isfinite(on)].tolist())), CHANGES)
        if moved is None or moved.side != 1:
            over = null_over = None
        return Spill(Change(own, null, apart) if own else None, over, null_over)


def _root(square: float, ends: Ends | None, count: int) -> Estimate | None:
    """A mean square as a root with its sign; where its interval is not known, it counts as a single unit's."""
    if np.isnan(square):
        return None
    mean, low, high = (float(np.sign(each) * np.sqrt(abs(each))) for each in (square, *(ends or (square, square))))
    return Estimate(mean, low, high, count if ends else 1)


def _from_nothing(found: Estimate | None) -> Estimate | None:
    return found and Estimate(max(found.mean, 0.0), max(found.low, 0.0), max(found.high, 0.0), found.n)


@dataclass(frozen=True)
class Way:
    """A method, or prompting, at a strength, over all traits that it has a direction of.

    Attributes:
        name: The method, or ``prompted``.
        strength: Of its steps; None for prompting.
        arms: By trait its arm.
        outcomes: Everything that was measured.
    """

    name: str
    strength: float | None
    arms: Mapping[str, str]
    outcomes: Outcomes

    def moved(self, trait: str, judged: str, *, random: bool = False) -> dict[int, float]:
        """What steering along a trait does to the score of one, question by question."""
        return self.outcomes.seen(judged).moved(self.arms[trait], random=random)

    def on(self, *, random: bool = False) -> dict[int, float]:
        """The mean change of the traits that are steered, towards where they are steered, question by question."""
        sign = self.outcomes.plan.settings.towards.sign
        found = [self.moved(trait, trait, random=random) for trait in self.arms]
        return averaged((question, sign * value) for each in found for question, value in each.items())

    @cached_property
    def spill(self) -> Spill:
        """What moves besides."""
        questions = list(self.outcomes.plan.questions)
        off, random = (
            np.array([
                [moved.get(question, np.nan) for question in questions]
                for cell in self.cells
                if cell[0] != cell[1]
                for moved in [self.moved(*cell, random=null)]
            ]).reshape(-1, len(questions))
            for null in (False, True)
        )  # fmt: skip
        count = self.outcomes.plan.settings.asked.random_directions
        directions = np.array(questions) % max(count, 1)
        own = self.on()
        return Spill.of(off, random, directions, np.array([own.get(question, np.nan) for question in questions]))

    @property
    def cells(self) -> Iterator[tuple[str, str]]:
        """Every trait that is steered, with every trait that is judged."""
        return ((trait, judged) for trait in self.arms for judged in self.outcomes.plan.subjects)

    def mark(self, *, random: bool = False) -> Estimate | None:
        """See `persona_lens.analysis.method_effects.harmonic`."""
        return harmonic([self.outcomes.seen(trait).marks(arm, random=random) for trait, arm in self.arms.items()])

    def held(self) -> int:
        """Of how many traits the text holds together."""
        return sum(self.outcomes.coherent(arm) is not False for arm in self.arms.values())

    def change(self) -> Change | None:
        """On target, beside random directions."""
        return beside_null(self.on(), self.on(random=True), CHANGES)

    def to_json(self) -> dict[str, Any]:
        """Everything that is shown of it."""
        return {
            "name": self.name,
            "strength": self.strength,
            "traits": list(self.arms),
            "held": self.held(),
            "harmonic": json_of(self.mark()),
            "on": json_of(self.change()),
            "off": json_of(self.spill.off),
            "entanglement": json_of(self.spill.entanglement),
            "random_entanglement": json_of(self.spill.random_entanglement),
            "changes": self._matrix(lambda trait, judged: json_of(self._cell(trait, judged))),
            "cosines": self._matrix(self._cosine) if self.strength is not None else None,
        }

    def _cell(self, trait: str, judged: str) -> Change | None:
        return self.outcomes.seen(judged).change(self.arms[trait], "score")

    def _matrix(self, cell: Callable[[str, str], Any]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for trait, judged in self.cells:
            found.setdefault(trait, {})[judged] = cell(trait, judged)
        return found

    def _cosine(self, trait: str, other: str) -> float | None:
        """Between the method's directions of two traits, at the layer; None where it has none of the other."""
        plan = self.outcomes.plan
        found = [plan.methods[each].get(self.name) for each in (trait, other)]
        if None in found:
            return None
        one, two = (each.vector(plan.layer, plan.settings.reduction).double() for each in found if each)
        return float(cosine_similarity(one, two, dim=0))


def ways_of(outcomes: Outcomes) -> list[Way]:
    """Prompting, and every method at every strength, the weakest first."""
    plan = outcomes.plan
    found = [Way(PROMPTED, None, {trait: prompted(trait) for trait in plan.subjects}, outcomes)]
    for strength in sorted(plan.settings.strengths):
        for name in plan.names:
            own = [step for step in outcomes.steps if (step.method, step.strength) == (name, strength)]
            found.append(Way(name, strength, {step.trait: step.arm for step in own}, outcomes))
    return found


def pairs(ways: Sequence[Way]) -> list[dict[str, Any]]:
    """At every strength every two methods, and each method and prompting: the one minus the other, on target.

    They are compared over the traits that both have a direction of. ``better`` names the one whose difference is clear,
    if its own change is clear too.
    """
    asking, found = ways[0], []
    for place, one in enumerate(ways[1:], start=1):
        for other in [*(each for each in ways[place + 1 :] if each.strength == one.strength), asking]:
            shared = [trait for trait in one.arms if trait in other.arms]
            both = [
                Way(each.name, each.strength, {t: each.arms[t] for t in shared}, each.outcomes) for each in (one, other)
            ]
            apart = estimated(minus(both[0].on(), both[1].on()), CHANGES)
            winner = {1: both[0], -1: both[1]}.get(apart.side if apart else 0)
            own = winner.change() if winner else None
            clear = own is not None and (
                own.vector.side if winner is both[1] and winner.name == PROMPTED else own.clear
            )
            better = winner.name if winner and clear == 1 else None
            told = {"one": one.name, "other": other.name, "score": json_of(apart), "better": {"score": better}}
            found.append({"strength": one.strength, "traits": shared, **told})
    return found

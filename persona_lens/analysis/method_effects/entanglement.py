"""Entanglement: what else moves when a model is steered along one trait, beside random directions.

It is the root mean square of the changes of the other traits' scores over the change of the trait itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch.nn.functional import cosine_similarity

from persona_lens.analysis.method_effects.harmonic import harmonic
from persona_lens.analysis.method_effects.outcomes import Outcomes
from persona_lens.analysis.method_effects.plan import PROMPTED, prompted
from persona_lens.analysis.method_effects.spill import Moves
from persona_lens.core.statistics import CHANGES, Estimate
from persona_lens.extraction.experiment import averaged, estimated, json_of
from persona_lens.steering.arms import Change, beside_null, minus


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
    def moves(self) -> Moves:
        """What moves besides, question by question."""
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
        return Moves(off, random, directions, np.array([own.get(question, np.nan) for question in questions]))

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

    def clear(self) -> bool:
        """Whether its change on target is clear; no random direction stands beside a prompt."""
        found = self.change()
        return found is not None and (found.vector.side if self.strength is None else found.clear) == 1

    def to_json(self) -> dict[str, Any]:
        """Everything that is shown of it."""
        spill = self.moves.spill()
        return {
            "name": self.name,
            "strength": self.strength,
            "traits": list(self.arms),
            "held": self.held(),
            "harmonic": json_of(self.mark()),
            "random_harmonic": json_of(self.mark(random=True)),
            "on": json_of(self.change()),
            "off": json_of(spill.off),
            "entanglement": json_of(spill.entanglement),
            "random_entanglement": json_of(spill.random_entanglement),
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
    """At every strength every two methods, and each method and prompting: the one minus the other.

    They are compared over the traits that both have a direction of, by the change on target and by entanglement.
    ``better`` names the one that has clearly more of the change, if its own is clear too, and the less entangled one.
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
            tangled = both[0].moves.less(both[1].moves)
            better = {
                "score": winner.name if winner and winner.clear() else None,
                "entanglement": {-1: one.name, 1: other.name}.get(tangled.side if tangled else 0),
            }
            told = {"one": one.name, "other": other.name, "score": json_of(apart), "entanglement": json_of(tangled)}
            found.append({"strength": one.strength, "traits": shared, **told, "better": better})
    return found

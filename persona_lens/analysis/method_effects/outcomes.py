"""What steps along the directions of several methods come to, and how they are held against one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.method_effects.plan import CAPABILITY, PROMPTED, Plan, Step
from persona_lens.analysis.persistence.outcomes import DIFFERENCES, MEASURES
from persona_lens.core.statistics import Estimate
from persona_lens.extraction.experiment import Value, averaged, estimated, json_of, questions_of, values_of
from persona_lens.steering.comparison import (
    COHERENCE_MARGIN,
    RANDOM,
    UNSTEERED,
    ArmRow,
    Change,
    beside_null,
    minus,
)
from persona_lens.steering.surface import holds_together
from persona_lens.vectors.hub import fitted_by

LOWER_IS_BETTER = ("nll",)


@dataclass(frozen=True)
class Outcomes:
    """Everything that was measured.

    Attributes:
        plan: What was compared.
        steps: Every method at every strength.
        rows: Every response.
        known: By arm and whether it is along random directions: the probability of right answers, with the number of
            the known question.
    """

    plan: Plan
    steps: Sequence[Step]
    rows: Sequence[ArmRow]
    known: Mapping[tuple[str, bool], Sequence[Value]]

    def values(self, arm: str, measure: str, *, random: bool = False) -> dict[int, float]:
        """What was measured of an arm, or of its random directions, question by question."""
        if measure == CAPABILITY:
            return averaged(self.known.get((arm, random), ()))
        own = [row for row in self.rows if row.arm == arm and (row.direction == RANDOM) == random]
        return averaged(values_of(own, measure))

    def means(self, arm: str, *, random: bool = False) -> dict[str, Any]:
        """Every measure of an arm, as JSON values; None for one without values."""
        return {name: json_of(estimated(self.values(arm, name, random=random), MEASURES[name])) for name in DIFFERENCES}

    def change(self, arm: str, measure: str) -> Change | None:
        """An arm against the unsteered model, beside random directions of the same length."""
        plain, null = self.values(UNSTEERED, measure), self.plan.null_of(list(self.steps)).get(arm, arm)
        moved = minus(self.values(arm, measure), plain)
        return beside_null(moved, minus(self.values(null, measure, random=True), plain), DIFFERENCES[measure])

    def told(self, arm: str) -> dict[str, Any]:
        """What an arm comes to, as JSON values."""
        own = [row for row in self.rows if row.arm == arm and row.direction != RANDOM]
        return {
            "means": self.means(arm),
            "changes": {name: json_of(self.change(arm, name)) for name in DIFFERENCES},
            "empty": sum(row.score is None for row in own) / len(own),
            "coherent": self.coherent(arm),
        }

    def coherent(self, arm: str) -> bool | None:
        """Whether the text of an arm holds together, as tuning has it; None where the judge cannot tell."""
        coherence, nll = (estimated(self.values(arm, name)) for name in ("coherence", "nll"))
        plain = estimated(self.values(UNSTEERED, "nll"))
        if coherence is None and (nll is None or plain is None):
            return None
        return holds_together(coherence, nll, plain, COHERENCE_MARGIN)[0]

    def methods(self) -> dict[str, Any]:
        """By method its vectors and what its steps come to, as JSON values."""
        return {
            name: {
                "vectors": each.content_hash,
                "made_by": fitted_by(each.provenance),
                "steps": [
                    {
                        "strength": step.strength,
                        "coefficient": step.steering.terms[0].amount,
                        "steering": str(step.steering),
                        **self.told(step.arm),
                    }
                    for step in self.steps
                    if step.method == name
                ],
            }
            for name, each in self.plan.methods.items()
        }

    def random(self) -> list[dict[str, Any]]:
        """By strength what random directions come to, as JSON values; none where there are none."""
        first = next(iter(self.plan.methods))
        return [
            {"strength": step.strength, "means": self.means(step.arm, random=True)}
            for step in self.steps
            if step.method == first and self.values(step.arm, "score", random=True)
        ]

    def pairs(self) -> list[dict[str, Any]]:
        """At every strength every two methods, and each method and the system prompt: the one minus the other.

        Scores count towards where the trait is steered. ``better`` names by measure the one that is clearly better, or
        nobody: the interval of the difference is clear of zero, and where it is one of scores, the better one has a
        clear effect of its own.
        """
        found = []
        for strength in sorted(self.plan.settings.strengths):
            arms = {step.method: step.arm for step in self.steps if step.strength == strength} | {PROMPTED: PROMPTED}
            for one, other in combinations(arms, 2):
                differences = {name: self._difference(arms[one], arms[other], name) for name in DIFFERENCES}
                better = {
                    name: self._better({1: one, -1: other}, arms, name, each) for name, each in differences.items()
                }
                told = {name: json_of(each) for name, each in differences.items()}
                found.append({"strength": strength, "one": one, "other": other, **told, "better": better})
        return found

    def _difference(self, one: str, other: str, measure: str) -> Estimate | None:
        sign = self.plan.settings.towards.sign if measure == "score" else 1
        apart = minus(self.values(one, measure), self.values(other, measure))
        return estimated({number: sign * value for number, value in apart.items()}, DIFFERENCES[measure])

    def _better(
        self, sides: Mapping[int, str], arms: Mapping[str, str], measure: str, difference: Estimate | None
    ) -> str | None:
        side = difference.side if difference else 0
        winner = sides.get(-side if measure in LOWER_IS_BETTER else side)
        if winner is None or measure != "score":
            return winner
        change = self.change(arms[winner], measure)
        assert change is not None  # it has scores
        own = change.vector.side if winner == PROMPTED else change.clear  # a prompt has no random direction
        return winner if own == self.plan.settings.towards.sign else None

    def samples(self, count: int, longest: int) -> list[dict[str, Any]]:
        """The first questions with the first response under every arm: not picked for what they say."""
        asked = self.plan.settings.asked
        questions = questions_of(self.plan.subject.trait, asked.questions, asked.question_set, AnalysisError)
        return [
            {
                "question": question,
                "responses": [
                    {"arm": row.arm, "score": row.score, "text": row.text[:longest]}
                    for row in self.rows
                    if row.question == number and row.sample == 0 and row.direction != RANDOM
                ],
            }
            for number, question in list(questions.items())[:count]
        ]

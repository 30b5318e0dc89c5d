"""What steps along the directions of several methods come to, and how they are held against one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

from persona_lens.analysis.method_effects.harmonic import Marks, harmonic
from persona_lens.analysis.method_effects.plan import CAPABILITY, PROMPTED, Plan, Step, prompted
from persona_lens.analysis.persistence.outcomes import DIFFERENCES, MEASURES
from persona_lens.core.statistics import Estimate
from persona_lens.extraction.experiment import Answers, Value, averaged, estimated, json_of
from persona_lens.steering.arms import COHERENCE_MARGIN, RANDOM, UNSTEERED, Change, beside_null, minus
from persona_lens.steering.tuning.surface import holds_together
from persona_lens.vectors.hub import fitted_by

LOWER_IS_BETTER = ("nll",)


@dataclass(frozen=True)
class MethodRow:
    """One response, with the judgement of every trait's judge.

    Attributes:
        arm: What was done, such as ``lda of optimistic at 0.4``; `persona_lens.steering.arms.UNSTEERED` for
            nothing.
        direction: ``vector``, ``random``, ``prompt`` for a system prompt, or ``none`` for the unsteered.
        question: Number of the question.
        asked_of: The trait whose question it is.
        sample: Number of the sample.
        scores: By trait, 0 to 100; None if the response has none.
        nll: -log p under the unsteered model, nats a token; None if the response is empty, or no judge computes it.
        coherence: 0 to 100; None where no judge asks.
        text: The response.
    """

    arm: str
    direction: str
    question: int
    asked_of: str
    sample: int
    scores: Mapping[str, float | None]
    nll: float | None
    coherence: float | None
    text: str

    def to_row(self) -> dict[str, Any]:
        """The response as JSON values."""
        return asdict(self)


def rows_of(plan: Plan, answers: Answers) -> list[MethodRow]:
    """Every response with everything that was said of it."""
    found = []
    for number, rollout in enumerate(answers.rollouts):
        judged = {name: each[number] for name, each in answers.judged.items()}
        nll = (each.nll for each in judged.values() if each.nll is not None)
        coherence = (each.coherence.value for each in judged.values() if each.coherence)
        labels = rollout.request.labels
        row = MethodRow(
            arm=labels["arm"],
            direction=labels["direction"],
            question=labels["question_number"],
            asked_of=plan.questions[labels["question_number"]][1],
            sample=labels["sample"],
            scores={name: each.trait.value for name, each in judged.items()},
            # Neither depends on the trait that the judge looks for.
            nll=next(nll, None),
            coherence=next((value for value in coherence if value is not None), None),
            text=rollout.response,
        )
        found.append(row)
    return found


@dataclass(frozen=True)
class Outcomes:
    """Everything that was measured, as one trait's judge sees it.

    Attributes:
        plan: What was compared.
        steps: Every method of every trait at every strength.
        rows: Every response.
        known: By arm and whether it is along random directions: the probability of right answers, with the number of
            the known question.
        trait: Whose scores count.
    """

    plan: Plan
    steps: Sequence[Step]
    rows: Sequence[MethodRow]
    known: Mapping[tuple[str, bool], Sequence[Value]]
    trait: str

    def seen(self, trait: str) -> Outcomes:
        """The same, as another trait's judge sees it."""
        return replace(self, trait=trait)

    @property
    def own_steps(self) -> list[Step]:
        """Those along the trait."""
        return [step for step in self.steps if step.trait == self.trait]

    def of(self, arm: str, *, random: bool = False) -> list[MethodRow]:
        """The responses of an arm, or of the random directions that stand beside it."""
        return self._rows.get((self._null.get(arm, arm) if random else arm, random), [])

    @cached_property
    def _null(self) -> Mapping[str, str]:
        return self.plan.null_of(list(self.steps))

    @cached_property
    def _rows(self) -> Mapping[tuple[str, bool], list[MethodRow]]:
        found: dict[tuple[str, bool], list[MethodRow]] = {}
        for row in self.rows:
            found.setdefault((row.arm, row.direction == RANDOM), []).append(row)
        return found

    def values(self, arm: str, measure: str, *, random: bool = False) -> dict[int, float]:
        """What was measured of an arm, or of its random directions, question by question."""
        if measure == CAPABILITY:
            return averaged(self.known.get((self._null.get(arm, arm) if random else arm, random), ()))
        return averaged((row.question, self._measured(row, measure)) for row in self.of(arm, random=random))

    def _measured(self, row: MethodRow, measure: str) -> float | None:
        found: float | None = row.scores[self.trait] if measure == "score" else getattr(row, measure)
        return found

    def means(self, arm: str, *, random: bool = False) -> dict[str, Any]:
        """Every measure of an arm, as JSON values; None for one without values."""
        return {name: json_of(estimated(self.values(arm, name, random=random), MEASURES[name])) for name in DIFFERENCES}

    def moved(self, arm: str, measure: str = "score", *, random: bool = False) -> dict[int, float]:
        """An arm, or its random directions, minus the unsteered model, question by question."""
        return minus(self.values(arm, measure, random=random), self.values(UNSTEERED, measure))

    def change(self, arm: str, measure: str) -> Change | None:
        """An arm against the unsteered model, beside random directions of the same length."""
        null = self.moved(arm, measure, random=True)
        return beside_null(self.moved(arm, measure), null, DIFFERENCES[measure])

    def marks(self, arm: str, *, random: bool = False) -> Marks:
        """What the overall mark of an arm is made of."""
        plain = estimated(self.values(UNSTEERED, "nll"))
        rows = [(row.question, row.scores[self.trait], row.nll, row.coherence) for row in self.of(arm, random=random)]
        known, before = self.values(arm, CAPABILITY, random=random), self.values(UNSTEERED, CAPABILITY)
        return Marks.of(rows, plain.mean if plain else None, known, before, self.plan.settings.towards.sign)

    def told(self, arm: str) -> dict[str, Any]:
        """What an arm comes to, as JSON values."""
        own = self.of(arm)
        return {
            "means": self.means(arm),
            "changes": {name: json_of(self.change(arm, name)) for name in DIFFERENCES},
            "harmonic": json_of(harmonic([self.marks(arm)])),
            "empty": sum(row.scores[self.trait] is None for row in own) / len(own),
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
                    for step in self.own_steps
                    if step.method == name
                ],
            }
            for name, each in self.plan.methods[self.trait].items()
        }

    def random(self) -> list[dict[str, Any]]:
        """By strength what random directions come to, as JSON values; none where there are none."""
        first = next(iter(self.plan.methods[self.trait]))
        return [
            {
                "strength": step.strength,
                "means": self.means(step.arm, random=True),
                "harmonic": json_of(harmonic([self.marks(step.arm, random=True)])),
            }
            for step in self.own_steps
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
            arms = {step.method: step.arm for step in self.own_steps if step.strength == strength}
            arms[PROMPTED] = prompted(self.trait)
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
        """The first of the trait's questions with the first response under its arms: not picked for what they say."""
        shown = {UNSTEERED, prompted(self.trait), *(step.arm for step in self.own_steps)}
        asked = [(number, text) for number, (text, trait) in self.plan.questions.items() if trait == self.trait]
        return [
            {
                "question": question,
                "responses": [
                    {"arm": row.arm, "score": row.scores[self.trait], "text": row.text[:longest]}
                    for row in self.rows
                    if row.question == number and row.sample == 0 and row.direction != RANDOM and row.arm in shown
                ],
            }
            for number, question in asked[:count]
        ]

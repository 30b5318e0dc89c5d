"""One mark for a way to steer, in the manner of AxBench: the harmonic mean of concept, fluency and instruction.

There a model marks each response by 0, 1 or 2 in each respect, and the mark of a response is their harmonic mean, so
that no respect can be bought with another. Here they are continuous, from 0 to 2, and measured:

- concept: the trait score over 50, counted towards where is steered;
- fluency: 2 for text that surprises no more than the unsteered model's own, 1 where text counts as falling apart
  (`persona_lens.steering.arms.COHERENCE_MARGIN` nats a token more), 0 twice as far; where the judge gives
  coherence, that over 50;
- instruction: twice the share that is left of the probability of right answers to known questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, harmonic_mean

import numpy as np

from persona_lens.core.statistics import Estimate, bootstrap_mean, crossed_interval
from persona_lens.extraction.experiment import averaged
from persona_lens.steering.arms import COHERENCE_MARGIN

TOP = 2.0
ENDS = (0.0, TOP)
Response = tuple[int, float | None, float | None, float | None]
"""The number of a question, and the score, surprise and coherence of a response to it."""


@dataclass(frozen=True)
class Marks:
    """What the overall mark of an arm is made of.

    Attributes:
        responses: By response the number of its question, and its marks but for instruction: 0 to 2.
        known: By number of a known question the probability of its right answer; empty where none were asked.
        before: The mean of these of the unsteered model.
    """

    responses: Sequence[tuple[int, tuple[float, ...]]]
    known: Mapping[int, float]
    before: float

    @staticmethod
    def of(
        responses: Sequence[Response],
        plain: float | None,
        known: Mapping[int, float],
        before: Mapping[int, float],
        sign: int,
    ) -> Marks:
        """Those of an arm.

        Args:
            responses: Its responses. One without a score has nothing of what was asked for.
            plain: Mean surprise of unsteered responses, nats a token.
            known: The probabilities of right answers under the arm, by known question.
            before: Those of the unsteered model.
            sign: 1 for more of the trait, -1 for less.
        """
        marks = [
            (question, _marks(score, nll, coherence, plain, sign)) for question, score, nll, coherence in responses
        ]
        return Marks(marks, known, fmean(before.values()) if before else 0.0)

    def instruction(self, without: int | None = None) -> tuple[float, ...]:
        """The mark of what is left of right answers, one known question left out or none."""
        left = [value for number, value in self.known.items() if number != without]
        return (TOP * min(1.0, fmean(left) / self.before),) if left and self.before else ()

    def by_question(self, without: int | None = None) -> dict[int, float]:
        """The mean mark of each question."""
        instruction = self.instruction(without)
        return averaged((question, harmonic_mean([*marks, *instruction])) for question, marks in self.responses)


def harmonic(arms: Sequence[Marks]) -> Estimate | None:
    """The mark of an arm, or the mean of those of several that answered the same; None without any response.

    Its interval counts the questions and the known questions as drawn from more.
    """
    arms = [each for each in arms if each.responses]
    if not arms:
        return None

    def by_question(without: int | None = None) -> dict[int, float]:
        return averaged(pair for each in arms for pair in each.by_question(without).items())

    own = list(by_question().values())
    mean, known = fmean(own), sorted({number for each in arms for number in each.known})
    if len(known) < 2:
        return bootstrap_mean(own, within=ENDS)
    # What a known question is to the mean, by leaving it out; the two kinds of question are not crossed in anything.
    without = np.array([fmean(by_question(number).values()) for number in known])
    moved = (len(known) - 1) * (without.mean() - without)
    low, high = crossed_interval(moved[:, None] + np.array(own), within=ENDS)
    return Estimate(mean, low, high, len(own))


def _marks(
    score: float | None, nll: float | None, coherence: float | None, plain: float | None, sign: int
) -> tuple[float, ...]:
    """Of a response, but for instruction."""
    if score is None:
        return (0.0,)
    concept = (score if sign > 0 else 100 - score) * TOP / 100
    if coherence is not None:
        return concept, coherence * TOP / 100
    if nll is None or plain is None:
        return (concept,)
    lost = (nll - plain) / (2 * COHERENCE_MARGIN)
    return concept, TOP * (1 - min(max(lost, 0.0), 1.0))

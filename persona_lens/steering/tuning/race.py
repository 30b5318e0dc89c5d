"""`Race`: a search that asks on only where the choice is still open.

All places that are open are asked a few questions at a time, in the same batches. At each layer the strength is closed
in on by bisection, for which the surprise of a few answers is enough. The places whose text holds together then race:
the best are asked everything, and any other is asked no more once its mean lies below theirs, whatever it might still
answer, with all but a chance of 5%. That chance holds however often somebody looks, since the questions come in an
order drawn beforehand, and is about the mean over these questions, which an exhaustive search would see
(`persona_lens.core.sequences`). What was asked is never asked again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from persona_lens.core.progress import Progress
from persona_lens.core.sequences import mean_at_most
from persona_lens.core.statistics import SCORES
from persona_lens.core.text import counted
from persona_lens.extraction.experiment import ONLY, Answers, Subject, by_question
from persona_lens.judging.recording import exchange_of, judge_exchanges, prepare_judge
from persona_lens.runs import RunFolder
from persona_lens.runs.rollouts import row_seed
from persona_lens.steering.arms import MIN_COHERENCE, ArmRow, unscored, unsteered_means
from persona_lens.steering.steering import Steering
from persona_lens.steering.tuning.bisection import Bisection
from persona_lens.steering.tuning.settings import TuneSettings, split
from persona_lens.steering.tuning.surface import (
    Dropped,
    Place,
    Point,
    choose_point,
    holds_together,
    mean_norms,
    norms_experiment,
    places,
    surface,
)
from persona_lens.steering.tuning.trial import SEARCH, Trial, arms_at, steered_experiment

LEADERS = 3  # places that are asked everything at once, so that a batch is not of one


class Race:
    """The search, from the unsteered responses on; everything that it decides follows from what was answered.

    Args:
        subject: Who is asked.
        settings: What is tried, settled.
        run: Where it is kept; None keeps everything in memory.
        progress: Told how far it is.

    Attributes:
        norms: Mean length of the residual at every layer.
        questions: Numbers of those whose unsteered response has a score, in the order in which they are asked.
        asked: How many of them each place was asked.
        dropped: Places that are asked no more, and why.
        strengths: Those that were tried, before coefficients were rounded.
        untried: Layers that the budget did not carry.
        rounds: How often places were asked, all that were open at a time.

    Raises:
        SteeringError: If no unsteered response has a score, or all are empty.
    """

    def __init__(self, subject: Subject, settings: TuneSettings, run: RunFolder | None, progress: Progress) -> None:
        self.subject, self.settings, self._run, self._progress = subject, settings, run, progress
        unsteered = norms_experiment(subject, split(settings)[0]).run(run, progress)
        self.norms = mean_norms(unsteered.collected)
        self._answers, self._plain = [unsteered], unsteered.rows(ArmRow)
        scored = by_question(self._plain, "score")
        if not scored:
            raise unscored(self._plain)
        self.questions = sorted(scored, key=lambda number: row_seed(settings.seed, "race", number))
        self.asked: dict[Place, int] = {}
        self.dropped: dict[Place, Dropped] = {}
        self.strengths: set[float] = set()
        self.untried: tuple[int, ...] = ()
        self.rounds = 0
        self._arms: dict[Place, tuple[str, Steering]] = {}
        self._rows: dict[Place, list[ArmRow]] = {}
        self._points: dict[tuple[Place, int], Point] = {}
        self._reserve = _reserve(self._plain, settings.margin)

    def run(self, layers: Sequence[int]) -> Point:
        """Search these layers, as many of the first as the budget carries and then more if it lasts, and choose.

        Raises:
            SteeringError: If text falls apart everywhere, or the judge cannot tell.
        """
        while layers and (count := (self._budget - self.steered) // self.settings.carrying) > 0:
            self.bisect(layers[:count])
            self.race()
            layers = layers[count:]
        self.untried = tuple(layers)
        return self._choose()

    # What is asked

    @property
    def _budget(self) -> int:
        assert self.settings.budget is not None, "the settings are not settled"
        return self.settings.budget

    @property
    def steered(self) -> int:
        """Steered responses so far."""
        return sum(self.asked.values()) * self.settings.samples

    def ask(self, wanted: Mapping[Place, int]) -> bool:
        """Ask places up to so many of the questions, all at once; the first of the places as far as the budget goes.

        Returns:
            Whether anything was asked.
        """
        new, left = {}, self._budget - self.steered
        for place, count in wanted.items():
            more = self.questions[self.asked.get(place, 0) : count]
            if more and len(more) * self.settings.samples <= left:
                new[place], left = more, left - len(more) * self.settings.samples
        if not new:
            return False
        self.rounds += 1
        self._arms |= zip(new, arms_at(self.subject.vectors, list(new), self.settings).items(), strict=True)
        answers = self._answers_to(new)
        self._answers.append(answers)
        by_name = {self._arms[place][0]: place for place in new}
        for row in answers.rows(ArmRow):
            self._rows.setdefault(by_name[row.arm], []).append(row)
        self.asked |= {place: self.asked.get(place, 0) + len(more) for place, more in new.items()}
        return True

    def _answers_to(self, new: Mapping[Place, Sequence[int]]) -> Answers:
        """Answers to the same requests that an exhaustive search would make of these places."""
        prefix, judge = f"{SEARCH}{self.rounds:02d}-", self.subject.judge
        asked = {self._arms[place][0]: numbers for place, numbers in new.items()}
        arms = dict(self._arms[place] for place in new)
        collected = steered_experiment(self.subject, self.settings, arms, asked, prefix).rollouts(self._run)
        prepare_judge(judge, self._run, prefix)
        rollouts = collected.run(self._progress)
        exchanges = [exchange_of(rollout, self.subject.chat) for rollout in rollouts]
        label = f"{prefix.rstrip('-')} judging"
        # Not as `Experiment.run` does it: all text of a round may have fallen apart, so that none of it has a score.
        judged = judge_exchanges(judge, exchanges, self._run, prefix=prefix, label=label, progress=self._progress)
        return Answers(collected, rollouts, {ONLY: judged})

    # What came of it

    def point(self, place: Place) -> Point:
        """What steering at a place did so far.

        The score is held against the unsteered responses to the same questions, the surprise against that of them all:
        it hardly depends on the question, so that a few unsteered responses would only add their own chance.
        """
        key = (place, self.asked[place])
        if key not in self._points:
            rows = [*self._rows[place], *self._plain]
            (self._points[key],) = surface(rows, {self._arms[place][0]: place}, self.settings.margin)
        return replace(self._points[key], dropped=self.dropped.get(place))

    def _holds(self, place: Place) -> bool:
        """Whether the text at a place holds together so well that it may still do so surely, with more questions."""
        effect, plain = self.point(place).effect, unsteered_means(self._plain)["nll"]
        if effect is None:
            return False
        return holds_together(effect.coherence, effect.nll, plain, self.settings.margin, self._reserve)[0]

    def _promise(self, place: Place) -> float:
        """How far a place moves the score to where it is wanted."""
        effect = self.point(place).effect
        return self.settings.towards.sign * effect.change.mean if effect else 0.0

    @property
    def open(self) -> list[Place]:
        """Places that were not dropped, the best first, and of equal ones the gentlest."""
        left = (place for place in self.asked if place not in self.dropped)
        return sorted(left, key=lambda place: (-self._promise(place), place.strength))

    # What is decided

    def bisect(self, layers: Sequence[int]) -> None:
        """Close in on the strength at which text falls apart, at all of these layers in step."""
        settings, vectors = self.settings, self.subject.vectors
        ends, lengths = (min(settings.strengths), max(settings.strengths)), vectors.norms(settings.reduction).tolist()
        closing = {layer: Bisection(*ends) for layer in layers}
        while probes := {layer: each.next for layer, each in closing.items() if each.next is not None}:
            at = {
                layer: places((layer,), (strength,), settings.towards.sign, lengths, self.norms)[0]
                for layer, strength in probes.items()
            }
            self.ask(dict.fromkeys(at.values(), settings.round_questions))
            for layer, place in at.items():
                if place not in self.asked:
                    del closing[layer]
                    continue
                self.strengths.add(probes[layer])
                closing[layer] = closing[layer].after(probes[layer], self._holds(place))
                self._drop_broken(place)

    def race(self) -> None:
        """Ask the open places on until each was asked everything or is dropped, or the budget is spent."""
        every = len(self.questions)
        while True:
            self._drop_weaker()
            left = self.open
            unfinished = [place for place in left if self.asked[place] < every]
            if not unfinished:
                return
            if unfinished[0] == left[0] or not self._finished():
                wanted = dict.fromkeys(unfinished[:LEADERS], every)
            else:
                wanted = {place: self.asked[place] + self.settings.round_questions for place in unfinished}
            if not self.ask(wanted):
                return
            for place in wanted:
                self._drop_broken(place)

    def _finished(self) -> list[Place]:
        """Open places that were asked everything, and whose text surely holds together."""
        return [place for place in self.open if self.asked[place] == len(self.questions) and self.point(place).surely]

    def _drop_broken(self, place: Place) -> None:
        if not self.point(place).coherent:
            self.dropped[place] = Dropped.BROKEN

    def _drop_weaker(self) -> None:
        """Drop what can hardly be as good as the best that was asked everything.

        Its scores are held against the known mean of that one. Differences question by question vary less, but over
        twice the range, and with a dozen questions it is the range that counts.
        """
        best = max((sum(found) / len(found) for found in map(self._scores, self._finished())), default=None)
        if best is None:
            return
        for place in self.open:
            found, asked = self._scores(place), self.asked[place]
            if asked < len(self.questions):
                # A response without a score might have had the best there is.
                values = [*found, *[SCORES[1]] * (asked - len(found))]
                if mean_at_most(values, SCORES, population=len(self.questions)) < best:
                    self.dropped[place] = Dropped.WEAKER

    def _scores(self, place: Place) -> list[float]:
        """Scores of a place in the order of the questions, turned so that more is better."""
        scores = by_question(self._rows[place], "score")
        low, high = SCORES
        turned = {n: score if self.settings.towards.sign > 0 else low + high - score for n, score in scores.items()}
        return [turned[number] for number in self.questions if number in turned]

    def _choose(self) -> Point:
        """Of the places that are left and were asked most, the one that an exhaustive search would take of them."""
        left = self.open
        most = max((self.asked[place] for place in left), default=0)
        self.dropped |= dict.fromkeys(
            (place for place in left if self.asked[place] < len(self.questions)), Dropped.UNDECIDED
        )
        asked = [self.point(place) for place in left if self.asked[place] == most]
        return choose_point(asked, self.settings.towards.sign)

    # What is told

    @property
    def trial(self) -> Trial:
        """All places that were tried, by layer and strength."""
        tried = sorted(self.asked, key=lambda place: (place.layer, place.strength))
        rows = [row for place in tried for row in sorted(self._rows[place], key=lambda row: (row.question, row.sample))]
        arms = dict(self._arms[place] for place in tried)
        return Trial(arms, self._answers, [*self._plain, *rows], [self.point(place) for place in tried])

    def warnings(self) -> list[str]:
        """What the search could not find out."""
        found, budget = [], f"the budget of {counted(self._budget, 'response')}"
        undecided = sum(why is Dropped.UNDECIDED for why in self.dropped.values())
        if undecided:
            found.append(
                f"{budget} was spent before the race was decided: {counted(undecided, 'place')} could have been asked "
                "more, and the best mean of those that were asked most was taken; give more (--budget)"
            )
        if self.untried:
            numbers = ", ".join(map(str, sorted(self.untried)))
            found.append(f"{budget} did not carry layers {numbers}, which were not tried; give more (--budget)")
        return found

    def describe(self, layers: Sequence[int]) -> dict[str, Any]:
        """How it went, as JSON values.

        Args:
            layers: In the order in which they were to be searched.
        """
        return {
            "layers": list(layers),
            "untried": list(self.untried),
            "rounds": self.rounds,
            "budget": self._budget,
            "steered": self.steered,
        }


def _reserve(plain: Sequence[ArmRow], margin: float) -> float:
    """How far text at a strength has to stay from the limit to be taken to hold together by a few answers.

    Half the width of the interval of the unsteered responses' own surprise or coherence: a choice has to hold together
    with its whole interval, which a mean on the limit never does.
    """
    means = unsteered_means(plain)
    if (coherence := means["coherence"]) is not None:
        return max(0.0, min(coherence.mean - coherence.low, (coherence.mean - MIN_COHERENCE) / 2))
    return min(means["nll"].high - means["nll"].mean, margin / 2) if means["nll"] else 0.0


def middle_out(layers: Sequence[int]) -> list[int]:
    """Layers in the order in which a race tries them: the middle one first, the outermost last."""
    middle = sorted(layers)[(len(layers) - 1) // 2]
    return sorted(layers, key=lambda layer: (abs(layer - middle), layer))

"""Arms: several steerings on the same questions, each beside the unsteered model and random directions.

An arm is a steering by its name, or a system prompt that asks for what steering is to do. Rows of all arms run in the
same batches, with the same seeds, through the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args

from persona_lens.backend import Edit, Read
from persona_lens.core.documents import Record
from persona_lens.core.statistics import CHANGES, Ends, Estimate, clear_side
from persona_lens.extraction.experiment import (
    Answer,
    Experiment,
    QuestionSet,
    Subject,
    Value,
    Variant,
    averaged,
    estimated,
    mean_of,
    questions_of,
    requests_of,
    values_of,
)
from persona_lens.runs.rollouts import EditsFor, Request
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering.steering import Steering, SteeringError, rowwise

VECTOR, RANDOM, PROMPT, NONE = "vector", "random", "prompt", "none"
UNSTEERED = "unsteered"
ARMS = "arms-"  # begins the names of their files
QUANTITIES = ("score", "nll", "coherence")
# Nats a token by which steered text may surprise the unsteered model more than its own text does, and still count as
# coherent.
COHERENCE_MARGIN = 1.0
# Mean coherence, 0 to 100, that counts as coherent where the judge gives one.
MIN_COHERENCE = 50.0


@dataclass(frozen=True)
class Change(Record):
    """Steered minus unsteered, with 95% intervals over questions.

    Attributes:
        vector: Under the steering.
        random: Under random rotations of it; None without them.
        difference: The one minus the other, question by question; None without them.
    """

    vector: Estimate
    random: Estimate | None
    difference: Estimate | None

    @property
    def clear(self) -> int:
        """1 or -1 if it is clear, else 0: see `persona_lens.core.statistics.clear_side`."""
        return clear_side(self.vector, self.difference)

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {**super().to_json(), "clear": self.clear}


def change_of(
    unsteered: Iterable[Value], steered: Iterable[Value], random: Iterable[Value] = (), *, within: Ends | None = None
) -> Change | None:
    """The change of a quantity; None where no question has it both steered and unsteered.

    Args:
        unsteered: Values of the unsteered responses.
        steered: Those under the steering.
        random: Those under its random rotations.
        within: Ends of what a change can be, such as `persona_lens.core.statistics.CHANGES` of scores.
    """
    base = averaged(unsteered)
    return beside_null(minus(averaged(steered), base), minus(averaged(random), base), within)


def beside_null(moved: Mapping[int, float], null: Mapping[int, float], within: Ends | None = None) -> Change | None:
    """A change and that of its null, each by question; None where there is no question."""
    found = estimated(moved, within)
    return Change(found, estimated(null, within), estimated(minus(moved, null), within)) if found else None


def minus(these: Mapping[int, float], those: Mapping[int, float]) -> dict[int, float]:
    """Differences question by question, of those that both have."""
    return {question: value - those[question] for question, value in these.items() if question in those}


@dataclass(frozen=True)
class ArmSettings:
    """What the arms are asked, and how.

    Attributes:
        questions: Numbers of the trait's questions, from 0.
        question_set: ``evaluation`` (held out) or ``extraction``.
        samples: Responses for each question and arm; all arms share their seeds.
        random_directions: How many random rotations of each steering stand beside it; question i gets rotation i
            modulo this number. 0 leaves the null out.
        seed: Base of every row's seed and of the random directions.
        rollouts: How responses are made.
    """

    questions: tuple[int, ...] = tuple(range(20))
    question_set: QuestionSet = "evaluation"
    samples: int = 1
    random_directions: int = 5
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if not self.questions:
            raise SteeringError("there are no questions to ask; give one at least")
        if len(set(self.questions)) < len(self.questions) or min(self.questions) < 0:
            raise SteeringError(f"questions must be given by number, each once: got {list(self.questions)}")
        check_asked(self.question_set, self.random_directions, samples=self.samples)


def check_asked(question_set: str, random_directions: int, **counts: int) -> None:
    """Raise a `SteeringError` where a count is below 1, or there is no such set of questions."""
    if question_set not in get_args(QuestionSet):
        raise SteeringError(f"question_set is {' or '.join(get_args(QuestionSet))}, got {question_set!r}")
    if min(counts.values()) < 1 or random_directions < 0:
        raise SteeringError(f"{' and '.join(counts)} must be at least 1, random_directions at least 0")


@dataclass(frozen=True)
class Prompted:
    """An arm in which nothing is steered: a system prompt asks for it. No random direction stands beside that.

    Attributes:
        system: The prompt.
    """

    system: str

    def describe(self) -> dict[str, Any]:
        """It as JSON values, for the record of a run."""
        return {"system": self.system}


Arms = Mapping[str, Steering | Prompted]
"""Arms by name."""


@dataclass(frozen=True)
class ArmRow(Answer):
    """One response of an arm, with its judgement.

    Attributes:
        arm: Name of the arm; `UNSTEERED` for the responses of none.
        direction: ``vector``, ``random``, ``prompt`` for a system prompt, or ``none`` for the unsteered.
    """

    arm: str
    direction: str


def arm_variants(arms: Arms, random_directions: int, null_of: Mapping[str, str] | None = None) -> list[Variant]:
    """The unsteered model and every arm, a steering along the vector and along random directions.

    Args:
        arms: By name.
        random_directions: How many there are; 0 leaves them out.
        null_of: By the names of arms, the arms whose random directions stand beside them instead of their own.

    Raises:
        SteeringError: If an arm has no name of its own.
    """
    if UNSTEERED in arms:
        raise SteeringError(f"an arm cannot be called {UNSTEERED!r}; that one is always there")
    found = [Variant({"arm": UNSTEERED, "direction": NONE})]
    for name, arm in arms.items():
        if isinstance(arm, Prompted):
            found.append(Variant({"arm": name, "direction": PROMPT}, arm.system))
            continue
        found.append(Variant({"arm": name, "direction": VECTOR}))
        if random_directions and (null_of or {}).get(name, name) == name:
            found.append(Variant({"arm": name, "direction": RANDOM}))
    return found


def arm_edits(arms: Arms, random_directions: int, seed: int) -> EditsFor:
    """The edits of a batch, every row under its own arm's."""
    steerings = {name: arm for name, arm in arms.items() if isinstance(arm, Steering)}

    @cache
    def edits(arm: str, null: int | None) -> tuple[Edit, ...]:
        return steerings[arm].edits() if null is None else steerings[arm].null(null)

    return edits_by_row(lambda labels, null: edits(labels["arm"], null), random_directions, seed)


def edits_by_row(
    edits: Callable[[Mapping[str, Any], int | None], tuple[Edit, ...]], random_directions: int, seed: int
) -> EditsFor:
    """The edits of a batch, every row under its own.

    Args:
        edits: Those of a row by its labels, and the seed of its random direction; None along the vector.
        random_directions: How many there are; question i takes number i modulo this.
        seed: Of the first.
    """

    def of(request: Request) -> tuple[Edit, ...]:
        labels = request.labels
        if labels["direction"] in (NONE, PROMPT):
            return ()
        if labels["direction"] == VECTOR:
            return edits(labels, None)
        return edits(labels, seed + labels["question_number"] % random_directions)

    return lambda requests: rowwise(map(of, requests))


def arms_experiment(
    subject: Subject,
    arms: Arms,
    settings: ArmSettings,
    prefix: str = ARMS,
    reads: Sequence[Read] = (),
) -> Experiment:
    """Every arm and the unsteered model answer, whose rows are `ArmRow`.

    Args:
        subject: Whose trait's questions are asked.
        arms: By name.
        settings: See `ArmSettings`.
        prefix: Begins the names of the files.
        reads: What is read while the model answers.

    Raises:
        SteeringError: If an arm has no name of its own, or a question does not exist.
    """
    variants = arm_variants(arms, settings.random_directions)
    questions = questions_of(subject.trait, settings.questions, settings.question_set, SteeringError)
    requests = requests_of(questions, variants, settings.samples, settings.seed, "arms", settings.question_set)
    edits_for = arm_edits(arms, settings.random_directions, settings.seed)
    return subject.experiment(requests, settings.rollouts, prefix, edits_for, reads)


@dataclass(frozen=True)
class ArmEffect(Record):
    """One arm beside the unsteered model and beside its null, question by question.

    Attributes:
        arm: Name of the arm.
        score: Mean trait score, 0 to 100.
        change: Score minus the unsteered model's.
        random: The same change along random directions; None without them, and of a system prompt.
        difference: ``change`` minus ``random``; None likewise.
        nll: -log p under the unsteered model, nats a token; None where the judge does not compute it.
        coherence: 0 to 100; None where the judge does not ask.
        empty: Share of responses without a score.
    """

    arm: str
    score: Estimate
    change: Estimate
    random: Estimate | None
    difference: Estimate | None
    nll: Estimate | None
    coherence: Estimate | None
    empty: float

    @property
    def clear(self) -> int:
        """1 or -1 if the change is clear, else 0: see `persona_lens.core.statistics.clear_side`."""
        return clear_side(self.change, self.difference)

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {**super().to_json(), "clear": self.clear}


def unscored(rows: Iterable[Answer], which: str = "unsteered response") -> SteeringError:
    """The error that none of these responses has a score, and what to do about it.

    Args:
        rows: The responses.
        which: What one of them is called.
    """
    if any(row.text.strip() for row in rows):
        return SteeringError(f"no {which} has a score; there is nothing to compare others with")
    return SteeringError(
        f"no {which} has a score, since all are empty; if the model was still thinking when its tokens ran out, allow "
        "for more (--max-new-tokens), or for less thinking (--thinking-budget), in a new folder (--out)"
    )


def arm_effect(rows: Sequence[ArmRow], arm: str) -> ArmEffect | None:
    """The effect of an arm; None if none of its responses has a score.

    Args:
        rows: Responses of all arms.
        arm: Its name.

    Raises:
        SteeringError: If no unsteered response has a score.
    """
    own = [row for row in rows if row.arm == arm and row.direction != RANDOM]
    null = [row for row in rows if row.arm == arm and row.direction == RANDOM]
    plain = [row for row in rows if row.direction == NONE]
    if all(row.score is None for row in plain):
        raise unscored(plain)
    found = change_of(*(values_of(each, "score") for each in (plain, own, null)), within=CHANGES)
    score, nll, coherence = (mean_of(own, quantity) for quantity in QUANTITIES)
    if found is None or score is None:
        return None
    empty = sum(row.score is None for row in own) / len(own)
    return ArmEffect(arm, score, found.vector, found.random, found.difference, nll, coherence, empty)


def unsteered_means(rows: Sequence[ArmRow]) -> dict[str, Estimate | None]:
    """Means of score, surprise and coherence over the unsteered responses; None for one without any value."""
    plain = [row for row in rows if row.direction == NONE]
    return {quantity: mean_of(plain, quantity) for quantity in QUANTITIES}

"""What each arm did: its change against the unsteered model, beside the same for random directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, get_args

from persona_lens.backend import Backend, Edit, Read
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import CHANGES, Ends, Estimate, bootstrap_mean, clear_side
from persona_lens.judging import Judge, Judgement, judge_rollouts, prepare_judge
from persona_lens.models import ChatFormat
from persona_lens.runs import RunFolder
from persona_lens.runs.rollouts import Request, Rollout, Rollouts, RolloutSettings, row_seed
from persona_lens.steering.analysis import by_question, mean_of
from persona_lens.steering.steering import Steering, SteeringError, rowwise
from persona_lens.steering.sweep import NONE, RANDOM, VECTOR, QuestionSet
from persona_lens.traits import Trait


@dataclass(frozen=True)
class Change:
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
        return {
            "vector": self.vector.to_json(),
            "random": self.random.to_json() if self.random else None,
            "difference": self.difference.to_json() if self.difference else None,
            "clear": self.clear,
        }


Value = tuple[int, float | None]
"""Number of a question, and what was measured of one response to it; None where there is nothing to measure."""


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
    base = _by_question(unsteered)
    moved, null = _minus(_by_question(steered), base), _minus(_by_question(random), base)
    if not moved:
        return None
    both = _minus(moved, null)
    estimates = [_estimate(each, within) if each else None for each in (null, both)]
    return Change(_estimate(moved, within), *estimates)


def _by_question(values: Iterable[Value]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for question, value in values:
        if value is not None:
            found.setdefault(question, []).append(value)
    return {question: fmean(each) for question, each in found.items()}


def _minus(these: Mapping[int, float], those: Mapping[int, float]) -> dict[int, float]:
    return {question: value - those[question] for question, value in these.items() if question in those}


def _estimate(values: Mapping[int, float], within: Ends | None) -> Estimate:
    return bootstrap_mean([value for _, value in sorted(values.items())], within=within)


UNSTEERED = "unsteered"
ARMS = "arms-"  # begins the names of their files


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
        if not self.questions or len(set(self.questions)) < len(self.questions) or min(self.questions) < 0:
            raise SteeringError(f"questions must be given by number, each once: got {list(self.questions)}")
        if self.question_set not in get_args(QuestionSet):
            raise SteeringError(f"question_set is {' or '.join(get_args(QuestionSet))}, got {self.question_set!r}")
        if self.samples < 1 or self.random_directions < 0:
            raise SteeringError("samples must be at least 1, random_directions at least 0")


@dataclass(frozen=True)
class ArmRow:
    """One response and its judgement.

    Attributes:
        arm: Name of the steering; `UNSTEERED` for the responses without one.
        direction: ``vector``, ``random``, or ``none`` for the unsteered.
        question: Number of the question.
        sample: Number of the sample.
        score: Trait score, 0 to 100; None if the response is empty.
        surprise: -log p under the unsteered model, nats a token; None where the judge does not compute it.
        coherence: 0 to 100; None where the judge does not ask.
        text: The response.
    """

    arm: str
    direction: str
    question: int
    sample: int
    score: float | None
    surprise: float | None
    coherence: float | None
    text: str


def plan_arms(trait: Trait, names: Sequence[str], settings: ArmSettings) -> list[Request]:
    """One request for each question, sample, arm and direction; rows of a question share their seeds.

    Raises:
        SteeringError: If a question does not exist, or an arm has no name of its own.
    """
    questions = trait.evaluation_questions if settings.question_set == "evaluation" else trait.extraction_questions
    if max(settings.questions) >= len(questions):
        raise SteeringError(
            f"question {max(settings.questions)} asked for, trait {trait.name} has {len(questions)} for "
            f"{settings.question_set}, counted from 0"
        )
    return arm_requests({number: questions[number] for number in settings.questions}, names, settings, "arms")


def arm_requests(
    questions: Mapping[int, str], names: Sequence[str], settings: ArmSettings, purpose: str
) -> list[Request]:
    """One request for each question, sample, arm and direction; rows of a question share their seeds.

    Args:
        questions: By number.
        names: Of the arms, the unsteered left out.
        settings: What is said of samples, random directions and seeds is used.
        purpose: Requests for another purpose have other seeds.

    Raises:
        SteeringError: If an arm has no name of its own.
    """
    if UNSTEERED in names:
        raise SteeringError(f"an arm cannot be called {UNSTEERED!r}; that one is always there")
    directions = [VECTOR, RANDOM] if settings.random_directions else [VECTOR]
    arms = [(UNSTEERED, NONE), *((name, direction) for name in names for direction in directions)]
    return [
        Request(
            system=None,
            question=question,
            seed=row_seed(settings.seed, purpose, settings.question_set, number, sample),
            labels={"arm": arm, "direction": direction, "question_number": number, "sample": sample},
        )
        for number, question in questions.items()
        for sample in range(settings.samples)
        for arm, direction in arms
    ]


def arm_edits(arms: Mapping[str, Steering], settings: ArmSettings) -> Callable[[Sequence[Request]], list[Edit]]:
    """The edits of a batch, every row under its own arm's."""
    found: dict[tuple[str, int | None], tuple[Edit, ...]] = {}

    def edits_of(request: Request) -> tuple[Edit, ...]:
        labels = request.labels
        if labels["direction"] == NONE:
            return ()
        rotation = None
        if labels["direction"] == RANDOM:
            rotation = settings.seed + labels["question_number"] % settings.random_directions
        key = (labels["arm"], rotation)
        if key not in found:
            steering = arms[labels["arm"]]
            found[key] = steering.edits() if rotation is None else steering.null(rotation)
        return found[key]

    return lambda requests: rowwise(map(edits_of, requests))


def collect_arms(
    backend: Backend,
    arms: Mapping[str, Steering],
    trait: Trait,
    settings: ArmSettings,
    chat: ChatFormat,
    *,
    folder: RunFolder | None = None,
    prefix: str = ARMS,
    reads: Sequence[Read] = (),
) -> Rollouts:
    """The responses of all arms, to be run; unsteered and steered rows run in the same batches.

    Raises:
        SteeringError: If an arm has no name of its own, or a question does not exist.
    """
    requests = plan_arms(trait, list(arms), settings)
    return Rollouts(
        backend,
        chat,
        requests,
        settings.rollouts,
        folder=folder,
        reads=reads,
        edits_for=arm_edits(arms, settings),
        prefix=prefix,
    )


def run_arms(
    backend: Backend,
    arms: Mapping[str, Steering],
    trait: Trait,
    settings: ArmSettings,
    judge: Judge,
    chat: ChatFormat,
    *,
    folder: RunFolder | None = None,
    prefix: str = ARMS,
    methods: set[str] | None = None,
    progress: Progress = shown_progress,
) -> list[ArmRow]:
    """Let every arm answer, and judge what comes.

    Args:
        backend: The model.
        arms: Steerings by name; the unsteered model is always there too.
        trait: Whose questions are asked.
        settings: See `ArmSettings`.
        judge: Who scores.
        chat: Chat format.
        folder: Where responses and judgements are kept, under names that begin with ``prefix``.
        prefix: Distinguishes several sets in a folder.
        methods: See `persona_lens.judging.judge_rollouts`.
        progress: Told how far the work is.
    """
    collected = collect_arms(backend, arms, trait, settings, chat, folder=folder, prefix=prefix)
    prepare_judge(judge, folder, prefix, collected)
    rollouts = collected.run(progress)
    judged = judge_rollouts(judge, rollouts, chat, folder, prefix=prefix, methods=methods, progress=progress)
    return [arm_row(rollout, judgement) for rollout, judgement in zip(rollouts, judged, strict=True)]


def arm_row(rollout: Rollout, judgement: Judgement) -> ArmRow:
    """A response with its judgement."""
    labels: Mapping[str, Any] = rollout.request.labels
    return ArmRow(
        arm=labels["arm"],
        direction=labels["direction"],
        question=labels["question_number"],
        sample=labels["sample"],
        score=judgement.trait.value,
        surprise=judgement.surprise,
        coherence=judgement.coherence.value if judgement.coherence else None,
        text=rollout.response,
    )


@dataclass(frozen=True)
class ArmEffect:
    """One arm beside the unsteered model and beside its null, question by question.

    Attributes:
        arm: Name of the arm.
        score: Mean trait score, 0 to 100.
        change: Score minus the unsteered model's.
        random: The same change along random directions; None without them.
        difference: ``change`` minus ``random``; None without them.
        surprise: -log p under the unsteered model, nats a token; None where the judge does not compute it.
        coherence: 0 to 100; None where the judge does not ask.
        empty: Share of responses without a score.
    """

    arm: str
    score: Estimate
    change: Estimate
    random: Estimate | None
    difference: Estimate | None
    surprise: Estimate | None
    coherence: Estimate | None
    empty: float

    @property
    def clear(self) -> int:
        """1 or -1 if the change is clear, else 0: see `persona_lens.core.statistics.clear_side`."""
        return clear_side(self.change, self.difference)

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        estimates = ("score", "change", "random", "difference", "surprise", "coherence")
        found = {name: getattr(self, name) for name in estimates}
        values = {name: estimate.to_json() if estimate else None for name, estimate in found.items()}
        return {"arm": self.arm, **values, "clear": self.clear, "empty": self.empty}


def arm_effect(rows: Sequence[ArmRow], arm: str) -> ArmEffect | None:
    """The effect of an arm; None if none of its responses has a score.

    Raises:
        SteeringError: If no unsteered response has a score.
    """
    own = [row for row in rows if row.arm == arm and row.direction == VECTOR]
    null = [row for row in rows if row.arm == arm and row.direction == RANDOM]
    plain = [row for row in rows if row.direction == NONE]
    if not by_question(plain, "score"):
        raise SteeringError("no unsteered response has a score; there is nothing to compare steered ones with")
    found = change_of(_scores(plain), _scores(own), _scores(null), within=CHANGES)
    score = mean_of(own, "score")
    if found is None or score is None:
        return None
    return ArmEffect(
        arm,
        score=score,
        change=found.vector,
        random=found.random,
        difference=found.difference,
        surprise=mean_of(own, "surprise"),
        coherence=mean_of(own, "coherence"),
        empty=sum(row.score is None for row in own) / len(own),
    )


def unsteered_mean(rows: Sequence[ArmRow], quantity: str) -> Estimate | None:
    """Mean of ``score``, ``surprise`` or ``coherence`` over the unsteered responses; None without any."""
    return mean_of([row for row in rows if row.direction == NONE], quantity)


def _scores(rows: Sequence[ArmRow]) -> list[Value]:
    return [(row.question, row.score) for row in rows]

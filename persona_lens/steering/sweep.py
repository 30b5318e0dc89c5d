"""Steered responses over layers and coefficients, with their scores (method, section 4), and what a sweep shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from persona_lens.backend import Backend, Edit, Positions
from persona_lens.core.documents import Record, plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import CHANGES, Estimate
from persona_lens.extraction.experiment import (
    Answer,
    Experiment,
    QuestionSet,
    Subject,
    Variant,
    by_question,
    mean_of,
    questions_of,
    requests_of,
    run_folder,
)
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat
from persona_lens.reports.result import Answered
from persona_lens.runs.rollouts import EditsFor, Request
from persona_lens.runs.settings import RolloutSettings, settings_json
from persona_lens.steering.arms import (
    COHERENCE_MARGIN,
    MIN_COHERENCE,
    NONE,
    QUANTITIES,
    RANDOM,
    VECTOR,
    Change,
    beside_null,
    check_asked,
    edits_by_row,
    minus,
    unscored,
)
from persona_lens.steering.steering import SteeringError
from persona_lens.traits import Trait
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors, check_layers


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep tries.

    Attributes:
        layers: Layers steered, each alone.
        coefficients: Multiples of the raw vector; 0 is always run too, once for all layers.
        questions: How many of the trait's questions are asked.
        question_set: ``evaluation`` (held out) for results, ``extraction`` for choices such as the layer's.
        samples: Responses for each question and setting; all settings share their seeds.
        random_directions: How many random directions of the vector's norm stand beside it; question i is steered along
            direction i modulo this number. 0 leaves the null out.
        positions: Tokens that are steered.
        reduction: Which of the vectors.
        seed: Base of every row's seed and of the random directions.
        rollouts: How responses are made.
    """

    layers: tuple[int, ...]
    coefficients: tuple[float, ...] = (-2.0, -1.0, 1.0, 2.0)
    questions: int = 20
    question_set: QuestionSet = "evaluation"
    samples: int = 1
    random_directions: int = 5
    positions: Positions = Positions.ALL
    reduction: str = OWN_REDUCTION
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        check_layers(self.layers, SteeringError)
        if not any(self.coefficients) or not all(map(isfinite, self.coefficients)):
            raise SteeringError(f"give finite coefficients, at least one of them not 0: got {list(self.coefficients)}")
        check_asked(self.question_set, self.random_directions, samples=self.samples, questions=self.questions)


@dataclass(frozen=True)
class SweepRow(Answer):
    """One steered response and its judgement.

    Attributes:
        direction: ``vector``, ``random``, or ``none`` for the unsteered responses.
        layer: Layer steered; None for the unsteered.
        coefficient: Multiple of the raw vector; 0 for the unsteered.
    """

    direction: str
    layer: int | None
    coefficient: float


@dataclass(frozen=True, repr=False, eq=False)
class Sweep(Answered[SweepRow]):
    """What a sweep found.

    Attributes:
        answers: Every response.
        summary: See `persona_lens.reports.result.Result`.
        folder: See `persona_lens.reports.result.Result`.
    """

    kind = "sweep"
    answers: tuple[SweepRow, ...]
    summary: Mapping[str, Any]
    folder: Path | None = None

    def effect(self, layer: int) -> Effect:
        """See `effect`."""
        return effect(self.answers, layer)

    def curve(self, layer: int, direction: str = VECTOR) -> list[CurvePoint]:
        """See `curve`."""
        return curve(self.answers, layer, direction)


def sweep(
    backend: Backend,
    vectors: PersonaVectors,
    settings: SweepSettings,
    *,
    trait: str | Trait | None = None,
    folder: Path | str | None = None,
    name: str = "sweep",
    judge: Judge | None = None,
    chat: ChatFormat | None = None,
    allow_other_model: bool = False,
    progress: Progress = shown_progress,
) -> Sweep:
    """Steer along the vectors and score the responses.

    Steered and unsteered rows run in the same batches, through the same path.

    Args:
        backend: The model.
        vectors: What to steer along.
        settings: See `SweepSettings`.
        trait: The trait, if it is not the one stored with the vectors.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        name: Beginning of the names of the files in the folder.
        judge: Who scores the responses; by default the same model, unsteered, by likelihood as it was calibrated when
            the vectors were extracted.
        chat: Chat format; the model's own by default.
        allow_other_model: Steer a model that the vectors were not extracted from.
        progress: Told how far the work is.

    Raises:
        SteeringError: If the trait has too few questions.
        VectorsError: If the vectors belong to another model, or carry no calibration.
    """
    subject = Subject.of(backend, vectors, trait, judge, chat, allow_other_model=allow_other_model)
    settings = vectors.settled(settings)
    experiment = sweep_experiment(subject, settings, f"{name}-")
    for layer in settings.layers:  # what cannot be run must not claim the folder
        vectors.vector(layer, settings.reduction)
    with run_folder(folder, subject.config("sweep", settings)) as run:
        answers = experiment.run(run, progress)
        rows = answers.rows(SweepRow)
        summary = _summary(subject, settings, rows) | {"judge": subject.judge_used(answers)}
        if run is not None:
            run.write_rows(f"{name}-scores.jsonl", map(Answer.to_row, rows))
            run.write_json("summary.json", summary)
    return Sweep(tuple(rows), plain(summary), run.path if run else None)


def _summary(subject: Subject, settings: SweepSettings, rows: Sequence[SweepRow]) -> dict[str, Any]:
    """Every figure; of a layer at which nothing can be compared there is no effect."""
    kinds = (VECTOR, RANDOM) if settings.random_directions else (VECTOR,)
    layers: list[dict[str, Any]] = []
    for layer in settings.layers:
        found: dict[str, Any] = {"layer": layer, "effect": None, "curves": {}}
        with suppress(SteeringError):
            found["effect"] = effect(rows, layer).to_json()
            found["curves"] = {kind: [point.to_json() for point in curve(rows, layer, kind)] for kind in kinds}
        layers.append(found)
    known = [each for each in layers if each["effect"] and each["curves"]]
    chosen = max(known, key=lambda each: abs(each["effect"]["vector"]["mean"]), default=None)
    return {
        "trait": subject.trait.name,
        "model": asdict(subject.backend.info),
        "questions": settings.questions,
        "settings": settings_json(settings),
        "layers": layers,
        "chosen": chosen["layer"] if chosen else None,
    }


def sweep_experiment(subject: Subject, settings: SweepSettings, prefix: str = "") -> Experiment:
    """What a sweep asks, whose rows are `SweepRow`; ``prefix`` begins the names of its files."""
    requests = plan_sweep(subject.trait, settings)
    return subject.experiment(requests, settings.rollouts, prefix, edits_of(subject.vectors, settings))


def plan_sweep(trait: Trait, settings: SweepSettings) -> list[Request]:
    """One request for each question, sample and setting; rows of a question share their seeds.

    Raises:
        SteeringError: If more questions are asked for than the trait has.
    """
    directions = [VECTOR, RANDOM] if settings.random_directions else [VECTOR]
    variants = [Variant({"direction": NONE, "layer": None, "coefficient": 0.0})]
    variants += [
        Variant({"direction": direction, "layer": layer, "coefficient": coefficient})
        for layer in settings.layers
        for direction in directions
        for coefficient in sorted(set(settings.coefficients) - {0.0})
    ]
    questions = questions_of(trait, settings.questions, settings.question_set, SteeringError)
    return requests_of(questions, variants, settings.samples, settings.seed, "sweep", settings.question_set)


def edits_of(vectors: PersonaVectors, settings: SweepSettings) -> EditsFor:
    """The edits of a batch: one for each layer and direction in it, its coefficient 0 in the rows of the others."""
    seeds = range(settings.seed, settings.seed + settings.random_directions)
    nulls = {seed: vectors.random_like(seed) for seed in seeds}

    def edits(labels: Mapping[str, Any], null: int | None) -> tuple[Edit, ...]:
        source = vectors if null is None else nulls[null]
        at, reduction = settings.positions, settings.reduction
        return (source.edit(labels["layer"], labels["coefficient"], positions=at, reduction=reduction),)

    return edits_by_row(edits, settings.random_directions, settings.seed)


@dataclass(frozen=True)
class CurvePoint(Record):
    """Mean score at one coefficient, with its interval over questions.

    Attributes:
        coefficient: Multiple of the raw vector.
        score: Trait score, 0 to 100.
        nll: -log p under the unsteered model, nats a token; None where the judge did not compute it.
        coherence: 0 to 100; None where the judge did not ask.
    """

    coefficient: float
    score: Estimate
    nll: Estimate | None
    coherence: Estimate | None = None


@dataclass(frozen=True)
class Effect(Change):
    """Score at the largest coefficient minus score at the smallest, question by question.

    Attributes:
        layer: Layer steered.
        low: Smallest coefficient.
        high: Largest coefficient.
        promotion: Score at the largest coefficient minus that of the unsteered model; None where that one is not above
            0, or no question has both.
        suppression: Score at the smallest coefficient minus that of the unsteered model: below 0 where the trait is
            held back. None where that one is not below 0, or no question has both.
    """

    layer: int
    low: float
    high: float
    promotion: Change | None = None
    suppression: Change | None = None


def curve(rows: Sequence[SweepRow], layer: int, direction: str = VECTOR) -> list[CurvePoint]:
    """Mean score, surprise and coherence at each coefficient, 0 included.

    Raises:
        SteeringError: If there is no scored response at some coefficient, or none at that layer.
    """
    steered = [r for r in rows if r.layer == layer and r.direction == direction]
    if not steered:
        raise SteeringError(f"no response was steered along the {direction} at layer {layer}{_steered_layers(rows)}")
    chosen = [r for r in rows if r.direction == NONE] + steered
    points = []
    for coefficient in sorted({row.coefficient for row in chosen}):
        at = [row for row in chosen if row.coefficient == coefficient]
        score, nll, coherence = (mean_of(at, quantity) for quantity in QUANTITIES)
        if score is None:
            raise unscored(at, f"response at layer {layer}, coefficient {coefficient:g}")
        points.append(CurvePoint(coefficient, score, nll, coherence))
    return points


def effect(rows: Sequence[SweepRow], layer: int) -> Effect:
    """The effect of steering at a layer, beside that of random directions.

    Raises:
        SteeringError: If no question has a scored response at both ends.
    """
    coefficients = sorted({r.coefficient for r in rows if r.layer == layer} | {0.0})
    if len(coefficients) == 1:
        raise SteeringError(f"no response was steered at layer {layer}{_steered_layers(rows)}")
    low, high = coefficients[0], coefficients[-1]

    def at(direction: str, coefficient: float) -> dict[int, float]:
        place = (layer, direction, coefficient) if coefficient else (None, NONE, 0.0)
        return by_question([row for row in rows if (row.layer, row.direction, row.coefficient) == place], "score")

    def change(to: float, since: float) -> Change | None:
        moved, null = (minus(at(direction, to), at(direction, since)) for direction in (VECTOR, RANDOM))
        return beside_null(moved, null, CHANGES)

    found = change(high, low)
    if found is None:
        raise SteeringError(f"no question has a response at both ends of the sweep at layer {layer}")
    ends = (change(high, 0.0) if high > 0 else None, change(low, 0.0) if low < 0 else None)
    return Effect(found.vector, found.random, found.difference, layer, low, high, *ends)


def choose_layer(rows: Sequence[SweepRow], margin: float = COHERENCE_MARGIN) -> int:
    """The layer with the strongest effect whose text stays coherent at both ends (method, section 4).

    Coherent: at either end the mean surprise exceeds that of unsteered text by at most ``margin`` nats a token; or,
    where the judge gave coherence instead, its mean is at least `MIN_COHERENCE`. Where no layer is, the most coherent
    is taken.

    Raises:
        SteeringError: If every unsteered response is empty.
    """
    layers = sorted({row.layer for row in rows if row.layer is not None})
    unsteered = [row for row in rows if row.direction == NONE]
    own = by_question(unsteered, "nll")
    if not own and not by_question(unsteered, "coherence"):
        raise SteeringError("every unsteered response is empty; there is nothing to compare steered text with")
    most = margin + fmean(own.values()) if own else -MIN_COHERENCE

    def incoherence(layer: int) -> float:
        try:
            points = curve(rows, layer)
        except SteeringError:  # nothing but empty responses is not coherent text
            return inf
        return max(map(_incoherence, (points[0], points[-1])))

    coherent = [layer for layer in layers if incoherence(layer) <= most]
    if not coherent:
        return min(layers, key=incoherence)
    return max(coherent, key=lambda layer: effect(rows, layer).vector.mean)


def _incoherence(point: CurvePoint) -> float:
    if point.nll is not None:
        return point.nll.mean
    return -point.coherence.mean if point.coherence is not None else inf


def _steered_layers(rows: Sequence[SweepRow]) -> str:
    layers = sorted({row.layer for row in rows if row.layer is not None})
    return f"; the sweep has layers {', '.join(map(str, layers)) or 'none'}"

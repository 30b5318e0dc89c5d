"""`tune`: the layer and strength with the strongest effect while the text holds together (method, section 4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from persona_lens.backend import Backend, Operation, Positions
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import FEW, Estimate
from persona_lens.extraction.experiment import Answer, Answers, Subject, json_of, run_folder
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat
from persona_lens.reports.result import Result
from persona_lens.runs import RunFolder
from persona_lens.runs.cost import Work
from persona_lens.runs.rollouts import RolloutSettings
from persona_lens.steering.comparison import (
    COHERENCE_MARGIN,
    MIN_COHERENCE,
    NONE,
    ArmEffect,
    ArmRow,
    ArmSettings,
    arms_experiment,
    unsteered_means,
)
from persona_lens.steering.notation import Layers, Term
from persona_lens.steering.steering import Steering, SteeringError
from persona_lens.steering.surface import (
    Place,
    Point,
    choose_point,
    cliff_beyond,
    places,
    residual_norms,
    shown_layers,
    surface,
    warnings_about,
    warnings_confirmed,
)
from persona_lens.traits import Arm, Trait
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors, Tuned, check_layers

SHOWN_SAMPLES = 6
SEARCH, CONFIRM = "search-", "confirm-"  # begin the names of their files
STORED = ("towards", "search_questions", "confirm_questions", "confirmed", "warnings")  # with the vectors, too
Capability = Callable[[Steering | None], Estimate]


class Towards(StrEnum):
    """What steering is for."""

    MORE = "more"
    LESS = "less"

    @property
    def sign(self) -> int:
        """Of the coefficient."""
        return 1 if self is Towards.MORE else -1

    @property
    def arm(self) -> Arm:
        """Whose instructions ask for it."""
        return Arm.POSITIVE if self is Towards.MORE else Arm.NEGATIVE


@dataclass(frozen=True)
class TuneSettings:
    """What tuning tries.

    Attributes:
        layers: Layers tried, each alone; None for eight between 30% and 85% of the depth.
        strengths: Strengths tried at each: the length of the step over the mean length of the residual there.
        towards: More of the trait, or less.
        search_questions: How many of the held-out questions the search uses.
        confirm_questions: How many of the others the choice is confirmed on, which the result rests on; None takes half
            as many again as the search has, at least 5, as far as there are so many.
        samples: Responses for each question and place in the search.
        confirm_samples: The same when the chosen place is confirmed.
        random_directions: How many random rotations stand beside each place.
        margin: Nats a token by which steered text may surprise the unsteered model more than its own does.
        positions: Tokens that are steered.
        reduction: Which of the vectors.
        seed: Base of every row's seed and of the random directions.
        rollouts: How responses are made.
    """

    layers: tuple[int, ...] | None = None
    strengths: tuple[float, ...] = (0.1, 0.2, 0.3, 0.45, 0.65, 0.9)
    towards: Towards = Towards.MORE
    search_questions: int = 8  # fewer than elsewhere: the result rests on the others
    confirm_questions: int | None = None
    samples: int = 1
    confirm_samples: int = 2
    random_directions: int = 5
    margin: float = COHERENCE_MARGIN
    positions: Positions = Positions.ALL
    reduction: str = DEFAULT_REDUCTION
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        check_layers(self.layers, SteeringError)
        if not self.strengths or not all(0 < strength < 10 for strength in self.strengths):
            raise SteeringError(
                f"strengths are step lengths in residual norms, such as 0.1 to 1: got {list(self.strengths)}"
            )
        counts = (self.search_questions, self.samples, self.confirm_samples, self.confirm_questions)
        if min(count for count in counts if count is not None) < 1 or self.random_directions < 0:
            raise SteeringError("questions and samples must be at least 1, random_directions at least 0")
        if self.margin <= 0:
            raise SteeringError(f"margin must be above 0 nats, got {self.margin}")


@dataclass(frozen=True, repr=False, eq=False)
class Tuning(Result):
    """What tuning found.

    Attributes:
        vectors: The vectors with the choice in their provenance.
        steering: The choice, ready to be used.
        points: The whole surface, on the questions searched.
        chosen: The point taken.
        confirmed: Its effect on the other held-out questions; None if no response had a score there.
        answers: Every response, of the search and of the confirmation.
        summary: See `Result`.
        folder: See `Result`.
    """

    kind = "tune"
    vectors: PersonaVectors
    steering: Steering
    points: tuple[Point, ...]
    chosen: Point
    confirmed: ArmEffect | None
    answers: Mapping[str, Sequence[ArmRow]]
    summary: dict[str, Any]
    folder: Path | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """See `Result.rows`; each says which part it is of."""
        return [{"part": part, **plain(row.to_row())} for part, rows in self.answers.items() for row in rows]


def tune(
    backend: Backend,
    vectors: PersonaVectors,
    settings: TuneSettings | None = None,
    *,
    trait: str | Trait | None = None,
    folder: Path | str | None = None,
    judge: Judge | None = None,
    chat: ChatFormat | None = None,
    command: str | None = None,
    capability: Capability | None = None,
    progress: Progress = shown_progress,
) -> Tuning:
    """Search layers and strengths on some held-out questions, and confirm the choice on the others.

    Of the places whose text surely holds together, with its whole interval, that with the strongest effect is taken.

    Args:
        backend: The model.
        vectors: What to steer along.
        settings: See `TuneSettings`.
        trait: The trait, if it is not the one stored with the vectors.
        folder: Run folder, kept and resumed; None keeps everything in memory. It also gets ``summary.json`` and
            ``vectors.safetensors``, the vectors with the choice stored in them.
        judge: Who scores; by default the same model, unsteered, by likelihood, as it was calibrated for the vectors.
        chat: Chat format; the model's own by default.
        command: What repeats the run on the command line, for the report to show.
        capability: Measures what the model can do under a steering, or unsteered under None, as a share of right
            answers; asked for every strength at the chosen layer, for the report to show the trade-off.
        progress: Told how far the work is.

    Raises:
        SteeringError: If text falls apart everywhere, or the judge cannot tell; or settings do not fit the trait.
        VectorsError: If the vectors belong to another model, or carry no calibration.
    """
    subject = Subject.of(backend, vectors, trait, judge, chat)
    settings = _settled(settings or TuneSettings(), subject)
    search, confirm = _split(settings)
    vectors.vector(max(settings.layers or ()), settings.reduction)  # what cannot be run must not claim the folder
    with run_folder(folder, subject.config("tune", settings)) as run:
        norms = residual_norms(subject, search, SEARCH, run, progress)
        tried = _tried(settings, vectors, norms)
        searched = _try(subject, settings, tried, search, SEARCH, run, progress)
        chosen = choose_point(searched.points, settings.towards.sign)
        on_layer = [place for place in tried if place.layer == chosen.place.layer]
        asked = _try(subject, settings, on_layer, confirm, CONFIRM, run, progress)
        summary = {"command": command, **_summary(subject, settings, norms, searched, chosen, asked)}
        if capability is not None:
            summary["capability"] = _trade_off(asked, capability)
        steering, effect, place = _at(vectors, chosen.place, settings), asked.at(chosen).effect, chosen.place
        choice = Tuned(place.layer, place.coefficient, settings.reduction)
        measured = {"strength": place.strength, "cliff": cliff_beyond(asked.points, place)}
        tuned = vectors.with_tuned(choice, {**measured, **{name: summary[name] for name in STORED}})
        if run is not None:
            run.write_rows("search-scores.jsonl", map(Answer.to_row, searched.rows))
            run.write_rows("confirm-scores.jsonl", map(Answer.to_row, asked.rows))
            run.write_bytes("vectors.safetensors", tuned.to_bytes())
            run.write_json("summary.json", summary, free=("command",))
    kept = ({"search": searched.rows, "confirm": asked.rows}, plain(summary), run.path if run else None)
    return Tuning(tuned, steering, tuple(searched.points), chosen, effect, *kept)


def tune_work(subject: Subject, settings: TuneSettings) -> tuple[Work, ...]:
    """What `tune` would ask of the model, and of the judge's; nothing runs."""
    settings, vectors = _settled(settings, subject), subject.vectors
    search, confirm = _split(settings)
    found: list[Work] = []
    for asked, layers in ((search, settings.layers or ()), (confirm, (settings.layers or ())[:1])):
        tried = [
            Place(layer, 1.0 + number, strength)
            for layer in layers
            for number, strength in enumerate(settings.strengths)
        ]
        found += arms_experiment(subject, _arms(vectors, tried, settings), asked).work()
    return tuple(found)


def _settled(settings: TuneSettings, subject: Subject) -> TuneSettings:
    """The settings with what depends on the model and the trait: the layers, and the questions to confirm on."""
    there, asked = len(subject.trait.evaluation_questions), settings.confirm_questions
    left = there - settings.search_questions
    if left < max(1, asked or 0):
        wanted = "at least one" if asked is None else f"the {asked} that are asked for (--confirm-questions)"
        raise SteeringError(
            f"trait {subject.trait.name} has {there} held-out questions, of which a search on "
            f"{settings.search_questions} leaves {max(left, 0)} to confirm the choice on, and not {wanted}; search on "
            "fewer (--search-questions)"
        )
    confirm = asked or min(left, max(FEW, -(-3 * settings.search_questions // 2)))
    layers = settings.layers or shown_layers(subject.backend.info.n_layers)
    return replace(settings, layers=layers, confirm_questions=confirm)


def _split(settings: TuneSettings) -> tuple[ArmSettings, ArmSettings]:
    """Questions that are searched, and those that the choice is confirmed on."""
    first, stop = settings.search_questions, settings.search_questions + (settings.confirm_questions or 0)
    search = ArmSettings(
        questions=tuple(range(first)),
        samples=settings.samples,
        random_directions=settings.random_directions,
        seed=settings.seed,
        rollouts=settings.rollouts,
    )
    return search, replace(search, questions=tuple(range(first, stop)), samples=settings.confirm_samples)


def _tried(settings: TuneSettings, vectors: PersonaVectors, norms: Sequence[float]) -> list[Place]:
    """Every layer at every strength, where the residual is so long."""
    where = (settings.layers or (), settings.strengths, settings.towards.sign)
    return places(*where, vectors.norms(settings.reduction).tolist(), norms)


def _arms(vectors: PersonaVectors, tried: Sequence[Place], settings: TuneSettings) -> dict[str, Steering]:
    """Steerings by name, in the order of the places."""
    return {str(steering): steering for steering in (_at(vectors, place, settings) for place in tried)}


def _at(vectors: PersonaVectors, place: Place, settings: TuneSettings) -> Steering:
    term = Term(
        vectors.trait,
        Layers(((place.layer, place.layer),)),
        Operation.ADD,
        place.coefficient,
        reduction=settings.reduction,
        positions=settings.positions,
    )
    return Steering((term,), {vectors.trait: vectors})


@dataclass(frozen=True)
class _Tried:
    """What came of steering at some places: by the names of their arms, in the order of the points."""

    arms: Mapping[str, Steering]
    answers: Answers
    rows: Sequence[ArmRow]
    points: Sequence[Point]

    def at(self, chosen: Point) -> Point:
        """What steering did here at the place of another point."""
        return next(point for point in self.points if point.place == chosen.place)


def _try(
    subject: Subject,
    settings: TuneSettings,
    tried: Sequence[Place],
    asked: ArmSettings,
    prefix: str,
    run: RunFolder | None,
    progress: Progress,
) -> _Tried:
    arms = _arms(subject.vectors, tried, settings)
    answers = arms_experiment(subject, arms, asked, prefix).run(run, progress)
    rows = answers.rows(ArmRow)
    return _Tried(arms, answers, rows, surface(rows, dict(zip(arms, tried, strict=True)), settings.margin))


def _summary(
    subject: Subject,
    settings: TuneSettings,
    norms: Sequence[float],
    searched: _Tried,
    chosen: Point,
    confirmed: _Tried,
) -> dict[str, Any]:
    """Every figure."""
    trait, at_chosen, steering = subject.trait, confirmed.at(chosen), _at(subject.vectors, chosen.place, settings)
    return {
        **subject.describe(),
        "judge": subject.judge_used(searched.answers, confirmed.answers),
        "trait": trait.name,
        "description": trait.description,
        "trait_hash": trait.content_hash(),
        "towards": str(settings.towards),
        "settings": json.loads(json.dumps(asdict(settings))),
        "search_questions": settings.search_questions,
        "confirm_questions": settings.confirm_questions,
        "left_questions": len(trait.evaluation_questions) - settings.search_questions,
        "residual_norms": list(norms),
        "vector_norms": subject.vectors.norms(settings.reduction).tolist(),
        "measured": "nll" if chosen.effect is None or chosen.effect.coherence is None else "coherence",
        "unsteered": {
            "search": _unsteered(searched.rows, settings.margin),
            "confirm": _unsteered(confirmed.rows, settings.margin),
        },
        "surface": [point.to_json() for point in searched.points],
        "chosen": {"steering": str(steering), **chosen.to_json()},
        "confirmed": json_of(at_chosen.effect),
        "curve": [point.to_json() for point in confirmed.points],
        "warnings": [
            *warnings_about(searched.points, chosen, settings.towards.sign),
            *warnings_confirmed(at_chosen),
        ],
        "samples": _samples(confirmed.rows, trait, str(steering)),
    }


def _trade_off(tried: _Tried, capability: Capability) -> list[dict[str, Any]]:
    """Trait score and capability, unsteered and at every strength of a layer."""
    scored: list[tuple[float, Steering | None, Estimate | None]] = [
        (0.0, None, unsteered_means(tried.rows)["score"]),
        *(
            (point.place.coefficient, steering, point.effect.score if point.effect else None)
            for point, steering in zip(tried.points, tried.arms.values(), strict=True)
        ),
    ]
    return [
        {"coefficient": coefficient, "accuracy": capability(steering).to_json(), "score": score.to_json()}
        for coefficient, steering, score in scored
        if score is not None
    ]


def _unsteered(rows: Sequence[ArmRow], margin: float) -> dict[str, Any]:
    """Means of the unsteered responses, and the surprise, or else the coherence, at which text stops to be coherent."""
    means = unsteered_means(rows)
    nll = means["nll"]
    limit = MIN_COHERENCE if means["coherence"] else nll.mean + margin if nll else None
    return {**{quantity: json_of(mean) for quantity, mean in means.items()}, "limit": limit}


def _samples(rows: Sequence[ArmRow], trait: Trait, arm: str) -> list[dict[str, Any]]:
    """The first questions' responses, not the best ones."""
    shown = list(dict.fromkeys(row.question for row in rows))[:SHOWN_SAMPLES]
    return [
        {
            "question": trait.evaluation_questions[number],
            "responses": [
                {"direction": row.direction, "score": row.score, "text": row.text}
                for row in rows
                if row.question == number and row.sample == 0 and (row.direction == NONE or row.arm == arm)
            ],
        }
        for number in shown
    ]

"""`tune`: the layer and strength with the strongest effect while the text holds together (method, section 4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Backend, Operation, Positions, Read, ReadKind
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import Estimate
from persona_lens.extraction.cost import Work, run_work
from persona_lens.extraction.run import subject_config
from persona_lens.judging import Judge, LikelihoodJudge, as_used, prepare_judge
from persona_lens.models import ChatFormat
from persona_lens.models.replies import chat_format
from persona_lens.runs import RunFolder
from persona_lens.runs.rollouts import RolloutSettings
from persona_lens.steering.analysis import COHERENCE_MARGIN, MIN_COHERENCE
from persona_lens.steering.comparison import (
    UNSTEERED,
    ArmEffect,
    ArmRow,
    ArmSettings,
    arm_effect,
    collect_arms,
    run_arms,
    unsteered_mean,
)
from persona_lens.steering.notation import Layers, Term
from persona_lens.steering.steering import Steering, SteeringError
from persona_lens.steering.surface import (
    Place,
    Point,
    choose_point,
    places,
    shown_layers,
    surface,
    warnings_about,
    warnings_confirmed,
)
from persona_lens.steering.sweep import NONE
from persona_lens.traits import Trait
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors, Tuned

SHOWN_SAMPLES = 6
SEARCH = "search-"  # begins the names of its files
Capability = Callable[[Steering | None], Estimate]


class Towards(StrEnum):
    """What steering is for."""

    MORE = "more"
    LESS = "less"

    @property
    def sign(self) -> int:
        """Of the coefficient."""
        return 1 if self is Towards.MORE else -1


@dataclass(frozen=True)
class TuneSettings:
    """What tuning tries.

    Attributes:
        layers: Layers tried, each alone; None for eight between 30% and 85% of the depth.
        pushes: Strengths tried at each: the length of the step over the mean length of the residual there.
        towards: More of the trait, or less.
        search_questions: How many of the held-out questions the search uses; the result is confirmed on the others.
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
    pushes: tuple[float, ...] = (0.1, 0.2, 0.3, 0.45, 0.65, 0.9)
    towards: Towards = Towards.MORE
    search_questions: int = 8
    samples: int = 1
    confirm_samples: int = 2
    random_directions: int = 5
    margin: float = COHERENCE_MARGIN
    positions: Positions = Positions.ALL
    reduction: str = DEFAULT_REDUCTION
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise SteeringError(f"layers must be given, each once: got {list(self.layers)}")
        if not self.pushes or not all(0 < push < 10 for push in self.pushes):
            raise SteeringError(f"pushes are step lengths in residual norms, such as 0.1 to 1: got {list(self.pushes)}")
        if min(self.search_questions, self.samples, self.confirm_samples) < 1 or self.random_directions < 0:
            raise SteeringError("questions and samples must be at least 1, random_directions at least 0")
        if self.margin <= 0:
            raise SteeringError(f"margin must be above 0 nats, got {self.margin}")


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        vectors: The vectors with the choice in their provenance.
        steering: The choice, ready to be used.
        points: The whole surface, on the questions searched.
        chosen: The point taken.
        confirmed: Its effect on the other held-out questions; None if no response had a score there.
        summary: Every figure, as it stands in ``summary.json``.
    """

    vectors: PersonaVectors
    steering: Steering
    points: tuple[Point, ...]
    chosen: Point
    confirmed: ArmEffect | None
    summary: dict[str, Any]


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
        VectorsError: If the vectors belong to another model.
    """
    vectors.check_model(backend, allowable=False)
    settings = settings or TuneSettings()
    trait = vectors.trait_for(trait)
    chat = chat or chat_format(backend)
    judge = judge or LikelihoodJudge(backend, chat, trait, vectors.calibration)
    settings = replace(settings, layers=settings.layers or shown_layers(backend.info.n_layers))
    search, _ = _split(trait, settings)
    vectors.vector(max(settings.layers or ()), settings.reduction)  # what cannot be run must not claim the folder
    described = {"vectors": vectors.content_hash, "judge": judge.describe(), **subject_config(backend, trait, chat)}
    config = {"kind": "tune", "settings": asdict(settings), **described}
    with RunFolder(folder, config) if folder is not None else nullcontext() as run:
        methods: set[str] = set()
        ask = partial(
            run_arms, backend, trait=trait, judge=judge, chat=chat, folder=run, methods=methods, progress=progress
        )
        prepare_judge(judge, run, SEARCH)
        norms = _residual_norms(backend, trait, search, chat, run, progress)
        found, *rows = _searched(vectors, trait, settings, norms, ask, {"command": command, **described}, capability)
        found = replace(found, summary={**found.summary, "judge": as_used(judge.describe(), methods)})
        if run is not None:
            _keep(run, found, *rows)
    return found


def tune_work(
    backend: Backend, vectors: PersonaVectors, settings: TuneSettings, chat: ChatFormat, judge: Judge | None = None
) -> tuple[Work, ...]:
    """What `tune` with these arguments would ask of the model, and of the judge's; nothing runs."""
    trait = vectors.trait_definition
    judge = judge or LikelihoodJudge(backend, chat, trait)
    settings = replace(settings, layers=settings.layers or shown_layers(backend.info.n_layers))
    search, confirm = _split(trait, settings)
    found: list[Work] = []
    for asked, layers in ((search, settings.layers or ()), (confirm, (settings.layers or ())[:1])):
        tried = [Place(layer, 1.0 + number, push) for layer in layers for number, push in enumerate(settings.pushes)]
        arms = {str(steering): steering for place in tried for steering in [_at(vectors, place, settings)]}
        found += run_work(collect_arms(backend, arms, trait, asked, chat), judge)
    return tuple(found)


def _split(trait: Trait, settings: TuneSettings) -> tuple[ArmSettings, ArmSettings]:
    """Questions that are searched, and those that the choice is confirmed on."""
    there = len(trait.evaluation_questions)
    if settings.search_questions >= there:
        raise SteeringError(
            f"trait {trait.name} has {there} held-out questions; search on fewer than that, since the choice is "
            f"confirmed on the others: got {settings.search_questions}"
        )
    search = ArmSettings(
        questions=tuple(range(settings.search_questions)),
        samples=settings.samples,
        random_directions=settings.random_directions,
        seed=settings.seed,
        rollouts=settings.rollouts,
    )
    others = tuple(range(settings.search_questions, there))
    return search, replace(search, questions=others, samples=settings.confirm_samples)


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


def _searched(
    vectors: PersonaVectors,
    trait: Trait,
    settings: TuneSettings,
    norms: Float[Tensor, " layers"],
    ask: Callable[..., list[ArmRow]],
    described: Mapping[str, Any],
    capability: Capability | None,
) -> tuple[Tuning, list[ArmRow], list[ArmRow]]:
    """What was found, with the responses of the search and of the confirmation."""
    search, confirm = _split(trait, settings)
    lengths = vectors.norms(settings.reduction).tolist()
    tried = places(settings.layers or (), settings.pushes, settings.towards.sign, lengths, norms.tolist())
    arms = {place: _at(vectors, place, settings) for place in tried}
    rows = ask({str(each): each for each in arms.values()}, settings=search, prefix=SEARCH)
    points = surface(rows, {str(each): place for place, each in arms.items()}, settings.margin)
    chosen = choose_point(points, settings.towards.sign)
    along = {str(each): each for place, each in arms.items() if place.layer == chosen.place.layer}
    confirmed = ask(along, settings=confirm, prefix="confirm-")
    summary = {**described, **_summary(vectors, trait, settings, norms, points, chosen, rows, confirmed)}
    if capability is not None:
        summary["capability"] = _trade_off(confirmed, along, capability)
    effect = arm_effect(confirmed, str(arms[chosen.place]))
    tuned = Tuned(chosen.place.layer, chosen.place.coefficient, settings.reduction)
    stored = {name: summary[name] for name in ("towards", "search_questions", "confirm_questions", "confirmed")}
    kept = vectors.with_tuned(tuned, {**stored, "push": chosen.place.push, "warnings": summary["warnings"]})
    return Tuning(kept, arms[chosen.place], tuple(points), chosen, effect, summary), rows, confirmed


def _residual_norms(
    backend: Backend,
    trait: Trait,
    settings: ArmSettings,
    chat: ChatFormat,
    run: RunFolder | None,
    progress: Progress,
) -> Float[Tensor, " layers"]:
    """Mean length of the residual over the tokens of unsteered responses, sinks left out, at every layer."""
    collected = collect_arms(
        backend, {}, trait, settings, chat, folder=run, prefix="norms-", reads=[Read(ReadKind.RESPONSE_NORM)]
    )
    collected.run(progress)
    norms = torch.cat([tensors["response_norm"] for _, tensors in collected.reductions()])
    mean: Tensor = norms.nanmean(dim=0)
    if not bool(mean.isfinite().all()):
        raise SteeringError("every unsteered response is empty, so the length of the residual is not known")
    return mean


def _summary(
    vectors: PersonaVectors,
    trait: Trait,
    settings: TuneSettings,
    norms: Tensor,
    points: Sequence[Point],
    chosen: Point,
    rows: Sequence[ArmRow],
    confirmed: Sequence[ArmRow],
) -> dict[str, Any]:
    steering = _at(vectors, chosen.place, settings)
    effect = arm_effect(confirmed, str(steering))
    along = [point.place for point in points if point.place.layer == chosen.place.layer]
    arms = {str(_at(vectors, place, settings)): place for place in along}
    curve = surface(confirmed, arms, settings.margin)
    return {
        "trait": trait.name,
        "description": trait.description,
        "trait_hash": trait.content_hash(),
        "towards": str(settings.towards),
        "settings": json.loads(json.dumps(asdict(settings))),
        "search_questions": settings.search_questions,
        "confirm_questions": len(trait.evaluation_questions) - settings.search_questions,
        "residual_norms": norms.tolist(),
        "vector_norms": vectors.norms(settings.reduction).tolist(),
        "measured": "surprise" if chosen.effect is None or chosen.effect.coherence is None else "coherence",
        "unsteered": {
            "search": _unsteered(rows, settings.margin),
            "confirm": _unsteered(confirmed, settings.margin),
        },
        "surface": [point.to_json() for point in points],
        "chosen": {"steering": str(steering), **chosen.to_json()},
        "confirmed": effect.to_json() if effect else None,
        "curve": [point.to_json() for point in curve],
        "warnings": [
            *warnings_about(points, chosen, settings.towards.sign),
            *warnings_confirmed(next(point for point in curve if point.place == chosen.place)),
        ],
        "samples": _samples(confirmed, trait, str(steering)),
    }


def _trade_off(rows: Sequence[ArmRow], along: Mapping[str, Steering], capability: Capability) -> list[dict[str, Any]]:
    """Trait score and capability, unsteered and at every strength of a layer."""
    found = []
    for name, steering in {UNSTEERED: None, **along}.items():
        effect = arm_effect(rows, name) if steering is not None else None
        score = unsteered_mean(rows, "score") if steering is None else effect.score if effect else None
        if score is not None:
            accuracy = capability(steering).to_json()
            coefficient = steering.terms[0].amount if steering is not None else 0.0
            found.append({"coefficient": coefficient, "accuracy": accuracy, "score": score.to_json()})
    return found


def _unsteered(rows: Sequence[ArmRow], margin: float) -> dict[str, Any]:
    """Means of the unsteered responses, and the surprise, or else the coherence, at which text stops to be coherent."""
    means = {quantity: unsteered_mean(rows, quantity) for quantity in ("score", "surprise", "coherence")}
    surprise = means["surprise"]
    found: dict[str, Any] = {quantity: mean.to_json() if mean else None for quantity, mean in means.items()}
    limit = MIN_COHERENCE if means["coherence"] else surprise.mean + margin if surprise else None
    return {**found, "limit": limit}


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


def _keep(run: RunFolder, found: Tuning, rows: Sequence[ArmRow], confirmed: Sequence[ArmRow]) -> None:
    run.write_rows("search-scores.jsonl", map(asdict, rows))
    run.write_rows("confirm-scores.jsonl", map(asdict, confirmed))
    run.write_bytes("vectors.safetensors", found.vectors.to_bytes())
    run.write_json("summary.json", found.summary, free=("command",))

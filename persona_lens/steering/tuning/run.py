"""`tune`: the layer and strength with the strongest effect while the text holds together (method, section 4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lens.backend import Backend
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import Estimate
from persona_lens.extraction.experiment import Answer, Subject, json_of, run_folder
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat
from persona_lens.reports.result import Result
from persona_lens.runs.cost import Work
from persona_lens.runs.settings import settings_json
from persona_lens.steering.arms import MIN_COHERENCE, NONE, ArmEffect, ArmRow, unsteered_means
from persona_lens.steering.steering import Steering
from persona_lens.steering.tuning.search import Searched, confirming_work, search, search_work
from persona_lens.steering.tuning.settings import TuneSettings, settled, split
from persona_lens.steering.tuning.surface import Point, cliff_beyond, warnings_about, warnings_confirmed
from persona_lens.steering.tuning.trial import CONFIRM, Trial, spent, steering_at, try_places
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors, Tuned

SHOWN_SAMPLES = 6
STORED = ("towards", "search_questions", "confirm_questions", "confirmed", "warnings")  # with the vectors, too
Capability = Callable[[Steering | None], Estimate]


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
    settings = settled(settings or TuneSettings(), subject)
    vectors.vector(max(settings.layers or ()), settings.reduction)  # what cannot be run must not claim the folder
    with run_folder(folder, subject.config("tune", settings)) as run:
        found = search(subject, settings, run, progress)
        chosen, place = found.chosen, found.chosen.place
        asked = try_places(subject, settings, found.curve, split(settings)[1], CONFIRM, run, progress)
        summary = {"command": command, **_summary(subject, settings, found, asked)}
        if capability is not None:
            summary["capability"] = _trade_off(asked, capability)
        choice = Tuned(place.layer, place.coefficient, settings.reduction)
        measured = {"strength": place.strength, "cliff": cliff_beyond(_known(found, asked), place)}
        tuned = vectors.with_tuned(choice, {**measured, **{name: summary[name] for name in STORED}})
        if run is not None:
            run.write_rows("search-scores.jsonl", map(Answer.to_row, found.trial.rows))
            run.write_rows("confirm-scores.jsonl", map(Answer.to_row, asked.rows))
            run.write_bytes("vectors.safetensors", tuned.to_bytes())
            run.write_json("summary.json", summary, free=("command",))
    rows = {"search": found.trial.rows, "confirm": asked.rows}
    steering, effect = steering_at(vectors, place, settings), asked.at(place).effect
    kept = (rows, plain(summary), run.path if run else None)
    return Tuning(tuned, steering, tuple(found.trial.points), chosen, effect, *kept)


def tune_work(subject: Subject, settings: TuneSettings) -> tuple[Work, ...]:
    """What `tune` would ask of the model, and of the judge's; nothing runs."""
    settings = settled(settings, subject)
    return (*search_work(subject, settings), *confirming_work(subject, settings))


def _known(found: Searched, confirmed: Trial) -> list[Point]:
    """What is known of every place: by the questions that confirm the choice, or else by those of the search."""
    again = {point.place for point in confirmed.points}
    return [*confirmed.points, *(point for point in found.trial.points if point.place not in again)]


def _summary(subject: Subject, settings: TuneSettings, found: Searched, confirmed: Trial) -> dict[str, Any]:
    """Every figure."""
    trait, chosen, searched = subject.trait, found.chosen, found.trial
    at_chosen, steering = confirmed.at(chosen.place), steering_at(subject.vectors, chosen.place, settings)
    before = {point.place for point in searched.points}
    later = [point for point in confirmed.points if point.place not in before]
    return {
        **subject.describe(),
        "judge": subject.judge_used(*searched.answers, *confirmed.answers),
        "trait": trait.name,
        "description": trait.description,
        "trait_hash": trait.content_hash(),
        "towards": str(settings.towards),
        "settings": json.loads(json.dumps(settings_json(settings))),
        "search_questions": settings.search_questions,
        "confirm_questions": settings.confirm_questions,
        "left_questions": len(trait.evaluation_questions) - settings.search_questions,
        "race": found.race,
        "cost": {"search": found.cost, "confirm": spent(subject, confirmed.rollouts, confirmed.rollouts)},
        "strengths": list(found.strengths),
        "residual_norms": list(found.norms),
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
            *found.warnings,
            *warnings_about([*searched.points, *later], chosen, settings.towards.sign),
            *warnings_confirmed(at_chosen),
        ],
        "samples": _samples(confirmed.rows, trait, str(steering)),
    }


def _trade_off(tried: Trial, capability: Capability) -> list[dict[str, Any]]:
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

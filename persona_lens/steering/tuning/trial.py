"""`Trial`: what came of steering at some places, each alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persona_lens.core.progress import Progress
from persona_lens.extraction.experiment import Answers, Experiment, Subject, Variant, questions_of, requests_of
from persona_lens.judging.reading import ReadingJudge
from persona_lens.judging.recording import exchange_of, judging_work
from persona_lens.runs import RunFolder
from persona_lens.runs.rollouts import Rollout
from persona_lens.steering.arms import VECTOR, ArmRow, ArmSettings, arm_edits, arms_experiment
from persona_lens.steering.steering import Steering, SteeringError
from persona_lens.steering.tuning.settings import TuneSettings
from persona_lens.steering.tuning.surface import Place, Point, surface
from persona_lens.vectors import PersonaVectors

SEARCH, CONFIRM = "search-", "confirm-"  # begin the names of their files


def steering_at(vectors: PersonaVectors, place: Place, settings: TuneSettings) -> Steering:
    """The vector of the place's layer, added as often as its coefficient says."""
    return Steering.adding(
        vectors, place.layer, place.coefficient, reduction=settings.reduction, positions=settings.positions
    )


def arms_at(vectors: PersonaVectors, places: Sequence[Place], settings: TuneSettings) -> dict[str, Steering]:
    """Steerings by name, in the order of the places."""
    return {str(steering): steering for steering in (steering_at(vectors, place, settings) for place in places)}


@dataclass(frozen=True)
class Trial:
    """What came of steering at some places.

    Attributes:
        arms: The steerings by name, in the order of the points.
        answers: What was asked at once, and what came.
        rows: All responses.
        points: What steering does at each place.
    """

    arms: Mapping[str, Steering]
    answers: Sequence[Answers]
    rows: Sequence[ArmRow]
    points: Sequence[Point]

    @property
    def rollouts(self) -> list[Rollout]:
        """The responses, in the order in which they were asked for."""
        return [rollout for answers in self.answers for rollout in answers.rollouts]

    def at(self, place: Place) -> Point:
        """What steering did at a place."""
        return next(point for point in self.points if point.place == place)


def try_places(
    subject: Subject,
    settings: TuneSettings,
    places: Sequence[Place],
    asked: ArmSettings,
    prefix: str,
    run: RunFolder | None,
    progress: Progress,
) -> Trial:
    """Ask every place everything, beside the unsteered model and random directions.

    Args:
        subject: Who is asked.
        settings: How steering is done.
        places: Where.
        asked: What is asked.
        prefix: Begins the names of the files.
        run: Where they are kept; None keeps everything in memory.
        progress: Told how far it is.
    """
    arms = arms_at(subject.vectors, places, settings)
    answers = arms_experiment(subject, arms, asked, prefix).run(run, progress)
    rows = answers.rows(ArmRow)
    points = surface(rows, dict(zip(arms, places, strict=True)), settings.margin)
    return Trial(arms, (answers,), rows, points)


def steered_experiment(
    subject: Subject,
    settings: TuneSettings,
    arms: Mapping[str, Steering],
    asked: Mapping[str, Sequence[int]],
    prefix: str,
) -> Experiment:
    """Each arm answers questions of its own: the same requests that `try_places` makes of them, and no others.

    Args:
        subject: Who is asked.
        settings: How.
        arms: Steerings by name.
        asked: Numbers of held-out questions by the names of the arms.
        prefix: Begins the names of the files.
    """
    requests = [
        request
        for arm, numbers in asked.items()
        for request in requests_of(
            questions_of(subject.trait, numbers, "evaluation", SteeringError),
            [Variant({"arm": arm, "direction": VECTOR})],
            settings.samples,
            settings.seed,
            *("arms", "evaluation"),
        )
    ]
    return subject.experiment(requests, settings.rollouts, prefix, arm_edits(arms, 0, settings.seed))


def spent(subject: Subject, rollouts: Sequence[Rollout], judged: Sequence[Rollout]) -> dict[str, Any]:
    """What responses cost: how many there are, the tokens in them, and those that were read to judge some of them.

    The last is None for a judge that is no model read here.
    """
    read = None
    if isinstance(subject.judge, ReadingJudge):
        exchanges = [exchange_of(rollout, subject.chat) for rollout in judged]
        read = sum(work.tokens for work in judging_work(subject.judge, exchanges))
    generated = sum(len(rollout.response_ids) for rollout in rollouts)
    return {"responses": len(rollouts), "generated_tokens": generated, "judged_tokens": read}

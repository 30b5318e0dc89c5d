"""`compare`: several arms side by side, and every two of them question by question: which of them does more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from persona_lens.backend import Backend
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import CHANGES, Ends
from persona_lens.extraction.experiment import (
    Answer,
    Subject,
    averaged,
    estimated,
    json_of,
    run_folder,
    values_of,
)
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat
from persona_lens.reports.result import Answered
from persona_lens.steering.arms import (
    RANDOM,
    ArmEffect,
    ArmRow,
    Arms,
    ArmSettings,
    Prompted,
    arm_effect,
    arms_experiment,
    minus,
    unsteered_means,
)
from persona_lens.steering.steering import Steering, SteeringError
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors

WITHIN: Mapping[str, Ends | None] = {"score": CHANGES, "nll": None, "coherence": CHANGES}
"""By what is compared the ends of differences."""


def pair_name(one: str, other: str) -> str:
    """What the difference of two arms is called."""
    return f"{one} minus {other}"


def differences(answers: Mapping[str, Sequence[Answer]]) -> dict[str, dict[str, Any]]:
    """By `pair_name` of every two arms, the one minus the other, as JSON values; None where no question has both.

    Args:
        answers: By arm its own responses, random directions left out. All arms share their questions and seeds.
    """
    values = {name: {each: averaged(values_of(rows, each)) for each in WITHIN} for name, rows in answers.items()}
    return {
        pair_name(one, other): {
            quantity: json_of(estimated(minus(values[one][quantity], values[other][quantity]), within))
            for quantity, within in WITHIN.items()
        }
        for one, other in combinations(values, 2)
    }


@dataclass(frozen=True, repr=False, eq=False)
class Comparison(Answered[ArmRow]):
    """Several arms side by side.

    Attributes:
        answers: Every response.
        effects: By the name of the arm; None for an arm none of whose responses has a score.
        summary: See `persona_lens.reports.result.Result`.
        folder: See `persona_lens.reports.result.Result`.
    """

    kind = "comparison"
    answers: tuple[ArmRow, ...]
    effects: Mapping[str, ArmEffect | None]
    summary: Mapping[str, Any]
    folder: Path | None = None


def compare(
    backend: Backend,
    arms: Arms,
    vectors: PersonaVectors,
    settings: ArmSettings | None = None,
    *,
    trait: str | Trait | None = None,
    folder: Path | str | None = None,
    judge: Judge | None = None,
    chat: ChatFormat | None = None,
    progress: Progress = shown_progress,
) -> Comparison:
    """Let the unsteered model and every arm answer a trait's questions, each steering beside its null.

    Args:
        backend: The model.
        arms: Steerings, or system prompts, by name.
        vectors: Those of the trait that is asked about and scored, with the calibration of their judge.
        settings: See `ArmSettings`.
        trait: The trait, if it is not the one stored with the vectors.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        judge: Who scores; by default the same model, unsteered, by likelihood, as it was calibrated for the vectors.
        chat: Chat format; the model's own by default.
        progress: Told how far the work is.

    Raises:
        SteeringError: If there are no arms.
        VectorsError: If vectors belong to another model, or carry no calibration.
    """
    if not arms:
        raise SteeringError("there is nothing to compare; give at least one steering, or a system prompt")
    subject, settings = Subject.of(backend, vectors, trait, judge, chat), settings or ArmSettings()
    for arm in arms.values():
        if isinstance(arm, Steering):
            arm.check_model(backend, allowable=False)
    experiment = arms_experiment(subject, arms, settings)
    experiment.rollouts()  # what cannot be run must not claim the folder
    described = {name: arm.describe() for name, arm in arms.items()}
    with run_folder(folder, subject.config("comparison", settings, arms=described)) as run:
        answers = experiment.run(run, progress)
        rows = answers.rows(ArmRow)
        effects = {name: arm_effect(rows, name) for name in arms}
        summary = {
            "trait": subject.trait.name,
            "questions": len(settings.questions),
            "samples": settings.samples,
            "judge": subject.judge_used(answers),
            "unsteered": {name: json_of(mean) for name, mean in unsteered_means(rows).items()},
            "arms": {name: {**_written(arms[name]), "effect": json_of(each)} for name, each in effects.items()},
            "pairs": differences({arm: [r for r in rows if r.arm == arm and r.direction != RANDOM] for arm in arms}),
        }
        if run is not None:
            run.write_rows("arms-scores.jsonl", map(Answer.to_row, rows))
            run.write_json("summary.json", summary)
    return Comparison(tuple(rows), effects, plain(summary), run.path if run else None)


def _written(arm: Steering | Prompted) -> dict[str, Any]:
    """What an arm does, as it is written."""
    return arm.describe() if isinstance(arm, Prompted) else {"steering": str(arm)}

"""`compare_steerings`: several steerings on the same questions, kept in a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persona_lens.backend import Backend
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.cost import Work, run_work
from persona_lens.extraction.run import subject_config
from persona_lens.judging import Judge, LikelihoodJudge, as_used
from persona_lens.models import ChatFormat
from persona_lens.models.replies import chat_format
from persona_lens.runs import RunFolder
from persona_lens.steering.comparison import (
    ArmEffect,
    ArmRow,
    ArmSettings,
    arm_effect,
    collect_arms,
    run_arms,
    unsteered_mean,
)
from persona_lens.steering.steering import Steering, SteeringError
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors


@dataclass(frozen=True)
class Comparison:
    """Several steerings side by side.

    Attributes:
        rows: Every response.
        effects: By the name of the arm; None for an arm none of whose responses has a score.
        summary: Every figure, as it stands in ``summary.json``.
    """

    rows: tuple[ArmRow, ...]
    effects: Mapping[str, ArmEffect | None]
    summary: Mapping[str, Any]


def compare_steerings(
    backend: Backend,
    arms: Mapping[str, Steering],
    vectors: PersonaVectors,
    settings: ArmSettings | None = None,
    *,
    trait: str | Trait | None = None,
    folder: Path | str | None = None,
    judge: Judge | None = None,
    chat: ChatFormat | None = None,
    progress: Progress = shown_progress,
) -> Comparison:
    """Let the unsteered model and every arm answer a trait's questions, each arm beside its null.

    Args:
        backend: The model.
        arms: Steerings by name.
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
        raise SteeringError("there is nothing to compare; give at least one steering")
    vectors.check_model(backend, allowable=False)
    for steering in arms.values():
        steering.check_model(backend, allowable=False)
    settings = settings or ArmSettings()
    trait = vectors.trait_for(trait)
    chat = chat or chat_format(backend)
    judge = judge or LikelihoodJudge(backend, chat, trait, vectors.calibration)
    collect_arms(backend, arms, trait, settings, chat)  # what cannot be run must not claim the folder
    config = {
        "kind": "comparison",
        "settings": asdict(settings),
        "arms": {name: steering.describe() for name, steering in arms.items()},
        "judge": judge.describe(),
        **subject_config(backend, trait, chat),
    }
    with RunFolder(folder, config) if folder is not None else nullcontext() as run:
        methods: set[str] = set()
        rows = run_arms(backend, arms, trait, settings, judge, chat, folder=run, methods=methods, progress=progress)
        found = _comparison(rows, arms, trait, settings, as_used(judge.describe(), methods))
        if run is not None:
            run.write_rows("arms-scores.jsonl", map(asdict, rows))
            run.write_json("summary.json", found.summary)
    return found


def _comparison(
    rows: Sequence[ArmRow],
    arms: Mapping[str, Steering],
    trait: Trait,
    settings: ArmSettings,
    judge: Mapping[str, Any],
) -> Comparison:
    effects = {name: arm_effect(rows, name) for name in arms}
    plain = {name: unsteered_mean(rows, name) for name in ("score", "surprise", "coherence")}
    summary = {
        "trait": trait.name,
        "questions": len(settings.questions),
        "samples": settings.samples,
        "judge": judge,
        "unsteered": {name: found.to_json() if found else None for name, found in plain.items()},
        "arms": {
            name: {"steering": str(arms[name]), "effect": effect.to_json() if effect else None}
            for name, effect in effects.items()
        },
    }
    return Comparison(tuple(rows), effects, summary)


def comparison_work(
    backend: Backend,
    arms: Mapping[str, Steering],
    vectors: PersonaVectors,
    settings: ArmSettings,
    chat: ChatFormat,
    judge: Judge | None = None,
) -> tuple[Work, ...]:
    """What `compare_steerings` with these arguments would ask of the model, and of the judge's; nothing runs."""
    trait = vectors.trait_definition
    judge = judge or LikelihoodJudge(backend, chat, trait)
    return run_work(collect_arms(backend, arms, trait, settings, chat), judge)

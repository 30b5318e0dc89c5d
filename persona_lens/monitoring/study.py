"""`study`: does where a prompt ends say how the replies to it will be (method, section 5)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from persona_lens.backend import Backend, Read, ReadKind
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.experiment import (
    Answers,
    Experiment,
    Subject,
    Variant,
    questions_of,
    requests_of,
    run_folder,
)
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat
from persona_lens.monitoring.correlation import Condition, examples_of, graded_conditions, graded_trait, shot_conditions
from persona_lens.monitoring.curves import MonitoringError
from persona_lens.monitoring.findings import PromptRow, Reading, StudyRow, findings
from persona_lens.monitoring.scoring import projected, unit_vectors
from persona_lens.runs.answers import Answer
from persona_lens.runs.cost import Work
from persona_lens.runs.rollouts import Request, RolloutSettings
from persona_lens.traits import Trait
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors

PREFIX = "study-"
DIGITS = 6
Examples = Sequence[tuple[str, str]] | Path | str


class Conditions(StrEnum):
    """What a study varies."""

    PROMPTS = "prompts"
    SHOTS = "shots"
    BOTH = "both"


@dataclass(frozen=True)
class StudySettings:
    """What a study asks.

    Attributes:
        conditions: The trait's eight graded system prompts, numbers of examples, or both.
        shots: The numbers of examples.
        layers: Layers read; None for all.
        questions: How many of the trait's evaluation questions, which the vectors have not seen.
        samples: Responses to each question in each condition; the paper takes 10.
        random_directions: How many random directions stand beside the vector; 0 leaves the null out.
        false_alarm_rate: For the threshold that the summary shows; others can be had of the calibration.
        reduction: Which of the vectors.
        seed: Base of every row's seed, of the random directions and of the bootstrap.
        rollouts: How responses are made.
    """

    conditions: Conditions = Conditions.PROMPTS
    shots: tuple[int, ...] = (0, 5, 10, 15, 20)
    layers: tuple[int, ...] | None = None
    questions: int = 10  # as in the paper, with ten samples each: what is correlated are means over samples
    samples: int = 10
    random_directions: int = 20
    false_alarm_rate: float = 0.05
    reduction: str = DEFAULT_REDUCTION
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if self.conditions is not Conditions.PROMPTS and (
            len(set(self.shots)) < 2 or len(set(self.shots)) < len(self.shots) or min(self.shots) < 0
        ):
            raise MonitoringError(f"shots are two or more different numbers of examples, got {list(self.shots)}")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise MonitoringError(f"layers must be given, each once: got {list(self.layers)}")
        if self.questions < 2:
            raise MonitoringError(f"questions must be at least 2, since intervals are over them: got {self.questions}")
        if self.samples < 1 or self.random_directions < 0:
            raise MonitoringError("samples must be at least 1, random_directions at least 0")
        if self.samples > 1 and self.rollouts.temperature == 0:
            raise MonitoringError("at temperature 0 all samples are the same; set samples to 1, or a temperature")
        if not 0 < self.false_alarm_rate < 1:
            raise MonitoringError(f"false_alarm_rate is above 0 and below 1, got {self.false_alarm_rate}")


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        vectors: The vectors with the calibration in their provenance; without, if none could be made.
        rows: Every response.
        prompts: Every prompt, with its projections and the mean score of its responses.
        summary: Every figure, as it stands in ``summary.json``.
    """

    vectors: PersonaVectors
    rows: tuple[StudyRow, ...]
    prompts: tuple[PromptRow, ...]
    summary: dict[str, Any]


def study(
    backend: Backend,
    vectors: PersonaVectors,
    settings: StudySettings | None = None,
    *,
    trait: str | Trait | None = None,
    examples: Examples | None = None,
    folder: Path | str | None = None,
    judge: Judge | None = None,
    chat: ChatFormat | None = None,
    progress: Progress = shown_progress,
) -> Study:
    """Answer held-out questions under graded conditions, and compare each prompt's projection with its replies' score.

    Args:
        backend: The model.
        vectors: What to project on.
        settings: See `StudySettings`.
        trait: The trait, if it is not the one stored with the vectors.
        examples: For conditions with examples: questions with their answers, or the run folder of the extraction, whose
            highest-scored positive responses are taken (`examples_of`).
        folder: Run folder, kept and resumed; None keeps everything in memory. It also gets ``summary.json`` and
            ``vectors.safetensors``, the vectors with the calibration stored in them.
        judge: Who scores; by default the same model by likelihood, as it was calibrated for the vectors.
        chat: Chat format; the model's own by default.
        progress: Told how far the work is.

    Raises:
        MonitoringError: If the trait has no graded prompts, there are too few examples, or settings do not fit.
        SteeringError: If the vectors carry no trait, or no calibration of the likelihood judge.
        VectorsError: If the vectors belong to another model.
    """
    subject, settings = Subject.of(backend, vectors, trait, judge, chat), settings or StudySettings()
    conditions = plan_conditions(vectors, subject.trait, settings, examples)
    experiment, units = _experiment(subject, settings, conditions), _units(vectors, settings)
    experiment.rollouts()  # what cannot be run must not claim the folder
    varied = [condition.to_json() for condition in conditions]
    with run_folder(folder, subject.config("study", settings, conditions=varied)) as run:
        answers = experiment.run(run, progress)
        rows = answers.rows(StudyRow)
        prompts = _prompts(rows, _read(answers, units), conditions)
        layers = _layers(vectors, settings)
        reading = Reading(layers, settings.reduction, settings.false_alarm_rate, settings.seed)
        kept, figures = findings(vectors, subject.trait, conditions, rows, prompts, reading)
        made = {"judge": subject.judge_used(answers), "sampling": asdict(settings.rollouts)}
        if kept is not vectors:
            kept = kept.with_monitor({**kept.stored("monitor"), **made})
        about = {
            "trait": subject.trait.name,
            "description": subject.trait.description,
            "model": asdict(vectors.model),
            "settings": {**asdict(settings), "layers": list(layers), "shots": list(settings.shots)},
        }
        found = Study(kept, tuple(rows), prompts, {**about, **made, **figures})
        if run is not None:
            run.write_rows(f"{PREFIX}scores.jsonl", map(Answer.to_row, rows))
            run.write_lines(f"{PREFIX}prompts.jsonl", (each.to_json() for each in prompts))
            run.write_bytes("vectors.safetensors", kept.to_bytes())
            run.write_json("summary.json", found.summary)
    return found


def study_work(
    backend: Backend,
    vectors: PersonaVectors,
    settings: StudySettings,
    chat: ChatFormat,
    *,
    trait: str | Trait | None = None,
    examples: Examples | None = None,
    judge: Judge | None = None,
) -> tuple[Work, ...]:
    """What `study` with these arguments would ask of the model, and of the judge's; nothing runs."""
    subject = Subject.planned(backend, vectors, chat, judge, trait)
    return _experiment(subject, settings, plan_conditions(vectors, subject.trait, settings, examples)).work()


def _experiment(subject: Subject, settings: StudySettings, conditions: Sequence[Condition]) -> Experiment:
    reads = [Read(ReadKind.PROMPT_LAST, _layers(subject.vectors, settings))]
    requests = plan_study(subject.trait, settings, conditions)
    return subject.experiment(requests, settings.rollouts, PREFIX, reads=reads)


def plan_conditions(
    vectors: PersonaVectors, trait: Trait, settings: StudySettings, examples: Examples | None = None
) -> list[Condition]:
    """The conditions of a study, graded prompts first.

    Raises:
        MonitoringError: If graded prompts or examples are missing.
    """
    found: list[Condition] = []
    if settings.conditions is not Conditions.SHOTS:
        found += graded_conditions(graded_trait(vectors, trait))
    if settings.conditions is not Conditions.PROMPTS:
        if examples is None:
            raise MonitoringError(
                "conditions with examples need examples: give the run folder of the extraction (--examples FOLDER), or "
                "study graded prompts only (--conditions prompts)"
            )
        answered = examples_of(examples) if isinstance(examples, Path | str) else list(examples)
        found += shot_conditions(sorted(settings.shots), answered)
    return found


def plan_study(trait: Trait, settings: StudySettings, conditions: Sequence[Condition]) -> list[Request]:
    """One request for each question, sample and condition; all conditions share their seeds.

    Raises:
        MonitoringError: If more questions are asked for than the trait has.
    """
    questions = questions_of(trait, settings.questions, "evaluation", MonitoringError)
    variants = [Variant({"condition": each.name}, each.system, each.examples) for each in conditions]
    return requests_of(questions, variants, settings.samples, settings.seed, "study")


def _layers(vectors: PersonaVectors, settings: StudySettings) -> tuple[int, ...]:
    return tuple(sorted(settings.layers)) if settings.layers else tuple(range(vectors.model.n_layers))


def _units(vectors: PersonaVectors, settings: StudySettings) -> torch.Tensor:
    """Unit vectors [layers, 1 + random directions, d_model], the trait's first."""
    layers = _layers(vectors, settings)
    nulls = [vectors.random_like(settings.seed + i) for i in range(settings.random_directions)]
    return torch.stack([unit_vectors(each, layers, settings.reduction) for each in (vectors, *nulls)], dim=1)


def _read(answers: Answers, units: torch.Tensor) -> NDArray[np.float64]:
    """Where each response's prompt ends: [responses, layers, directions]."""
    read = np.full((len(answers.rollouts), *units.shape[:2]), np.nan)
    for batch, tensors in answers.collected.reductions():
        read[batch] = projected(tensors[ReadKind.PROMPT_LAST.value], units).double().numpy()
    return read


def _prompts(
    rows: Sequence[StudyRow], read: NDArray[np.float64], conditions: Sequence[Condition]
) -> tuple[PromptRow, ...]:
    """One entry for each question in each condition. Its samples ran in several batches, which round otherwise."""
    members: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault((row.condition, row.question), []).append(number)
    kinds = {condition.name: condition.kind for condition in conditions}
    return tuple(
        PromptRow(
            condition=name,
            kind=kinds[name],
            question=question,
            scores=tuple(score for number in found if (score := rows[number].score) is not None),
            projections=read[found].mean(axis=0).round(DIGITS),
        )
        for (name, question), found in members.items()
    )

"""`study`: does where a prompt ends say how the replies to it will be (method, section 5)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from persona_lens.backend import Backend, Read, ReadKind
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.cost import Work, run_work
from persona_lens.extraction.run import subject_config
from persona_lens.judging import Judge, Judgement, LikelihoodJudge, as_used, judge_rollouts, methods_of, prepare_judge
from persona_lens.models import ChatFormat
from persona_lens.models.replies import chat_format
from persona_lens.monitoring.correlation import (
    Condition,
    Kind,
    examples_of,
    graded_conditions,
    graded_trait,
    shot_conditions,
)
from persona_lens.monitoring.curves import MonitoringError
from persona_lens.monitoring.findings import PromptRow, findings
from persona_lens.monitoring.scoring import projected, unit_vectors
from persona_lens.runs import RunFolder
from persona_lens.runs.rollouts import Request, Rollout, Rollouts, RolloutSettings, row_seed
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
    questions: int = 10
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
class StudyRow:
    """One response and its judgement.

    Attributes:
        condition: Name of the condition.
        question: Number of the question.
        sample: Number of the sample.
        score: Trait score, 0 to 100; None if the response has none.
        coherence: 0 to 100; None where the judge does not ask.
        surprise: -log p under the model without the condition, nats a token; None where the judge does not compute it.
        text: The response.
    """

    condition: str
    question: int
    sample: int
    score: float | None
    coherence: float | None
    surprise: float | None
    text: str


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
        VectorsError: If the vectors belong to another model, or carry no trait or no calibration.
    """
    vectors.check_model(backend, allowable=False)
    settings = settings or StudySettings()
    chosen = vectors.trait_for(trait)
    chat = chat or chat_format(backend)
    judge = judge or LikelihoodJudge(backend, chat, chosen, vectors.calibration)
    conditions = plan_conditions(vectors, chosen, settings, examples)
    requests = plan_study(chosen, settings, conditions)
    units = _units(vectors, settings)  # what cannot be run must not claim the folder
    config = {
        "kind": "study",
        "settings": asdict(settings),
        "conditions": [condition.to_json() for condition in conditions],
        "vectors": vectors.content_hash,
        "judge": judge.describe(),
        **subject_config(backend, chosen, chat),
    }
    with RunFolder(folder, config) if folder is not None else nullcontext() as run:
        rows, read, judged = _collect(backend, chat, requests, settings, vectors, units, judge, run, progress)
        prompts = _prompts(rows, read, conditions)
        kept, figures = findings(vectors, chosen, conditions, rows, prompts, _layers(vectors, settings), settings)
        made = {"judge": as_used(judge.describe(), methods_of(judged)), "sampling": asdict(settings.rollouts)}
        if kept is not vectors:
            kept = kept.with_monitor({**kept.stored("monitor"), **made})
        found = Study(kept, rows, prompts, {**_head(vectors, chosen, settings), **made, **figures})
        if run is not None:
            _keep(run, found)
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
    chosen = vectors.trait_for(trait)
    requests = plan_study(chosen, settings, plan_conditions(vectors, chosen, settings, examples))
    collected = _collected(backend, chat, requests, settings, vectors, None)
    return run_work(collected, judge or LikelihoodJudge(backend, chat, chosen))


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
    there = len(trait.evaluation_questions)
    if settings.questions > there:
        raise MonitoringError(f"{settings.questions} questions asked for, trait {trait.name} has {there} to evaluate")
    return [
        Request(
            system=condition.system,
            question=trait.evaluation_questions[number],
            seed=row_seed(settings.seed, "study", number, sample),
            labels={"condition": condition.name, "question_number": number, "sample": sample},
            examples=condition.examples,
        )
        for number in range(settings.questions)
        for sample in range(settings.samples)
        for condition in conditions
    ]


def _layers(vectors: PersonaVectors, settings: StudySettings) -> tuple[int, ...]:
    return tuple(sorted(settings.layers)) if settings.layers else tuple(range(vectors.model.n_layers))


def _units(vectors: PersonaVectors, settings: StudySettings) -> torch.Tensor:
    """Unit vectors [layers, 1 + random directions, d_model], the trait's first."""
    layers = _layers(vectors, settings)
    nulls = [vectors.random_like(settings.seed + i) for i in range(settings.random_directions)]
    return torch.stack([unit_vectors(each, layers, settings.reduction) for each in (vectors, *nulls)], dim=1)


def _collected(
    backend: Backend,
    chat: ChatFormat,
    requests: Sequence[Request],
    settings: StudySettings,
    vectors: PersonaVectors,
    run: RunFolder | None,
) -> Rollouts:
    reads = [Read(ReadKind.PROMPT_LAST, _layers(vectors, settings))]
    return Rollouts(backend, chat, requests, settings.rollouts, folder=run, reads=reads, prefix=PREFIX)


def _collect(
    backend: Backend,
    chat: ChatFormat,
    requests: Sequence[Request],
    settings: StudySettings,
    vectors: PersonaVectors,
    units: torch.Tensor,
    judge: Judge,
    run: RunFolder | None,
    progress: Progress,
) -> tuple[tuple[StudyRow, ...], NDArray[np.float64], list[Judgement]]:
    """Every response with its score, and where its prompt ends: [responses, layers, directions]."""
    collected = _collected(backend, chat, requests, settings, vectors, run)
    prepare_judge(judge, run, PREFIX, collected)
    rollouts = collected.run(progress)
    judged = judge_rollouts(judge, rollouts, chat, run, prefix=PREFIX, progress=progress)
    read = np.full((len(requests), *units.shape[:2]), np.nan)
    for batch, tensors in collected.reductions():
        read[batch] = projected(tensors[ReadKind.PROMPT_LAST.value], units).double().numpy()
    rows = tuple(_row(rollout, judgement) for rollout, judgement in zip(rollouts, judged, strict=True))
    return rows, read, judged


def _row(rollout: Rollout, judgement: Judgement) -> StudyRow:
    labels = rollout.request.labels
    coherence = judgement.coherence.value if judgement.coherence else None
    return StudyRow(
        labels["condition"],
        labels["question_number"],
        labels["sample"],
        judgement.trait.value,
        coherence,
        judgement.surprise,
        rollout.response,
    )


def _prompts(
    rows: Sequence[StudyRow], read: NDArray[np.float64], conditions: Sequence[Condition]
) -> tuple[PromptRow, ...]:
    """One entry for each question in each condition. Its samples ran in several batches, which round otherwise."""
    members: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault((row.condition, row.question), []).append(number)
    kinds: Mapping[str, Kind] = {condition.name: condition.kind for condition in conditions}
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


def _head(vectors: PersonaVectors, trait: Trait, settings: StudySettings) -> dict[str, Any]:
    return {
        "trait": trait.name,
        "description": trait.description,
        "model": asdict(vectors.model),
        "settings": {**asdict(settings), "layers": list(_layers(vectors, settings)), "shots": list(settings.shots)},
    }


def _keep(run: RunFolder, found: Study) -> None:
    run.write_rows(f"{PREFIX}scores.jsonl", map(asdict, found.rows))
    run.write_lines(f"{PREFIX}prompts.jsonl", (each.to_json() for each in found.prompts))
    run.write_bytes("vectors.safetensors", found.vectors.to_bytes())
    run.write_json("summary.json", found.summary)

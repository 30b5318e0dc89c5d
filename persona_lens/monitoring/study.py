"""`study`: does where a prompt ends say how the replies to it will be (method, section 5)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from persona_lens.backend import Backend, Read, ReadKind
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.experiment import (
    Answer,
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
from persona_lens.monitoring.conditions import Condition, Examples, StudySettings, plan_conditions
from persona_lens.monitoring.findings import PromptRow, StudyRow, findings
from persona_lens.monitoring.gauges import Gauge, MonitoringError, Panel, projected
from persona_lens.runs.cost import Work
from persona_lens.runs.rollouts import Request
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors

PREFIX = "study-"
DIGITS = 6


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
    layers = settings.layers_of(vectors)
    panel = Panel(tuple(Gauge(vectors, layer, settings.reduction) for layer in layers))
    panel = panel.with_random_directions(settings.random_directions, settings.seed)
    experiment = _experiment(subject, settings, conditions)
    experiment.rollouts()  # what cannot be run must not claim the folder
    varied = [condition.to_json() for condition in conditions]
    with run_folder(folder, subject.config("study", settings, conditions=varied)) as run:
        answers = experiment.run(run, progress)
        rows = answers.rows(StudyRow)
        prompts = _prompts(rows, _read(answers, panel), conditions)
        made = {"judge": subject.judge_used(answers), "sampling": asdict(settings.rollouts)}
        kept, figures = findings(vectors, subject.trait, conditions, rows, prompts, settings, made)
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
    subject = Subject.of(backend, vectors, trait, judge, chat, planned=True)
    return _experiment(subject, settings, plan_conditions(vectors, subject.trait, settings, examples)).work()


def _experiment(subject: Subject, settings: StudySettings, conditions: Sequence[Condition]) -> Experiment:
    reads = [Read(ReadKind.PROMPT_LAST, settings.layers_of(subject.vectors))]
    requests = plan_study(subject.trait, settings, conditions)
    return subject.experiment(requests, settings.rollouts, PREFIX, reads=reads)


def plan_study(trait: Trait, settings: StudySettings, conditions: Sequence[Condition]) -> list[Request]:
    """One request for each question, sample and condition; all conditions share their seeds.

    Raises:
        MonitoringError: If more questions are asked for than the trait has.
    """
    questions = questions_of(trait, settings.questions, "evaluation", MonitoringError)
    variants = [Variant({"condition": each.name}, each.system, each.examples) for each in conditions]
    return requests_of(questions, variants, settings.samples, settings.seed, "study")


def _read(answers: Answers, panel: Panel) -> Float[NDArray[np.float64], "responses directions layers"]:
    """Where each response's prompt ends, on the vector first, then on the random directions."""
    read = np.full((len(answers.rollouts), len(panel.gauges)), np.nan)
    for batch, tensors in answers.collected.reductions():
        read[batch] = projected(tensors[ReadKind.PROMPT_LAST.value], panel.layers, panel.gauges).numpy()
    return read.reshape(len(read), -1, len(panel.layers))


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

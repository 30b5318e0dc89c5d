"""`study`: does where a prompt ends say how the replies to it will be (method, section 5)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from persona_lens.backend import Backend, Read, ReadKind
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import Verdict
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
from persona_lens.monitoring.calibration import SHOWN_FROM, calibrate, threshold_for, with_monitor_calibration
from persona_lens.monitoring.conditions import Condition, Conditions, Examples, StudySettings, plan_conditions
from persona_lens.monitoring.gauges import Gauge, MonitoringError, Panel, projected
from persona_lens.monitoring.prediction import LEAST, Correlations, Observations, Values, correlate
from persona_lens.reports.result import Answered
from persona_lens.runs.settings import settings_json
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors

PREFIX = "study-"
DIGITS = 6
RATES = (0.01, 0.05, 0.1, 0.2)
SHOWN_QUESTIONS = 3
STRONGEST, ONLY = "strongest", "only"


@dataclass(frozen=True)
class StudyRow(Answer):
    """One response and its judgement.

    Attributes:
        condition: Name of the condition.
    """

    condition: str


@dataclass(frozen=True, eq=False)
class PromptRow:
    """One question in one condition.

    Attributes:
        condition: Name of the condition.
        kind: Its kind.
        question: Number of the question.
        scores: Trait scores of those of its responses that have one.
        projections: Of its last token: on the vector first, then on the random directions, at each layer read.
    """

    condition: str
    kind: Conditions
    question: int
    scores: tuple[float, ...]
    projections: Float[Values, "directions layers"]

    @property
    def score(self) -> float:
        """Mean trait score of the responses; there must be one."""
        return float(np.mean(self.scores))

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values, without the random directions."""
        return {
            "condition": self.condition,
            "question": self.question,
            "score": self.score if self.scores else None,
            "scores": list(self.scores),
            "projections": self.projections[0].tolist(),
        }

    def to_point(self, at: int) -> dict[str, Any]:
        """What a figure shows of the row, as JSON values; ``at`` is the place of the layer."""
        projection = float(self.projections[0, at])
        return {"condition": self.condition, "question": self.question, "projection": projection, "score": self.score}


@dataclass(frozen=True, repr=False, eq=False)
class Study(Answered[StudyRow]):
    """What a study found.

    Attributes:
        vectors: The vectors with the calibration in their provenance; without, if none could be made.
        answers: Every response.
        prompts: Every prompt, with its projections and the mean score of its responses.
        summary: See `persona_lens.reports.result.Result`.
        folder: See `persona_lens.reports.result.Result`.
    """

    kind = "study"
    vectors: PersonaVectors
    answers: tuple[StudyRow, ...]
    prompts: tuple[PromptRow, ...]
    summary: dict[str, Any]
    folder: Path | None = None


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
    subject, settings = Subject.of(backend, vectors, trait, judge, chat), vectors.settled(settings or StudySettings())
    conditions = plan_conditions(vectors, subject.trait, settings, examples)
    layers = settings.layers_of(vectors)
    panel = Panel(tuple(Gauge(vectors, layer, settings.reduction) for layer in layers))
    panel = panel.with_random_directions(settings.random_directions, settings.seed)
    experiment = study_experiment(subject, settings, conditions)
    experiment.rollouts()  # what cannot be run must not claim the folder
    varied = [condition.to_json() for condition in conditions]
    with run_folder(folder, subject.config("study", settings, conditions=varied)) as run:
        answers = experiment.run(run, progress)
        rows = answers.rows(StudyRow)
        prompts = _prompts(rows, _read(answers, panel), conditions)
        made = {"judge": subject.judge_used(answers), "sampling": settings_json(settings.rollouts)}
        kept, figures = _findings(vectors, subject.trait, conditions, rows, prompts, settings, made)
        about = {
            "trait": subject.trait.name,
            "description": subject.trait.description,
            "model": asdict(vectors.model),
            "settings": {**settings_json(settings), "layers": list(layers), "shots": list(settings.shots)},
        }
        summary = plain({**about, **made, **figures})
        found = Study(kept, tuple(rows), prompts, summary, run.path if run else None)
        if run is not None:
            run.write_rows(f"{PREFIX}scores.jsonl", map(Answer.to_row, rows))
            run.write_lines(f"{PREFIX}prompts.jsonl", (each.to_json() for each in prompts))
            run.write_bytes("vectors.safetensors", kept.to_bytes())
            run.write_json("summary.json", found.summary)
    return found


def study_experiment(subject: Subject, settings: StudySettings, conditions: Sequence[Condition]) -> Experiment:
    """A study's requests, one for each question, sample and condition; all conditions share their seeds.

    Raises:
        MonitoringError: If more questions are asked for than the trait has.
    """
    questions = questions_of(subject.trait, settings.questions, "evaluation", MonitoringError)
    variants = [Variant({"condition": each.name}, each.system, each.examples) for each in conditions]
    requests = requests_of(questions, variants, settings.samples, settings.seed, "study")
    reads = [Read(ReadKind.PROMPT_LAST, settings.layers_of(subject.vectors))]
    return subject.experiment(requests, settings.rollouts, PREFIX, reads=reads)


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


def _findings(
    vectors: PersonaVectors,
    trait: Trait,
    conditions: Sequence[Condition],
    rows: Sequence[StudyRow],
    prompts: Sequence[PromptRow],
    settings: StudySettings,
    made: Mapping[str, Any],
) -> tuple[PersonaVectors, dict[str, Any]]:
    """The vectors with their calibration, where one can be made, and the figures as JSON values.

    Args:
        vectors: What was projected on.
        trait: Their trait.
        conditions: What the questions were asked in.
        rows: Every response.
        prompts: Every prompt.
        settings: The study's.
        made: How responses were made and judged, to be stored with the calibration.

    Raises:
        MonitoringError: If hardly any response has a score.
    """
    scored = [prompt for prompt in prompts if prompt.scores]
    if len(scored) < LEAST:
        few = f"{len(scored)} of {len(prompts)} prompts have a response with a score"
        more = "ask more questions, or allow for more tokens (--max-new-tokens)"
        raise MonitoringError(f"{few}; {LEAST} are needed: {more}")
    layers = settings.layers_of(vectors)
    by_kind = {
        kind: [prompt for prompt in scored if prompt.kind is kind]
        for kind in dict.fromkeys(condition.kind for condition in conditions)
    }
    groups = {kind: _correlate(own, layers, settings.seed) for kind, own in by_kind.items()}
    first = next(iter(groups.values()))
    # The layer that was tuned for steering is no better guess than others: where a vector is best written, it may not
    # be read before the reply.
    at = int(np.argmax([-np.inf if each.pearson.value is None else each.pearson.value for each in first.layers]))
    verdicts = [each.verdict(each.null) for each in first.layers]
    if len(layers) > 1:
        verdicts[at] = first.layers[at].verdict(first.best_null)
    counts = {"responses": len(rows), "scored": sum(row.score is not None for row in rows)}
    counts |= {"prompts": len(prompts), "prompts_scored": len(scored)}
    kept, calibration = _calibrated(vectors, scored, at, verdicts, settings, made)
    return kept, {
        "counts": counts,
        "layer": layers[at],
        "layer_reason": STRONGEST if len(layers) > 1 else ONLY,
        "verdict": verdicts[at],
        "tuned_layer": vectors.tuned.layer if vectors.tuned is not None else None,
        "groups": {
            kind.value: {**found.to_json(), **_limits(by_kind[kind], conditions, settings.seed)}
            for kind, found in groups.items()
        },
        "conditions": [_condition(each, scored, at) for each in conditions],
        "points": [prompt.to_point(at) for prompt in scored],
        "calibration": calibration,
        "samples": _samples(rows, trait, conditions),
    }


def _correlate(prompts: Sequence[PromptRow], layers: Sequence[int], seed: int) -> Correlations:
    read = np.array([prompt.projections for prompt in prompts])
    return correlate(
        read[:, 0],
        np.array([prompt.score for prompt in prompts]),
        [prompt.condition for prompt in prompts],
        [prompt.question for prompt in prompts],
        layers,
        read[:, 1:] if read.shape[1] > 1 else None,
        seed=seed,
    )


def _limits(prompts: Sequence[PromptRow], conditions: Sequence[Condition], seed: int) -> dict[str, Any]:
    """What bounds a correlation from above, whatever is projected on.

    ``ceiling``: the largest r that anything known before the reply can reach, since a mean of few responses is noisy;
    None with a single sample. ``level``: r of the number of the condition itself with the scores.
    """
    scores = np.array([prompt.score for prompt in prompts])
    noise = [np.var(prompt.scores, ddof=1) / len(prompt.scores) for prompt in prompts if len(prompt.scores) > 1]
    total = float(scores.var(ddof=1)) if len(scores) > 1 else 0.0
    ceiling = float(np.sqrt(max(0.0, 1 - float(np.mean(noise)) / total))) if noise and total > 0 else None
    levels = {condition.name: float(condition.level) for condition in conditions}
    by_level = [replace(prompt, projections=np.array([[levels[prompt.condition]]])) for prompt in prompts]
    return {"ceiling": ceiling, "level": asdict(_correlate(by_level, [0], seed).layers[0].pearson)}


def _calibrated(
    vectors: PersonaVectors,
    prompts: Sequence[PromptRow],
    chosen: int,
    verdicts: Sequence[Verdict],
    settings: StudySettings,
    made: Mapping[str, Any],
) -> tuple[PersonaVectors, dict[str, Any]]:
    """The vectors with a calibration of each layer, and what is shown of the chosen one, or why there is none."""
    shown = [sum(score >= SHOWN_FROM for score in prompt.scores) for prompt in prompts]
    counted = (shown, [len(prompt.scores) for prompt in prompts], [prompt.question for prompt in prompts])
    made_at = []
    try:
        for at, layer in enumerate(settings.layers_of(vectors)):
            observations = Observations.of([float(prompt.projections[0, at]) for prompt in prompts], *counted)
            found = calibrate(observations, vectors.trait, layer, settings.reduction, seed=settings.seed)
            made_at.append(replace(found, verdict=verdicts[at]))
    except MonitoringError as error:
        return vectors, {"reason": str(error)}
    best = made_at[chosen]
    rates = sorted({*RATES, settings.false_alarm_rate})
    thresholds = {rate: threshold_for(best, rate, seed=settings.seed).to_json() for rate in rates}
    described = best.to_json()
    del described["projections"]
    figures = {
        "shown_from": SHOWN_FROM,
        **described,
        "thresholds": list(thresholds.values()),
        "threshold": thresholds[settings.false_alarm_rate],
    }
    return with_monitor_calibration(vectors, made_at, best.layer, made), figures


def _condition(condition: Condition, prompts: Sequence[PromptRow], at: int) -> dict[str, Any]:
    own = [prompt for prompt in prompts if prompt.condition == condition.name]
    scores = np.array([prompt.score for prompt in own])
    each = [score for prompt in own for score in prompt.scores]
    return {
        "name": condition.name,
        "kind": condition.kind.value,
        "level": condition.level,
        "system": condition.system,
        "responses": len(each),
        "mean_score": float(scores.mean()) if len(scores) else None,
        "sd": float(scores.std(ddof=1)) if len(scores) > 1 else None,
        "shown": sum(score >= SHOWN_FROM for score in each) / len(each) if each else None,
        "mean_projection": float(np.mean([p.projections[0, at] for p in own])) if own else None,
    }


def _samples(rows: Sequence[StudyRow], trait: Trait, conditions: Sequence[Condition]) -> list[Mapping[str, Any]]:
    """The first questions' first responses, not the best ones."""
    shown = list(dict.fromkeys(row.question for row in rows))[:SHOWN_QUESTIONS]
    first = {(row.question, row.condition): row for row in rows if row.sample == 0}
    return [
        {
            "question": trait.evaluation_questions[number],
            "responses": [
                {"condition": name, "score": first[number, name].score, "text": first[number, name].text}
                for name in (condition.name for condition in conditions)
            ],
        }
        for number in shown
    ]

"""`compare_methods`: what steering along each method's direction does, at equal strength, beside prompting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lens.analysis.known_questions import probabilities
from persona_lens.analysis.method_effects.outcomes import Outcomes
from persona_lens.analysis.method_effects.plan import KIND, PROMPTED, MethodSettings, Plan, Step
from persona_lens.backend import Backend
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.experiment import Answer, Answers, Value, run_folder
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat
from persona_lens.reports.result import Answered
from persona_lens.runs import RunFolder
from persona_lens.runs.cost import Work
from persona_lens.steering import Steering
from persona_lens.steering.comparison import ARMS, RANDOM, UNSTEERED, ArmRow
from persona_lens.steering.surface import residual_norms
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors

LEFT_OUT = ("kind", "vectors", "methods", "prompt")  # of the configuration, in the summary, which has more of them
SHOWN_SAMPLES, LONGEST_SHOWN = 2, 600  # questions, and characters of a response, in the summary


@dataclass(frozen=True, repr=False, eq=False)
class MethodEffects(Answered[ArmRow]):
    """What was found.

    Attributes:
        answers: Every response; its arm is a method at a strength, such as ``lda at 0.4``, or ``prompted``.
        steerings: What was done, by method and strength.
        summary: See `persona_lens.reports.result.Result`.
        folder: See `persona_lens.reports.result.Result`.
    """

    kind = KIND
    answers: tuple[ArmRow, ...]
    steerings: Mapping[str, Mapping[float, Steering]]
    summary: Mapping[str, Any]
    folder: Path | None = None


def compare_methods(
    backend: Backend,
    methods: Mapping[str, PersonaVectors],
    settings: MethodSettings | None = None,
    *,
    trait: str | Trait | None = None,
    folder: Path | str | None = None,
    judge: Judge | None = None,
    chat: ChatFormat | None = None,
    progress: Progress = shown_progress,
) -> MethodEffects:
    """Steer along the direction that each method made of a trait, by steps of equal length, and measure what comes.

    All of them answer the same held-out questions with the same seeds. Measured are the trait score, the surprise under
    the unsteered model, and the probability of right answers to known questions. Beside them stand the unsteered model,
    random directions of the same length, and a system prompt that asks for the trait.

    Args:
        backend: The model.
        methods: Vectors of one trait by the names of the methods that made them, such as those of
            `persona_lens.vectors.fit.fit_vectors`.
        settings: See `MethodSettings`.
        trait: The trait, if it is not the one stored with the vectors.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        judge: Who scores; by default the same model, unsteered, by likelihood, as it was calibrated for the first of
            the vectors that carry a calibration.
        chat: Chat format; the model's own by default.
        progress: Told how far the work is.

    Raises:
        AnalysisError: If there are no methods, their traits differ, or settings do not fit them.
        SteeringError: If the trait has too few questions, or every unsteered response is empty.
        VectorsError: If vectors belong to another model, lack the layer or reduction, or carry no calibration.
    """
    planned = Plan.of(backend, methods, settings or MethodSettings(), trait, judge, chat)
    planned.check()  # what cannot be run must not claim the folder
    with run_folder(folder, planned.config()) as run:
        subject, asked = planned.subject, planned.settings.asked
        residual = residual_norms(subject, asked, ARMS, run, progress)[planned.layer]
        steps = planned.steps(residual)
        answers = planned.experiment(steps).run(run, progress)
        outcomes = Outcomes(planned, steps, answers.rows(ArmRow), _known(planned, steps, run, progress))
        summary = _summary(outcomes, answers, residual)
        if run is not None:
            run.write_rows("arms-scores.jsonl", map(Answer.to_row, outcomes.rows))
            run.write_json("summary.json", summary)
    steerings: dict[str, dict[float, Steering]] = {name: {} for name in methods}
    for step in steps:
        steerings[step.method][step.strength] = step.steering
    return MethodEffects(tuple(outcomes.rows), steerings, plain(summary), run.path if run else None)


def compare_methods_work(
    backend: Backend,
    methods: Mapping[str, PersonaVectors],
    settings: MethodSettings,
    *,
    judge: Judge | None = None,
    chat: ChatFormat | None = None,
) -> tuple[Work, ...]:
    """What `compare_methods` would ask of the model, and of the judge's, were every response as long as it may be."""
    return tuple(Plan.of(backend, methods, settings, None, judge, chat, planned=True).work())


def _known(
    planned: Plan, steps: Sequence[Step], run: RunFolder | None, progress: Progress
) -> dict[tuple[str, bool], list[Value]]:
    """By arm, and whether it is along random directions, how probable right answers to known questions are."""
    found: dict[tuple[str, bool], list[Value]] = {}
    if planned.settings.known_questions:
        requests, weighing = planned.known(list(steps))
        values = probabilities(weighing, weighing.run(run, progress))
        for labels, value in zip((each.labels for each in requests), values, strict=True):
            own = found.setdefault((labels["arm"], labels["direction"] == RANDOM), [])
            own.append((labels["question_number"], value))
    return found


def _summary(outcomes: Outcomes, answers: Answers, residual: float) -> dict[str, Any]:
    """Every figure that is shown."""
    planned, trait = outcomes.plan, outcomes.plan.subject.trait
    own = {name: value for name, value in planned.config().items() if name not in LEFT_OUT}
    return {
        **own,
        "judge": planned.subject.judge_used(answers),
        "trait": trait.name,
        "description": trait.description,
        "trait_hash": trait.content_hash(),
        "towards": str(planned.settings.towards),
        "layer": planned.layer,
        "tuned_for": list(planned.tuned_for),
        "residual_norm": residual,
        "questions": len(planned.settings.asked.questions),
        "unsteered": {"means": outcomes.means(UNSTEERED)},
        "prompted": {"system": planned.prompt.system, **outcomes.told(PROMPTED)},
        "random": outcomes.random(),
        "methods": outcomes.methods(),
        "pairs": outcomes.pairs(),
        "samples": outcomes.samples(SHOWN_SAMPLES, LONGEST_SHOWN),
    }

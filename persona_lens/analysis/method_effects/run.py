"""`compare_methods`: what directions by several methods detect, do at equal strength, and move besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lens.analysis.known_questions import probabilities
from persona_lens.analysis.method_effects.detection import detection
from persona_lens.analysis.method_effects.entanglement import pairs, ways_of
from persona_lens.analysis.method_effects.harmonic import harmonic
from persona_lens.analysis.method_effects.outcomes import MethodRow, Outcomes, rows_of
from persona_lens.analysis.method_effects.plan import KIND, Methods, MethodSettings, Plan, Step, prompted
from persona_lens.backend import Backend
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.experiment import Answers, Value, json_of, run_folder
from persona_lens.judging import Judge
from persona_lens.judging.recording import as_used
from persona_lens.models import ChatFormat
from persona_lens.reports.result import Answered
from persona_lens.runs import RunFolder
from persona_lens.runs.cost import Work
from persona_lens.steering import Steering
from persona_lens.steering.arms import RANDOM, UNSTEERED
from persona_lens.steering.tuning.surface import mean_norms
from persona_lens.traits import Trait
from persona_lens.vectors.fit import Run, samples_of

SHOWN_SAMPLES, LONGEST_SHOWN = 2, 600  # questions of each trait, and characters of a response, in the summary


@dataclass(frozen=True, repr=False, eq=False)
class MethodEffects(Answered[MethodRow]):
    """What was found.

    Attributes:
        answers: Every response; its arm is a method of a trait at a strength, such as ``lda of optimistic at 0.4``, or
            ``prompted of optimistic``.
        steerings: What was done, by trait, method and strength.
        summary: See `persona_lens.reports.result.Result`.
        folder: See `persona_lens.reports.result.Result`.
    """

    kind = KIND
    answers: tuple[MethodRow, ...]
    steerings: Mapping[str, Mapping[str, Mapping[float, Steering]]]
    summary: Mapping[str, Any]
    folder: Path | None = None


def compare_methods(
    backend: Backend,
    methods: Methods,
    settings: MethodSettings | None = None,
    *,
    runs: Sequence[Run] = (),
    traits: Mapping[str, str | Trait] | None = None,
    folder: Path | str | None = None,
    judges: Mapping[str, Judge] | None = None,
    chat: ChatFormat | None = None,
    progress: Progress = shown_progress,
) -> MethodEffects:
    """Compare directions of one trait or of several, each made by several methods, by what they detect, do and move.

    Steered by steps of equal length along all of them, the model answers the same held-out questions with the same
    seeds, beside the unsteered model, random directions of that length, and a system prompt that asks for the trait.
    Measured are the trait score, the surprise under the unsteered model, the probability of right answers to known
    questions, and the harmonic mean of the three; and, as every judge scores every answer, which other traits move.

    Args:
        backend: The model.
        methods: Vectors by the names of the methods that made them, such as those of
            `persona_lens.vectors.fit.fit_vectors`; of several traits a sequence of them for each method.
        settings: See `MethodSettings`.
        runs: Run folders of the traits' extractions, for detection; a trait without one has none.
        traits: By name the traits that are not the ones stored with the vectors.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        judges: By trait who scores; by default the same model, unsteered, by likelihood, as it was calibrated for the
            first of the trait's vectors that carry a calibration.
        chat: Chat format; the model's own by default.
        progress: Told how far the work is.

    Raises:
        AnalysisError: If there are no methods, a method has two vectors of one trait, or settings do not fit them.
        SteeringError: If every unsteered response is empty.
        VectorsError: If vectors belong to another model, lack the layer or reduction, or carry no calibration.
        RunError: If a run is no finished extraction, or is damaged.
    """
    read = [samples_of(each) for each in runs]
    planned = Plan.of(backend, methods, settings or MethodSettings(), read, traits, judges, chat)
    planned.check()  # what cannot be run must not claim the folder
    with run_folder(folder, planned.config()) as run:
        detected = _detected(planned)
        planned.prepare(run)
        collected = planned.norms().rollouts(run)
        collected.run(progress)
        residual = mean_norms(collected)[planned.layer]
        steps = planned.steps(residual)
        answers = planned.experiment(steps).run(run, progress)
        rows, first = rows_of(planned, answers), next(iter(planned.subjects))
        outcomes = Outcomes(planned, steps, rows, _known(planned, steps, run, progress), first)
        summary = _summary(outcomes, answers, residual, detected)
        if run is not None:
            run.write_rows("arms-scores.jsonl", map(MethodRow.to_row, rows))
            run.write_json("summary.json", summary)
    return MethodEffects(tuple(rows), _steerings(steps), plain(summary), run.path if run else None)


def compare_methods_work(
    backend: Backend,
    methods: Methods,
    settings: MethodSettings,
    *,
    judges: Mapping[str, Judge] | None = None,
    chat: ChatFormat | None = None,
) -> tuple[Work, ...]:
    """What `compare_methods` would ask of the model, and of the judges', were every response as long as it may be."""
    return tuple(Plan.of(backend, methods, settings, judges=judges, chat=chat, planned=True).work())


def _steerings(steps: Sequence[Step]) -> dict[str, dict[str, dict[float, Steering]]]:
    found: dict[str, dict[str, dict[float, Steering]]] = {}
    for step in steps:
        found.setdefault(step.trait, {}).setdefault(step.method, {})[step.strength] = step.steering
    return found


def _detected(planned: Plan) -> dict[str, dict[str, Any]]:
    """By trait what its directions detect in its run, as JSON values."""
    asked, every = planned.settings, list(planned.runs.values())
    return {
        name: detection(run, planned.methods[name], every, planned.layer, asked.reduction, asked.asked.seed)
        for name, run in planned.runs.items()
    }


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


def _summary(
    outcomes: Outcomes, answers: Answers, residual: float, detected: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Every figure that is shown."""
    planned, ways = outcomes.plan, ways_of(outcomes)
    judges = {name: as_used(each.judge.describe(), answers.judged[name]) for name, each in planned.subjects.items()}
    return {
        **{name: value for name, value in planned.config().items() if name not in ("kind", "traits")},
        "judges": judges,
        "towards": str(planned.settings.towards),
        "layer": planned.layer,
        "tuned_for": list(planned.tuned_for),
        "residual_norm": residual,
        "traits": {name: _trait(outcomes.seen(name), detected.get(name)) for name in planned.subjects},
        "methods": planned.names,
        "ways": [each.to_json() for each in ways],
        "pairs": pairs(ways),
    }


def _trait(outcomes: Outcomes, detected: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every figure of one trait."""
    planned, name = outcomes.plan, outcomes.trait
    trait = planned.subjects[name].trait
    return {
        "trait": name,
        "description": trait.description,
        "trait_hash": trait.content_hash(),
        "unsteered": {"means": outcomes.means(UNSTEERED), "harmonic": json_of(harmonic([outcomes.marks(UNSTEERED)]))},
        "prompted": {"system": planned.prompts[name].system, **outcomes.told(prompted(name))},
        "random": outcomes.random(),
        "methods": outcomes.methods(),
        "pairs": outcomes.pairs(),
        "detection": detected,
        "samples": outcomes.samples(SHOWN_SAMPLES, LONGEST_SHOWN),
    }

"""The shift that finetuning leaves: how far prompts have moved along a trait, against how replies have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Backend
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import CHANGES, CORRELATION, SCORES, Ends, bootstrap_mean, jackknifed, pearson
from persona_lens.extraction.experiment import Answers, Subject, model_config, questions_of, run_folder
from persona_lens.finetuning.config import FinetuningError
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.monitoring.scoring import kept_projections
from persona_lens.runs import RunFolder, file_prefix
from persona_lens.runs.answers import by_question
from persona_lens.steering import ArmRow, ArmSettings
from persona_lens.steering.comparison import arms_experiment, minus
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors

LEAST = 4  # finetunes; a line through fewer is no correlation
Opening = Callable[[], Backend]


@dataclass(frozen=True)
class ShiftSettings:
    """What is compared.

    Attributes:
        layers: Block indices, 0-based; None for all.
        scores: Whether replies are generated and scored too.
        asked: Which evaluation questions, and how replies are made.
        reduction: Which of the vectors.
    """

    layers: tuple[int, ...] | None = None
    scores: bool = True
    asked: ArmSettings = field(default_factory=lambda: ArmSettings(random_directions=0))
    reduction: str = DEFAULT_REDUCTION

    def __post_init__(self) -> None:
        if self.asked.random_directions or self.asked.question_set != "evaluation":
            raise FinetuningError("a shift is measured on evaluation questions, without random directions")
        if self.layers is not None and not self.layers:
            raise FinetuningError("name layers to measure the shift at, or leave them out for all")


@dataclass(frozen=True)
class Shifts:
    """What was found.

    Attributes:
        summary: Every figure, as it stands in ``summary.json``: by trait the scores, and for each model the shift by
            layer and the change of the score; and over the models the correlation of the two by layer. Beside them, the
            judges as they scored.
    """

    summary: Mapping[str, Any]


def shift_of(
    before: Float[Tensor, "prompts traits layers"], after: Float[Tensor, "prompts traits layers"]
) -> Float[Tensor, "traits layers"]:
    """(mean h_fine - mean h_base) . v̂, of projections of the same prompts in both models (method, section 6)."""
    moved: Tensor = after.mean(dim=0) - before.mean(dim=0)
    return moved


def measure_shifts(
    base: Backend,
    finetuned: Mapping[str, Opening],
    vectors: Sequence[PersonaVectors],
    settings: ShiftSettings | None = None,
    *,
    judges: Mapping[str, Judge] | None = None,
    chat: ChatFormat | None = None,
    folder: Path | str | None = None,
    progress: Progress = shown_progress,
) -> Shifts:
    """Measure how far finetuned models have moved from their base along traits, and how their replies changed.

    Args:
        base: The base model, which the vectors belong to.
        finetuned: By name, what opens each; one is open at a time. Adapters need not be merged.
        vectors: The traits, each measured on its own evaluation questions.
        settings: See `ShiftSettings`.
        judges: Who scores, by trait; by default the base model by likelihood, as it was calibrated for the vectors.
        chat: Chat format; the base model's own by default.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        progress: Told how far the work is.

    Raises:
        FinetuningError: If there is nothing to compare, or a model is no finetune of the base.
        VectorsError: If the vectors belong to another model.
    """
    settings = settings or ShiftSettings()
    if not finetuned or not vectors:
        raise FinetuningError("give finetuned models and vectors: there are none to compare")
    for each in vectors:
        each.check_model(base, allowable=False)
    chat = chat or chat_format(base)
    layers = settings.layers or tuple(range(base.info.n_layers))
    subjects = [_subject(base, each, settings, (judges or {}).get(each.trait), chat) for each in vectors]
    by_trait = {each.vectors.trait: each for each in subjects}
    record = {
        "kind": "shift",
        "settings": asdict(settings),
        "finetuned": list(finetuned),
        "vectors": {each.trait: each.content_hash for each in vectors},
        "judges": {name: each.judge.describe() for name, each in by_trait.items() if settings.scores},
        **model_config(base, chat),
    }
    with run_folder(folder, record) as run:
        measuring = _Measuring(subjects, layers, settings, run, progress)
        models = {"base": measuring.of(base, "base", 0)}
        for number, (name, opened) in enumerate(finetuned.items(), start=1):
            backend = opened()
            _check_finetune(base, backend, name)
            if run is not None:  # a folder of the same name may hold another model by now
                run.bind(name, asdict(backend.info))
            models[name] = measuring.of(backend, name, number)
            del backend
        used = {name: by_trait[name].judge_used(*answers) for name, answers in measuring.answers.items()}
        found = Shifts({**_summary(models, vectors, layers), "judges": used})
        if run is not None:
            run.write_json("summary.json", found.summary)
    return found


@dataclass(frozen=True)
class _Measured:
    projections: Mapping[str, Float[Tensor, "questions layers"]]
    scores: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class _Measuring:
    subjects: Sequence[Subject]
    layers: tuple[int, ...]
    settings: ShiftSettings
    run: RunFolder | None
    progress: Progress
    answers: dict[str, list[Answers]] = field(default_factory=dict)

    def of(self, backend: Backend, name: str, model: int) -> _Measured:
        """One model's projections and scores, by trait; models have numbers, the base 0."""
        projections, scores = {}, {}
        for number, each in enumerate(self.subjects, start=model * len(self.subjects)):
            trait = each.vectors.trait
            prefix = file_prefix(number, name, trait)
            texts = list(
                questions_of(each.trait, self.settings.asked.questions, "evaluation", FinetuningError).values()
            )
            prompts = [each.chat.encode(None, text) for text in texts]
            projections[trait] = kept_projections(
                backend, prompts, each.vectors, self.layers, texts, self.run, prefix, reduction=self.settings.reduction
            )
            if self.settings.scores:
                asked = arms_experiment(replace(each, backend=backend), {}, self.settings.asked, prefix)
                answers = asked.run(self.run, self.progress)
                self.answers.setdefault(trait, []).append(answers)
                scores[trait] = by_question(answers.rows(ArmRow), "score")
        return _Measured(projections, scores)


def correlated(x: Sequence[float], y: Sequence[float]) -> dict[str, float | int | None]:
    """Pearson's r over finetunes with its 95% interval over them; None where it is not defined."""
    n = len(x)
    if n < LEAST:
        return {"value": None, "low": None, "high": None, "n": n}
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    value = float(pearson(a, b))
    (interval,) = jackknifed(lambda rows: pearson(a[rows], b[rows])[None], range(n), CORRELATION)
    low, high = interval or (None, None)
    return {"value": value if np.isfinite(value) else None, "low": low, "high": high, "n": n}


def _summary(
    models: Mapping[str, _Measured], vectors: Sequence[PersonaVectors], layers: tuple[int, ...]
) -> dict[str, Any]:
    base, others = models["base"], {name: found for name, found in models.items() if name != "base"}
    traits: dict[str, Any] = {}
    for each in vectors:
        name = each.trait
        rows = {other: _row(base, found, name, layers) for other, found in others.items()}
        known = [row for row in rows.values() if row["change"] is not None]
        correlations = [
            {
                "layer": layer,
                **correlated([row["shift"][i]["mean"] for row in known], [row["change"]["mean"] for row in known]),
            }
            for i, layer in enumerate(layers)
        ]
        score = _mean(base.scores[name], SCORES) if base.scores else None
        tuned = each.tuned.layer if each.tuned and each.tuned.layer in layers else None
        traits[name] = {"score": score, "layer": tuned, "models": rows, "correlations": correlations if known else []}
    return {"layers": list(layers), "traits": traits}


def _row(base: _Measured, found: _Measured, trait: str, layers: tuple[int, ...]) -> dict[str, Any]:
    moved = found.projections[trait] - base.projections[trait]
    shift = [bootstrap_mean(moved[:, i].tolist()).to_json() for i in range(len(layers))]
    if not found.scores:
        return {"shift": shift, "score": None, "change": None}
    before, after = base.scores[trait], found.scores[trait]
    return {"shift": shift, "score": _mean(after, SCORES), "change": _mean(minus(after, before), CHANGES)}


def _mean(values: Mapping[int, float], within: Ends) -> dict[str, Any] | None:
    return bootstrap_mean(list(values.values()), within=within).to_json() if values else None


def _subject(
    base: Backend, vectors: PersonaVectors, settings: ShiftSettings, judge: Judge | None, chat: ChatFormat
) -> Subject:
    """The base model, asked about a trait; without scores no calibration is needed."""
    if settings.scores:
        return Subject.of(base, vectors, None, judge, chat)
    return Subject.planned(base, vectors, chat, judge)


def _check_finetune(base: Backend, other: Backend, name: str) -> None:
    for what in ("architecture", "n_layers", "d_model"):
        own, found = getattr(base.info, what), getattr(other.info, what)
        if own != found:
            raise FinetuningError(f"{name} is no finetune of {base.info.model}: {what} is {found}, not {own}")

"""The shift that finetuning leaves: how far prompts have moved along a trait, against how replies have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Backend
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import CHANGES, CORRELATION, SCORES, Ends, bootstrap_mean, jackknifed, pearson
from persona_lens.extraction.experiment import Answers, Subject, by_question, model_config, questions_of, run_folder
from persona_lens.finetuning.config import FinetuningError
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.monitoring.scoring import kept_projections, projections_work
from persona_lens.reports.kinds import shifts_of
from persona_lens.reports.result import Result
from persona_lens.runs import RunFolder, file_prefix
from persona_lens.runs.cost import Work
from persona_lens.runs.settings import settings_json
from persona_lens.steering import ArmRow, ArmSettings
from persona_lens.steering.arms import arms_experiment, minus
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors

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
    reduction: str = OWN_REDUCTION

    def __post_init__(self) -> None:
        if self.asked.random_directions or self.asked.question_set != "evaluation":
            raise FinetuningError("a shift is measured on evaluation questions, without random directions")
        if self.layers is not None and not self.layers:
            raise FinetuningError("name layers to measure the shift at, or leave them out for all")


@dataclass(frozen=True, repr=False, eq=False)
class Shifts(Result):
    """What was found; a row for each trait, model and layer.

    Attributes:
        summary: Every figure, as it stands in ``summary.json``: by trait the scores, and for each model the shift by
            layer and the change of the score; and over the models the correlation of the two by layer. Beside them, the
            judges as they scored.
        folder: See `Result`.
    """

    kind = "shift"
    summary: Mapping[str, Any]
    folder: Path | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """See `Result.rows`."""
        return list(shifts_of(None, self.summary))


def shift(
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

    The shift is (mean h_fine - mean h_base) . v̂ over the last tokens of the same prompts (method, section 6).

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
    settings, chat = vectors[0].settled(settings), chat or chat_format(base)
    layers = settings.layers or tuple(range(base.info.n_layers))
    given, planned = judges or {}, not settings.scores  # without scores no calibration is needed
    subjects = [Subject.of(base, each, None, given.get(each.trait), chat, planned=planned) for each in vectors]
    record = {
        "kind": "shift",
        "settings": settings_json(settings),
        "finetuned": list(finetuned),
        "vectors": {each.trait: each.content_hash for each in vectors},
        "judges": {each.vectors.trait: each.judge.describe() for each in subjects if settings.scores},
        **model_config(base, chat),
    }
    with run_folder(folder, record) as run:
        measured = partial(_measured, subjects, settings, layers, run, progress)
        models = {"base": measured(base, "base", 0)}
        for number, (name, opened) in enumerate(finetuned.items(), start=1):
            backend = opened()
            _check_finetune(base, backend, name)
            if run is not None:  # a folder of the same name may hold another model by now
                run.bind(name, asdict(backend.info))
            models[name] = measured(backend, name, number)
            del backend
        found = Shifts(plain(_summary(models, subjects, layers)), run.path if run else None)
        if run is not None:
            run.write_json("summary.json", found.summary)
    return found


def shift_work(
    base: Backend,
    models: int,
    vectors: Sequence[PersonaVectors],
    settings: ShiftSettings | None = None,
    *,
    judges: Mapping[str, Judge] | None = None,
    chat: ChatFormat | None = None,
) -> tuple[Work, ...]:
    """What `shift` would ask of the base and so many finetuned models, and of the judges; nothing runs.

    Finetuned models are taken to be adapters on the base.
    """
    settings, given = settings or ShiftSettings(), judges or {}
    layers = settings.layers or tuple(range(base.info.n_layers))
    found = []
    for each in vectors:
        subject = Subject.of(base, each, None, given.get(each.trait), chat, planned=True)
        rollouts, *judging = arms_experiment(subject, {}, settings.asked).work()
        answering = [asked_projections_work(subject, settings.asked, layers), *([rollouts] if settings.scores else [])]
        asked = [*(replace(work, adapted=True) for work in answering), *(judging if settings.scores else ())]
        found += [replace(work * (1 + models), label=f"{work.label} {each.trait}") for work in asked]
    return tuple(found)


@dataclass(frozen=True)
class _Measured:
    projections: Float[Tensor, "questions layers"]
    answers: Answers | None

    def scores(self) -> dict[int, float]:
        """By question; empty without answers."""
        return by_question(self.answers.rows(ArmRow), "score") if self.answers else {}


def _measured(
    subjects: Sequence[Subject],
    settings: ShiftSettings,
    layers: Sequence[int],
    run: RunFolder | None,
    progress: Progress,
    backend: Backend,
    name: str,
    model: int,
) -> dict[str, _Measured]:
    """One model's projections and answers, by trait; models have numbers, the base 0."""
    found = {}
    for number, subject in enumerate(subjects, start=model * len(subjects)):
        trait, subject = subject.vectors.trait, replace(subject, backend=backend)
        prefix, answers = file_prefix(number, name, trait), None
        projections = asked_projections(subject, settings.asked, layers, run, prefix, settings.reduction)
        if settings.scores:
            answers = arms_experiment(subject, {}, settings.asked, prefix).run(run, progress)
        found[trait] = _Measured(projections, answers)
    return found


def asked_projections_work(subject: Subject, asked: ArmSettings, layers: Sequence[int]) -> Work:
    """What `asked_projections` would ask of the model; nothing runs."""
    return projections_work(subject.backend, _prompts(subject, asked)[1], layers)


def _prompts(subject: Subject, asked: ArmSettings) -> tuple[list[str], list[list[int]]]:
    """The questions, and what the model is given of each."""
    texts = list(questions_of(subject.trait, asked.questions, "evaluation", FinetuningError).values())
    return texts, [subject.chat.encode(None, text) for text in texts]


def asked_projections(
    subject: Subject,
    asked: ArmSettings,
    layers: Sequence[int],
    run: RunFolder | None,
    prefix: str,
    reduction: str = OWN_REDUCTION,
) -> Float[Tensor, "questions layers"]:
    """Where the last prompt token of each question stands; see `kept_projections`."""
    texts, prompts = _prompts(subject, asked)
    return kept_projections(subject.backend, prompts, subject.vectors, layers, texts, run, prefix, reduction=reduction)


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
    models: Mapping[str, Mapping[str, _Measured]], subjects: Sequence[Subject], layers: Sequence[int]
) -> dict[str, Any]:
    traits, judges = {}, {}
    for subject in subjects:
        vectors, name = subject.vectors, subject.vectors.trait
        base, *others = (found[name] for found in models.values())
        rows = {other: _row(base, found, len(layers)) for other, found in zip(list(models)[1:], others, strict=True)}
        known = [row for row in rows.values() if row["change"] is not None]
        changes = [row["change"]["mean"] for row in known]
        correlations = [
            {"layer": layer, **correlated([row["shift"][i]["mean"] for row in known], changes)}
            for i, layer in enumerate(layers)
        ]
        traits[name] = {
            "score": _mean(base.scores(), SCORES),
            "layer": vectors.tuned.layer if vectors.tuned and vectors.tuned.layer in layers else None,
            "models": rows,
            "correlations": correlations if known else [],
        }
        if answers := [each.answers for each in (base, *others) if each.answers]:
            judges[name] = subject.judge_used(*answers)
    return {"layers": list(layers), "traits": traits, "judges": judges}


def _row(base: _Measured, found: _Measured, layers: int) -> dict[str, Any]:
    moved = found.projections - base.projections
    after = found.scores()
    return {
        "shift": [bootstrap_mean(moved[:, at].tolist()).to_json() for at in range(layers)],
        "score": _mean(after, SCORES),
        "change": _mean(minus(after, base.scores()), CHANGES),
    }


def _mean(values: Mapping[int, float], within: Ends) -> dict[str, Any] | None:
    return bootstrap_mean(list(values.values()), within=within).to_json() if values else None


def _check_finetune(base: Backend, other: Backend, name: str) -> None:
    for what in ("architecture", "n_layers", "d_model"):
        own, found = getattr(base.info, what), getattr(other.info, what)
        if own != found:
            raise FinetuningError(f"{name} is no finetune of {base.info.model}: {what} is {found}, not {own}")

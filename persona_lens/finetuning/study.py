"""`study`: plain finetuning, preventative steering and its baselines side by side, over seeds (method, section 6)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from persona_lens.analysis.capability import capability_work, check_task
from persona_lens.analysis.capability.evaluation import right_answers
from persona_lens.backend import Backend, wrap_model
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.data.transcripts import Transcript
from persona_lens.extraction.experiment import Answers, Subject, by_question
from persona_lens.finetuning.config import FinetuneConfig, FinetuningError
from persona_lens.finetuning.examples import fingerprint
from persona_lens.finetuning.outcomes import (
    BASE,
    PLAIN,
    POST_HOC,
    RANDOM,
    Outcome,
    Treatment,
    TreatmentSettings,
    summarise,
    treatments_of,
    turned,
)
from persona_lens.finetuning.run import Data, conversations_of, finetune, finetune_work
from persona_lens.finetuning.shift import asked_projections, asked_projections_work
from persona_lens.judging import Evidence, Exchange, Judge, LikelihoodJudge
from persona_lens.models import ChatFormat, Loaded, load
from persona_lens.models.source import adapter_on
from persona_lens.reports.result import Result
from persona_lens.runs import RunFolder
from persona_lens.runs.cost import Work, together
from persona_lens.runs.settings import settings_json
from persona_lens.steering import ArmRow, ArmSettings, Steering
from persona_lens.steering.arms import UNSTEERED, arms_experiment, minus
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors

OUTCOMES = "outcomes.jsonl"


@dataclass(frozen=True)
class FinetuneStudySettings:
    """What a study compares, and how.

    Attributes:
        treatments: The ways to finetune.
        layer: Where the shift is read.
        seeds: Of the trainings; each treatment is trained once with each.
        asked: Which evaluation questions the models answer, and how.
        task: A task of lm-evaluation-harness for capability; None leaves it out.
        dtype: Precision in which the models answer and are scored; they train in that of the configuration.
    """

    treatments: TreatmentSettings
    layer: int
    seeds: tuple[int, ...] = (1, 2, 3)
    asked: ArmSettings = field(default_factory=lambda: ArmSettings(random_directions=0))
    task: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise FinetuningError(f"seeds are different whole numbers from 0 on, got {list(self.seeds)}")
        if self.asked.random_directions or self.asked.question_set != "evaluation":
            raise FinetuningError("a study asks evaluation questions; its random directions are trained, not asked")


@dataclass(frozen=True, repr=False, eq=False)
class FinetuneStudy(Result):
    """What a study found, whose rows are the outcomes.

    Attributes:
        outcomes: Of every treatment and seed.
        summary: See `Result`.
        folder: See `Result`.
    """

    kind = "finetune study"
    outcomes: tuple[Outcome, ...]
    summary: Mapping[str, Any]
    folder: Path


def finetune_study(
    model: str,
    data: Data,
    vectors: PersonaVectors,
    settings: FinetuneStudySettings,
    config: FinetuneConfig | None = None,
    *,
    folder: Path | str,
    held_out: Data = (),
    side: str | None = None,
    judge: Judge | None = None,
    device: str = "auto",
    progress: Progress = shown_progress,
) -> FinetuneStudy:
    """Finetune with every treatment and seed, and compare what becomes of trait, coherence, capability and loss.

    Args:
        model: Hub id, local folder or embedded model.
        data: Conversations to learn, or a file of them.
        vectors: The trait that the data teaches.
        settings: See `FinetuneStudySettings`.
        config: How all of them train; the paper's settings by default.
        folder: Run folder, kept and resumed; each training has a folder of its own in ``models/``.
        held_out: Conversations, or a file of them, whose loss is measured and not learned.
        side: Of preference pairs: ``chosen`` or ``rejected``.
        judge: Who scores; by default the base model by likelihood, as it was calibrated for the vectors.
        device: ``auto`` or a torch device.
        progress: Told how far the work is.

    Raises:
        FinetuningError: If the configuration names a method, trains full weights, or something does not fit.
        RunError: If the folder holds another run.
        VectorsError: If the vectors belong to another model.
    """
    config = config or FinetuneConfig()
    _check(config, settings, vectors)
    trained = treatments_of(settings.treatments, config, vectors)
    transcripts, others = conversations_of(data, side), conversations_of(held_out, side)
    loaded, answering = _opened(model, config.dtype, settings.dtype, device)
    base = wrap_model(answering.model, answering.tokenizer)
    subject = Subject.of(base, vectors, None, judge, ChatFormat.from_tokenizer(loaded.tokenizer))
    of_data = [fingerprint(each) if each else None for each in (transcripts, others)]
    training = config.model_dump(mode="json")
    with RunFolder(folder, subject.config("finetune study", settings, data=of_data, config=training)) as run:
        work = _Work(loaded, answering, transcripts, others, subject, settings, run, progress)
        outcomes = work.all(trained)
        summary = {
            "trait": subject.trait.name,
            "model": base.info.model if answering.source.kind == "hub" else answering.source.id,
            "conversations": len(transcripts),
            "names": {each.name: each.config.edits for each in trained} | {POST_HOC: settings.treatments.post_hoc},
            "settings": settings_json(settings),
            "config": training,
            "judge": subject.judge_used(*work.answers),
            **summarise(outcomes),
            "samples": _samples(subject.trait, work.shown),
        }
        run.write_lines(OUTCOMES, map(asdict, outcomes))
        run.write_json("summary.json", summary)
    return FinetuneStudy(tuple(outcomes), json.loads(json.dumps(summary)), run.path)


def finetune_study_work(
    model: str,
    backend: Backend,
    data: Data,
    vectors: PersonaVectors,
    settings: FinetuneStudySettings,
    config: FinetuneConfig | None = None,
    *,
    held_out: Data = (),
    side: str | None = None,
    judge: Judge | None = None,
) -> tuple[Work, ...]:
    """What `finetune_study` would train on, and ask of the models and the judge; nothing runs."""
    config = config or FinetuneConfig()
    trained, seeds = treatments_of(settings.treatments, config, vectors), len(settings.seeds)
    _check(config, settings, vectors)
    data, held_out = conversations_of(data, side), conversations_of(held_out, side)
    training = [finetune_work(model, data, own.config, vectors=[vectors], held_out=held_out) for own in trained]
    subject = Subject.of(backend, vectors, None, judge, planned=True)
    post_hoc = settings.treatments.post_hoc
    steered = {} if post_hoc is None else {POST_HOC: Steering.parse(post_hoc, vectors)}
    plain, others = _measured_work(subject, {}, settings), 1 + seeds * (len(trained) - 1)
    return together(
        [
            *(work * seeds for own in training for work in own),
            *(work * others for work in plain),
            *(work * seeds for work in _measured_work(subject, steered, settings)),
        ]
    )


def _measured_work(
    subject: Subject, steered: Mapping[str, Steering], settings: FinetuneStudySettings
) -> Iterator[Work]:
    """What measuring one model asks, and each steering of it; all but the base model answer with an adapter on."""
    rollouts, *judging = arms_experiment(subject, steered, settings.asked).work()
    answering = [asked_projections_work(subject, settings.asked, [settings.layer]), rollouts]
    if settings.task is not None:
        for steering in (None, *steered.values()):
            edits = steering.edits() if steering else ()
            answering += capability_work(subject.backend, (settings.task,), edits=edits)
    yield from (replace(work, adapted=True) for work in answering)
    yield from judging


def _check(config: FinetuneConfig, settings: FinetuneStudySettings, vectors: PersonaVectors) -> None:
    """Refuse what would fail after hours of training."""
    vectors.vector(settings.layer)
    if config.weights == "full":
        raise FinetuningError("a study trains adapters, one after the other on the same model; take weights lora")
    if settings.task is not None:
        check_task(settings.task)
    if settings.treatments.post_hoc is not None:
        Steering.parse(settings.treatments.post_hoc, vectors)


def _opened(model: str, training: str, answering: str, device: str) -> tuple[Loaded, Loaded]:
    """The model that is trained, and the one that answers: the same, unless they differ in precision."""
    loaded = load(model, dtype=training, device=device)
    return loaded, loaded if answering == training else load(model, dtype=answering, device=device)


@dataclass(frozen=True)
class _Work:
    loaded: Loaded
    answering: Loaded
    transcripts: Sequence[Transcript]
    held_out: Sequence[Transcript]
    subject: Subject
    settings: FinetuneStudySettings
    run: RunFolder
    progress: Progress
    answers: list[Answers] = field(default_factory=list)
    shown: dict[str, list[ArmRow]] = field(default_factory=dict)  # the first replies of each

    def all(self, trained: Sequence[Treatment]) -> list[Outcome]:
        """Every outcome."""
        before, outcomes = self._measured(BASE, None, None, {}, {})
        vectors, post_hoc = self.subject.vectors, self.settings.treatments.post_hoc
        for seed, each in product(self.settings.seeds, trained):
            found = finetune(
                self.loaded,
                self.transcripts,
                self.run.path / "models" / _slug(each.name, seed),
                each.config.model_copy(update={"seed": seed}),
                vectors=[turned(vectors, seed) if each.name == RANDOM else vectors],
                held_out=self.held_out,
                chat=self.subject.chat,
                progress=self.progress,
            )
            steered = {}
            if each.name == PLAIN and post_hoc is not None:
                steered[POST_HOC] = Steering.parse(post_hoc, vectors)
            with adapter_on(self.answering.model, found.model):
                outcomes += self._measured(each.name, seed, before, found.summary["loss"], steered)[1]
        return outcomes

    def _measured(
        self,
        treatment: str,
        seed: int | None,
        before: Mapping[int, float] | None,
        losses: Mapping[str, float | None],
        steered: Mapping[str, Steering],
    ) -> tuple[dict[int, float], list[Outcome]]:
        """The model as it is now: its projections by question, its outcome, and that of each steering of it."""
        backend, name = wrap_model(self.answering.model, self.answering.tokenizer), _slug(treatment, seed)
        settings, layers = self.settings, [self.settings.layer]
        subject = replace(self.subject, backend=backend, judge=_unadapted(self.subject.judge, self.answering.model))
        found = asked_projections(subject, settings.asked, layers, self.run, f"{name}-")
        projections = dict(zip(settings.asked.questions, found[:, 0].tolist(), strict=True))
        moved = minus(projections, projections if before is None else before)
        answers = arms_experiment(subject, steered, settings.asked, f"{name}-").run(self.run, self.progress)
        self.answers.append(answers)
        rows, outcomes = answers.rows(ArmRow), []
        for arm, steering in {UNSTEERED: None, **steered}.items():
            own = [row for row in rows if row.arm == arm]
            quantity = "nll" if any(row.nll is not None for row in own) else "coherence"
            edits = steering.edits() if steering else ()
            right = right_answers(backend, settings.task, edits) if settings.task is not None else ()
            scores, measured = by_question(own, "score"), by_question(own, quantity)
            what, trained = (treatment, (moved, losses)) if steering is None else (arm, ({}, {}))
            outcomes.append(Outcome(what, seed, scores, measured, *trained, dict(enumerate(right))))
            self.shown.setdefault(what, own)
        return projections, outcomes


class _BaseJudge(LikelihoodJudge):
    """A judge whose model is the one that is finetuned: it reads with the adapter switched off."""

    def __init__(self, judge: LikelihoodJudge, model: Any) -> None:
        super().__init__(judge.backend, judge.chat, judge.trait, judge.calibration, batch_tokens=judge.batch_tokens)
        self._model = model

    def evidence(self, exchanges: Sequence[Exchange]) -> list[Evidence | None]:
        """See `persona_lens.judging.LikelihoodJudge.evidence`."""
        with _switched_off(self._model):
            return super().evidence(exchanges)


def _unadapted(judge: Judge, model: Any) -> Judge:
    return _BaseJudge(judge, model) if isinstance(judge, LikelihoodJudge) else judge


@contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _samples(trait: Trait, shown: Mapping[str, Sequence[ArmRow]], most: int = 3) -> list[dict[str, Any]]:
    numbers = sorted({row.question for rows in shown.values() for row in rows})[:most]
    return [
        {
            "question": trait.evaluation_questions[number],
            "responses": [
                {"name": name, "score": row.score, "text": row.text}
                for name, rows in shown.items()
                for row in [next(each for each in rows if each.question == number)]
            ],
        }
        for number in numbers
    ]


def _slug(treatment: str, seed: int | None) -> str:
    name = treatment.replace(",", "").replace(" ", "-")
    return name if seed is None else f"{name}-{seed}"

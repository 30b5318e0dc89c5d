"""`study`: plain finetuning, preventative steering and its baselines side by side, over seeds (method, section 6)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from persona_lens.analysis.capability import accuracy, check_task
from persona_lens.backend import Backend, wrap_model
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.data.transcripts import Transcript
from persona_lens.extraction.experiment import Answers, Subject, questions_of
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
    post_hoc_of,
    summarise,
    treatments_of,
    turned,
)
from persona_lens.finetuning.run import Data, conversations_of, finetune
from persona_lens.judging import Evidence, Exchange, Judge, LikelihoodJudge
from persona_lens.models import ChatFormat, Loaded, load
from persona_lens.models.source import adapter_on
from persona_lens.monitoring.scoring import kept_projections
from persona_lens.runs import RunFolder
from persona_lens.runs.answers import by_question
from persona_lens.steering import ArmRow, ArmSettings, Steering
from persona_lens.steering.comparison import UNSTEERED, arms_experiment
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


@dataclass(frozen=True)
class FinetuneStudy:
    """What a study found.

    Attributes:
        outcomes: Of every treatment and seed.
        summary: Every figure, as it stands in ``summary.json``.
    """

    outcomes: tuple[Outcome, ...]
    summary: Mapping[str, Any]


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
    _check(config, settings)
    trained = treatments_of(settings.treatments, config, vectors)
    transcripts, others = conversations_of(data, side), conversations_of(held_out, side)
    loaded, answering = _opened(model, config, settings.dtype, device)
    base = wrap_model(answering.model, answering.tokenizer)
    subject = Subject.of(base, vectors, None, judge, ChatFormat.from_tokenizer(loaded.tokenizer))
    vectors.vector(settings.layer)
    of_data = [fingerprint(each) if each else None for each in (transcripts, others)]
    training = config.model_dump(mode="json")
    with RunFolder(folder, subject.config("finetune study", settings, data=of_data, config=training)) as run:
        work = _Work(loaded, answering, transcripts, others, subject, settings, run, progress)
        outcomes, samples = work.all(trained)
        summary = {
            **work.named(),
            "names": {each.name: each.config.edits for each in trained} | {POST_HOC: settings.treatments.post_hoc},
            "settings": asdict(settings),
            "config": training,
            "judge": subject.judge_used(*work.answers),
            **summarise(outcomes),
            "samples": samples,
        }
        run.write_lines(OUTCOMES, map(asdict, outcomes))
        run.write_json("summary.json", summary)
    return FinetuneStudy(tuple(outcomes), json.loads(json.dumps(summary)))


def _check(config: FinetuneConfig, settings: FinetuneStudySettings) -> None:
    """Refuse what would fail after hours of training."""
    if config.weights == "full":
        raise FinetuningError("a study trains adapters, one after the other on the same model; take weights lora")
    if settings.task is not None:
        check_task(settings.task)


def _opened(model: str, config: FinetuneConfig, dtype: str, device: str) -> tuple[Loaded, Loaded]:
    """The model that is trained, and the one that answers: the same, unless they differ in precision."""
    loaded = load(model, dtype=config.dtype, device=device)
    return loaded, loaded if dtype == config.dtype else load(model, dtype=dtype, device=device)


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

    def named(self) -> dict[str, Any]:
        """What was studied, in words."""
        source = self.answering.source
        model = self._backend().info.model if source.kind == "hub" else source.id
        return {"trait": self.subject.trait.name, "model": model, "conversations": len(self.transcripts)}

    def all(self, trained: Sequence[Treatment]) -> tuple[list[Outcome], list[dict[str, Any]]]:
        """Every outcome, and first replies to the first questions."""
        base = self._backend()
        before = self._projections(base, BASE)
        rows = self._answers(base, BASE, {})
        outcomes = [self._outcome(BASE, None, rows[UNSTEERED], dict.fromkeys(before, 0.0), {}, base, ())]
        shown = {BASE: rows[UNSTEERED]}
        post_hoc = post_hoc_of(self.settings.treatments, self.subject.vectors)
        for seed in self.settings.seeds:
            for each in trained:
                losses, place = self._train(each, seed)
                with self._adapted(place) as backend:
                    after = self._projections(backend, f"{_slug(each.name)}-{seed}")
                    moved = {q: after[q] - before[q] for q in before}
                    steered = {POST_HOC: post_hoc} if each.name == PLAIN and post_hoc else {}
                    rows = self._answers(backend, f"{_slug(each.name)}-{seed}", steered)
                    outcomes.append(self._outcome(each.name, seed, rows[UNSTEERED], moved, losses, backend, ()))
                    shown.setdefault(each.name, rows[UNSTEERED])
                    for name, steering in steered.items():
                        edits = steering.edits()
                        outcomes.append(self._outcome(name, seed, rows[name], {}, {}, backend, edits))
                        shown.setdefault(name, rows[name])
        return outcomes, _samples(self.subject.trait, shown)

    def _train(self, treatment: Treatment, seed: int) -> tuple[Mapping[str, float | None], Path]:
        chosen = turned(treatment, seed) if treatment.name == RANDOM else treatment
        found = finetune(
            self.loaded,
            self.transcripts,
            self.run.path / "models" / f"{_slug(treatment.name)}-{seed}",
            chosen.at(seed),
            vectors=[chosen.vectors],
            held_out=self.held_out,
            chat=self.subject.chat,
            progress=self.progress,
        )
        return found.summary["loss"], found.folder

    def _backend(self) -> Backend:
        return wrap_model(self.answering.model, self.answering.tokenizer)

    @contextmanager
    def _adapted(self, place: Path) -> Iterator[Backend]:
        with adapter_on(self.answering.model, place):
            yield self._backend()

    def _projections(self, backend: Backend, name: str) -> dict[int, float]:
        """Of each question its last prompt token's projection at the layer."""
        questions = questions_of(self.subject.trait, self.settings.asked.questions, "evaluation", FinetuningError)
        texts = list(questions.values())
        prompts = [self.subject.chat.encode(None, text) for text in texts]
        found = kept_projections(
            backend, prompts, self.subject.vectors, [self.settings.layer], texts, self.run, f"{name}-"
        )
        return dict(zip(questions, found[:, 0].tolist(), strict=True))

    def _answers(self, backend: Backend, name: str, steered: Mapping[str, Steering]) -> dict[str, list[ArmRow]]:
        """Replies by what they were given under, judged by the base model."""
        judge = _unadapted(self.subject.judge, self.answering.model)
        subject = replace(self.subject, backend=backend, judge=judge)
        answers = arms_experiment(subject, steered, self.settings.asked, f"{name}-").run(self.run, self.progress)
        self.answers.append(answers)
        rows = answers.rows(ArmRow)
        return {arm: [row for row in rows if row.arm == arm] for arm in (UNSTEERED, *steered)}

    def _outcome(
        self,
        name: str,
        seed: int | None,
        rows: Sequence[ArmRow],
        moved: Mapping[int, float],
        losses: Mapping[str, float | None],
        backend: Backend,
        edits: Sequence[Any],
    ) -> Outcome:
        quantity = "surprise" if any(row.surprise is not None for row in rows) else "coherence"
        task = self.settings.task
        return Outcome(
            name,
            seed,
            by_question(rows, "score"),
            by_question(rows, quantity),
            moved,
            losses,
            accuracy(backend, task, edits).mean if task is not None else None,
        )


class _BaseJudge(LikelihoodJudge):
    """A judge whose model is the one that is finetuned: it weighs with the adapter switched off."""

    def __init__(self, judge: LikelihoodJudge, model: Any) -> None:
        super().__init__(judge.backend, judge.chat, judge.trait, judge.calibration, batch_tokens=judge.batch_tokens)
        self._model = model

    def weigh(self, exchanges: Sequence[Exchange]) -> list[Evidence | None]:
        """See `persona_lens.judging.LikelihoodJudge.weigh`."""
        with _switched_off(self._model):
            return super().weigh(exchanges)


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


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")

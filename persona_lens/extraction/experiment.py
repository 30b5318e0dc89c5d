"""`Experiment`: what a model is asked, under which edits, what is read on the way, and who judges what comes.

A sweep, a comparison, tuning, a study of prompts: each says in its own module what its requests, its edits and its
figures are. How it is configured, what it would cost, how it runs and what its rows are is said here, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

from persona_lens.backend import Backend, Read
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import SCORES, Ends, Estimate, bootstrap_mean
from persona_lens.judging import Judge, Judgement, LikelihoodJudge
from persona_lens.judging.recording import (
    as_used,
    exchange_of,
    judge_rollouts,
    judging_work,
    longest_exchanges,
    prepare_judge,
)
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format, note_reasoning
from persona_lens.runs import RunFolder, file_prefix
from persona_lens.runs.cost import Work
from persona_lens.runs.rollouts import (
    EditsFor,
    ReadRollouts,
    Request,
    Rollout,
    RolloutBatches,
    Rollouts,
    Texts,
    row_seed,
)
from persona_lens.runs.settings import RolloutSettings, settings_json
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors

LIBRARIES = ("persona-lens", "torch", "transformers")
HOLD_REASONING = "responses_hold_reasoning"  # means over a response take it in, judges do not see it
QuestionSet = Literal["evaluation", "extraction"]
Row = TypeVar("Row", bound="Answer")
ONLY = ""


# What is asked


@dataclass(frozen=True)
class Variant:
    """One way in which every question is asked.

    Attributes:
        labels: What tells it from the others, as its rows carry it.
        system: System prompt, or None for none.
        examples: Questions and answers that stand before the question.
    """

    labels: Mapping[str, Any]
    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()


def questions_of(
    trait: Trait, asked: int | Sequence[int], question_set: QuestionSet, failed: type[PersonaLensError]
) -> dict[int, str]:
    """A trait's questions by number, from 0.

    Args:
        trait: Whose.
        asked: How many of the first, or which.
        question_set: ``evaluation`` (held out) or ``extraction``.
        failed: Raised if the trait has fewer.
    """
    there = trait.evaluation_questions if question_set == "evaluation" else trait.extraction_questions
    numbers = range(asked) if isinstance(asked, int) else asked
    if (wanted := max(numbers) + 1) > len(there):
        raise failed(f"{wanted} questions asked for, trait {trait.name} has {len(there)} for {question_set}")
    return {number: there[number] for number in numbers}


def requests_of(
    questions: Mapping[int, str], variants: Sequence[Variant], samples: int, seed: int, *purpose: object
) -> list[Request]:
    """One request for each question, sample and variant, whose rows share their seeds.

    Args:
        questions: By number.
        variants: What only differs between rows of one seed.
        samples: Responses for each question and variant.
        seed: Base of the seeds.
        purpose: Requests for another purpose have other seeds.
    """
    return [
        Request(
            variant.system,
            question,
            row_seed(seed, *purpose, number, sample),
            {**variant.labels, "question_number": number, "sample": sample},
            variant.examples,
        )
        for number, question in questions.items()
        for sample in range(samples)
        for variant in variants
    ]


# What comes


@dataclass(frozen=True)
class Answer:
    """One response to one of a trait's questions, with its judgement; an experiment adds the labels of its variants.

    Attributes:
        question: Number of the question.
        sample: Number of the sample.
        score: Trait score, 0 to 100; None if the response has none.
        nll: -log p under the model without edits and system prompt, nats a token; None if the response is empty,
            or from a judge that does not compute it.
        coherence: 0 to 100; None from a judge that does not ask.
        text: The response.
    """

    question: int
    sample: int
    score: float | None
    nll: float | None
    coherence: float | None
    text: str

    def to_row(self) -> dict[str, Any]:
        """The answer as JSON values, its labels first."""
        values, own = asdict(self), Answer.__dataclass_fields__
        return {name: values[name] for name in sorted(values, key=lambda name: name in own)}


Value = tuple[int, float | None]
"""Number of a question, and what was measured of one response to it; None where there is nothing to measure."""


def averaged(values: Iterable[Value]) -> dict[int, float]:
    """The mean for each question; questions without a value are left out."""
    found: dict[int, list[float]] = {}
    for question, value in values:
        if value is not None:
            found.setdefault(question, []).append(value)
    return {question: fmean(each) for question, each in sorted(found.items())}


def values_of(rows: Iterable[Answer], quantity: str) -> list[Value]:
    """The ``score``, ``nll`` or ``coherence`` of each row, with the number of its question."""
    return [(row.question, getattr(row, quantity)) for row in rows]


def estimated(values: Mapping[int, float], within: Ends | None = None) -> Estimate | None:
    """The mean over questions, whose ends may be known; None without any value."""
    return bootstrap_mean(list(values.values()), within=within) if values else None


def by_question(rows: Iterable[Answer], quantity: str) -> dict[int, float]:
    """Mean of ``score``, ``nll`` or ``coherence`` for each question; questions without a value are left out."""
    return averaged(values_of(rows, quantity))


def mean_of(rows: Iterable[Answer], quantity: str) -> Estimate | None:
    """Mean of ``score``, ``nll`` or ``coherence`` over questions; None without any value."""
    return estimated(by_question(rows, quantity), None if quantity == "nll" else SCORES)


def json_of(estimate: Any) -> Any:
    """What has values by name, as JSON; None stays None."""
    return None if estimate is None else estimate.to_json()


@dataclass(frozen=True)
class Answers:
    """What an experiment's run yields.

    Attributes:
        collected: The rollouts with what was read.
        rollouts: Every response.
        judged: By judge the judgement of each.
    """

    collected: RolloutBatches
    rollouts: list[Rollout]
    judged: Mapping[str, list[Judgement]]

    @property
    def judgements(self) -> list[Judgement]:
        """The judgement of each response by the only judge."""
        return self.judged[ONLY]

    def rows(self, kind: type[Row]) -> list[Row]:
        """Every response as a row of this kind, whose fields besides those of `Answer` are labels of the requests."""
        return [
            kind(
                question=rollout.request.labels["question_number"],
                score=judgement.trait.value,
                nll=judgement.nll,
                coherence=judgement.coherence.value if judgement.coherence else None,
                text=rollout.response,
                **{name: label for name, label in rollout.request.labels.items() if name != "question_number"},
            )
            for rollout, judgement in zip(self.rollouts, self.judgements, strict=True)
        ]


# The experiment


@dataclass(frozen=True)
class Experiment:
    """Requests to a model and what becomes of them.

    Attributes:
        backend: The model.
        chat: Its chat format.
        requests: What is asked.
        settings: How responses are made.
        judges: Who scores them, by name; a judge that is the `ONLY` one needs none.
        edits_for: Edits of a batch, given its requests.
        reads: What is read while the model writes.
        prefix: What the names of its files begin with.
        given: Responses that are there, to be read instead of made.
    """

    backend: Backend
    chat: ChatFormat
    requests: Sequence[Request]
    settings: RolloutSettings
    judges: Mapping[str, Judge]
    edits_for: EditsFor | None = None
    reads: Sequence[Read] = ()
    prefix: str = ""
    given: Texts | None = None

    def rollouts(self, folder: RunFolder | None = None) -> Rollouts | ReadRollouts:
        """The responses, to be made or to be read.

        Raises:
            ContextError: If a prompt and its response would not fit the model.
        """
        where: dict[str, Any] = {"folder": folder, "reads": self.reads, "prefix": self.prefix}
        if self.given is None:
            edits_for = self.edits_for
            return Rollouts(self.backend, self.chat, self.requests, self.settings, edits_for=edits_for, **where)
        note_reasoning(self.chat)
        return ReadRollouts(self.backend, self.given, self.settings, **where)

    def work(self) -> tuple[Work, ...]:
        """What a run would ask of the model, and of the judges'; nothing runs."""
        collected = self.rollouts()
        if isinstance(collected, ReadRollouts):
            exchanges = [exchange_of(each, self.chat) for each in collected.given.rollouts]
        else:
            exchanges = longest_exchanges(collected)
        judging = [
            replace(work, label=f"{work.label} {name}".strip())
            for name, judge in self.judges.items()
            for work in judging_work(judge, exchanges)
        ]
        return collected.work(), *judging

    def run(self, folder: RunFolder | None = None, progress: Progress = shown_progress) -> Answers:
        """Make and judge what is not in the folder yet; without one, everything stays in memory."""
        collected = self.rollouts(folder)
        prefixes = {name: self.prefix + (file_prefix(i, name) if name else "") for i, name in enumerate(self.judges)}
        for name, judge in self.judges.items():
            prepare_judge(judge, folder, prefixes[name], collected)
        rollouts = collected.run(progress)
        judged = {
            name: judge_rollouts(judge, rollouts, self.chat, folder, prefix=prefixes[name], progress=progress)
            for name, judge in self.judges.items()
        }
        return Answers(collected, rollouts, judged)


@dataclass(frozen=True)
class Subject:
    """A model that is asked about a trait, the trait's vectors, and who scores what it says.

    Attributes:
        backend: The model.
        vectors: Of the trait.
        trait: The trait.
        chat: The model's chat format.
        judge: Who scores.
    """

    backend: Backend
    vectors: PersonaVectors
    trait: Trait
    chat: ChatFormat
    judge: Judge

    @staticmethod
    def of(
        backend: Backend,
        vectors: PersonaVectors,
        trait: str | Trait | None = None,
        judge: Judge | None = None,
        chat: ChatFormat | None = None,
        *,
        allow_other_model: bool | None = None,
        planned: bool = False,
    ) -> Subject:
        """The subject, with what is not given found.

        Args:
            backend: The model.
            vectors: Of the trait, with the calibration of their judge.
            trait: The trait, if it is not the one stored with the vectors.
            judge: By default the same model, unsteered, by likelihood, as it was calibrated for the vectors.
            chat: The model's own by default.
            allow_other_model: Take vectors of another model; None where that cannot be allowed.
            planned: Only find out what would be asked: neither the model nor a calibration is needed.

        Raises:
            VectorsError: If the vectors belong to another model, or carry no trait or no calibration.
        """
        if not (allow_other_model or planned):
            vectors.check_model(backend, allowable=allow_other_model is not None)
        chosen, chat = vectors.trait_for(trait), chat or chat_format(backend)
        if judge is None:
            calibration = None if planned and not vectors.judge.get("calibration") else vectors.calibration
            judge = LikelihoodJudge(backend, chat, chosen, calibration)
        return Subject(backend, vectors, chosen, chat, judge)

    def experiment(
        self,
        requests: Sequence[Request],
        settings: RolloutSettings,
        prefix: str,
        edits_for: EditsFor | None = None,
        reads: Sequence[Read] = (),
    ) -> Experiment:
        """An experiment on this subject; arguments as for `Experiment`."""
        judges = {ONLY: self.judge}
        return Experiment(self.backend, self.chat, requests, settings, judges, edits_for, reads, prefix)

    def config(self, kind: str, settings: Any, **own: Any) -> dict[str, Any]:
        """Everything that determines a run's result, as JSON values.

        Args:
            kind: What kind of run it is.
            settings: Its settings, a dataclass.
            own: What else this kind has.
        """
        return {"kind": kind, "settings": settings_json(settings), **own, **self.describe()}

    def describe(self) -> dict[str, Any]:
        """Who is asked about what, as JSON values."""
        return {
            "vectors": self.vectors.content_hash,
            "judge": self.judge.describe(),
            **subject_config(self.backend, self.trait, self.chat),
        }

    def judge_used(self, *answers: Answers) -> dict[str, Any]:
        """The judge's description, with how it found the scores of these answers."""
        return as_used(self.judge.describe(), (found for each in answers for found in each.judgements))


def subject_config(backend: Backend, trait: Trait, chat: ChatFormat) -> dict[str, Any]:
    """The part of a run's configuration that says which model is asked, in what form, about which trait."""
    return {
        **model_config(backend, chat),
        # Neither vectors nor scores depend on the graded prompts; a study names those that it uses.
        "trait": {"content_hash": trait.content_hash(), **trait.model_dump(mode="json", exclude={"graded_prompts"})},
    }


def model_config(backend: Backend, chat: ChatFormat) -> dict[str, Any]:
    """The part of a run's configuration that says which model is asked, and in what form."""
    described: dict[str, Any] = {"digest": chat.digest, "system_role": chat.system_role, "thinking": chat.thinking}
    if chat.reasons:
        described[HOLD_REASONING] = True
    return {
        "model": asdict(backend.info),
        "chat": described,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def run_folder(folder: Path | str | None, config: Mapping[str, Any]) -> AbstractContextManager[RunFolder | None]:
    """The run folder, to be held; None, which keeps everything in memory, stays None."""
    return nullcontext() if folder is None else RunFolder(folder, config)

"""`Bench`: how far arms still play roles, and what they cost: surprise of ordinary replies, and right answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.capability import BUILTIN_TASK, check_task, evaluate_capability
from persona_lens.analysis.weighing import Passage, Weighing
from persona_lens.backend import Backend, Edit
from persona_lens.core.progress import Progress
from persona_lens.extraction.axis import FULLY, axis_judges, gives_grades
from persona_lens.extraction.experiment import Experiment, Variant, model_config, requests_of
from persona_lens.judging import Judge, Judgement
from persona_lens.judging.recording import as_used, judge_rollouts, prepare_judge
from persona_lens.models import ChatFormat
from persona_lens.runs import RunFolder, file_prefix
from persona_lens.runs.chunks import Pieces, Row
from persona_lens.runs.rollouts import Request, Rollout
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits.role import N_SYSTEM_PROMPTS, DefaultAssistant, Role
from persona_lens.vectors.persona_space import ASSISTANT

UNCAPPED = "uncapped"
SEARCH, CONFIRM = "search-", "confirm-"  # begin the names of their files


@dataclass(frozen=True)
class CapSettings:
    """What is tried, and how the choice is confirmed.

    Attributes:
        percentiles: Of the model's own responses, as in `persona_lens.steering.parse_terms`.
        ranges: First and last layers of the ranges tried; None for an eighth and a quarter of the layers from half of
            the depth on.
        roles: Roles whose prompts are used, those farthest from the default; every other one is kept for the
            confirmation.
        search_questions: Questions that roles are asked in the search.
        confirm_questions: Other questions that they are asked, which the result rests on.
        ordinary_questions: Questions that are asked without a role, for the surprise, and as many others in the
            confirmation.
        random_directions: How many random directions stand beside the choice, at the same percentile of their own.
        accept_loss: Share of right answers that a cap may cost.
        accept_surprise: Nats a token by which ordinary replies may surprise the uncapped model more.
        task: The capability task, of lm-evaluation-harness, whose metric is ``acc``.
        limit: Samples of it; None takes all.
        seed: Base of every row's seed and of the random directions.
        rollouts: How responses are made.
    """

    percentiles: tuple[float, ...] = (10.0, 25.0, 50.0)
    ranges: tuple[tuple[int, int], ...] | None = None
    roles: int = 16
    search_questions: int = 3
    confirm_questions: int = 5
    ordinary_questions: int = 12
    random_directions: int = 3
    accept_loss: float = 0.02
    accept_surprise: float = 0.1
    task: str = BUILTIN_TASK
    limit: int | None = None
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if not self.percentiles or not all(0 <= each <= 100 for each in self.percentiles):
            raise AnalysisError(f"percentiles are from 0 to 100, at least one: got {list(self.percentiles)}")
        if self.ranges is not None and not (self.ranges and all(0 <= a <= b for a, b in self.ranges)):
            raise AnalysisError(f"ranges are pairs of a first and a last layer, got {list(self.ranges)}")
        if self.roles < 4:
            raise AnalysisError(f"roles must be at least 4, half of them for the confirmation; got {self.roles}")
        if (
            min(self.search_questions, self.confirm_questions, self.ordinary_questions) < 1
            or self.random_directions < 0
        ):
            raise AnalysisError("questions must be at least 1, random_directions at least 0")
        if min(self.accept_loss, self.accept_surprise) < 0:
            raise AnalysisError("accept_loss and accept_surprise must be at least 0")


@dataclass(frozen=True)
class Arm:
    """One way in which the prompts are answered.

    Attributes:
        name: Its name.
        edits: What is written.
    """

    name: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Measured:
    """What one arm comes to.

    Attributes:
        persona: By role: how far replies to its prompts play it, 0 to 100.
        surprise: By question: how much ordinary replies surprise the uncapped model, nats a token.
        accuracy: By sample of the capability task: 1 for a right answer.
    """

    persona: Mapping[int, float]
    surprise: Mapping[int, float]
    accuracy: Mapping[int, float]


class Bench:
    """Lets arms answer, and measures them.

    Args:
        backend: The model.
        chat: Its chat format.
        settings: What is asked.
        roles: Whose prompts are used, in their order.
        default: Gives the questions.
        judges: By role; None is as `persona_lens.extraction.axis.axis_judges` has it.

    Raises:
        AnalysisError: If there are fewer questions than are asked for, or the capability task cannot be had.
    """

    def __init__(
        self,
        backend: Backend,
        chat: ChatFormat,
        settings: CapSettings,
        roles: Mapping[str, Role],
        default: DefaultAssistant,
        judges: Mapping[str, Judge] | None = None,
    ) -> None:
        self.backend, self.chat, self.settings = backend, chat, settings
        self.roles, self.default = roles, default
        self.judges = axis_judges(backend, chat, list(roles.values()), default, given=judges)
        self.rows: list[dict[str, Any]] = []
        self.judged: list[Any] = []
        self.samples: list[dict[str, Any]] = []
        self.questions, self.ordinary = _questions_of(settings, len(default.questions))
        check_task(settings.task)

    def describe(self) -> dict[str, Any]:
        """Who is asked what, and who judges, as JSON values."""
        return {
            "roles": {name: role.content_hash() for name, role in self.roles.items()},
            "default": self.default.content_hash(),
            "judges": {name: judge.describe() for name, judge in self.judges.items()},
            **model_config(self.backend, self.chat),
        }

    def prepare(self, run: RunFolder | None) -> None:
        """Let the judges find out whether they can work; see `prepare_judge`."""
        for number, (name, judge) in enumerate(self.judges.items()):
            prepare_judge(judge, run, SEARCH + file_prefix(number, name))

    @property
    def judge_used(self) -> dict[str, Any]:
        """The first judge, and how scores were found; the others are alike."""
        return as_used(next(iter(self.judges.values())).describe(), self.judged)

    def requests(self, prefix: str) -> list[Request]:
        """What is asked in the search, or in the confirmation: the prompts of its roles, and none for the default."""
        names, default = list(self.roles)[prefix == CONFIRM :: 2], Variant({"role": ASSISTANT})
        variants = {number: [default] for number in self.ordinary[prefix]}
        for number in self.questions[prefix]:
            prompts = {name: self.roles[name].system_prompts[number % N_SYSTEM_PROMPTS] for name in names}
            variants[number] = [Variant({"role": name}, prompt) for name, prompt in prompts.items()]
        return [
            request
            for number, asked in sorted(variants.items())
            for request in requests_of({number: self.default.questions[number]}, asked, 1, self.settings.seed, "cap")
        ]

    def measure(
        self, arms: Sequence[Arm], prefix: str, run: RunFolder | None, progress: Progress
    ) -> dict[str, Measured]:
        """What each arm comes to, by its name."""
        requests = self.requests(prefix)
        files = {arm.name: f"{prefix}{number:02d}-" for number, arm in enumerate(arms)}
        replies = {arm.name: self._replies(arm, requests, files[arm.name], run, progress) for arm in arms}
        persona = self._persona(replies, prefix, run, progress)
        self.samples += list(self._samples(replies, prefix))
        return {
            arm.name: Measured(
                persona[arm.name],
                self._surprise(replies[arm.name], files[arm.name], run, progress),
                self._accuracy(arm, files[arm.name], run, progress),
            )
            for arm in arms
        }

    def _replies(
        self, arm: Arm, requests: Sequence[Request], prefix: str, run: RunFolder | None, progress: Progress
    ) -> list[Rollout]:
        settings, edits = self.settings.rollouts, arm.edits
        asked = Experiment(self.backend, self.chat, requests, settings, {}, lambda _: edits, prefix=prefix)
        return asked.run(run, progress).rollouts

    def _persona(
        self, replies: Mapping[str, list[Rollout]], prefix: str, run: RunFolder | None, progress: Progress
    ) -> dict[str, dict[int, float]]:
        """By arm and number of the role: the mean score of its replies."""
        found: dict[str, dict[int, float]] = {name: {} for name in replies}
        for number, (role, judge) in enumerate(self.judges.items()):
            own = [(arm, each) for arm, those in replies.items() for each in those if _is_of(each, role)]
            if not own:
                continue
            name = prefix + file_prefix(number, role)
            judged = judge_rollouts(judge, [each for _, each in own], self.chat, run, prefix=name, progress=progress)
            self.judged += judged
            scores = [_points(judge, each) for each in judged]
            for (arm, each), score in zip(own, scores, strict=True):
                labels = {"part": prefix.rstrip("-"), "arm": arm, **each.request.labels}
                self.rows.append({**labels, "score": score, "text": each.response})
            for arm in replies:
                values = [score for (of, _), score in zip(own, scores, strict=True) if of == arm and score is not None]
                if values:
                    found[arm][number] = sum(values) / len(values)
        return found

    def _surprise(
        self, replies: Sequence[Rollout], prefix: str, run: RunFolder | None, progress: Progress
    ) -> dict[int, float]:
        """By question: nats a token of the default's replies in the uncapped model."""
        own = [each for each in replies if _is_of(each, ASSISTANT) and each.response_ids]
        prompts = [self.chat.encode(each.request.system, each.request.question) for each in own]
        passages = [Passage.behind(prompt, each.response_ids) for prompt, each in zip(prompts, own, strict=True)]
        purposes = [json.dumps([each.request.question, list(each.response_ids)]) for each in own]
        weighed = Weighing(self.backend, passages, purposes, f"{prefix}surprise").run(run, progress)
        return {
            each.request.labels["question_number"]: -logprob / len(each.response_ids)
            for each, (logprob,) in zip(own, weighed, strict=True)
        }

    def _accuracy(self, arm: Arm, prefix: str, run: RunFolder | None, progress: Progress) -> dict[int, float]:
        """By sample: whether the capability task's answer is right."""
        settings = self.settings

        def work(_: int) -> list[Row]:
            result = evaluate_capability(
                self.backend,
                (settings.task,),
                edits=arm.edits,
                limit=settings.limit,
                seed=settings.seed,
                progress=progress,
            )
            return [{"scores": list(result[settings.task].metric("acc").scores)}]

        pieces = Pieces(run, f"{prefix}capability.jsonl", [[0]], [arm.name], form=lambda row: list(row["scores"]))
        (row,) = pieces.run(work)
        return dict(enumerate(row["scores"]))

    def _samples(self, replies: Mapping[str, list[Rollout]], prefix: str) -> Iterator[dict[str, Any]]:
        """The first reply of the first three roles under each arm of the confirmation: not picked for what they say."""
        names = list(dict.fromkeys(each.request.labels["role"] for each in replies[UNCAPPED]))
        for role in names[:3] if prefix == CONFIRM else ():
            first = {
                arm: next(each for each in all_of if each.request.labels["role"] == role)
                for arm, all_of in replies.items()
            }
            yield {
                "role": role,
                "question": first[UNCAPPED].request.question,
                "system": first[UNCAPPED].request.system,
                "replies": [{"arm": arm, "text": each.response} for arm, each in first.items()],
            }


def _questions_of(settings: CapSettings, there: int) -> tuple[dict[str, range], dict[str, range]]:
    """Numbers of the questions that roles are asked, by part of the run, and of those asked without a role: all differ.

    Raises:
        AnalysisError: If there are fewer.
    """
    search, confirm, ordinary = settings.search_questions, settings.confirm_questions, settings.ordinary_questions
    ends = list(accumulate((search, confirm, ordinary, ordinary), initial=0))
    if ends[-1] > there:
        raise AnalysisError(
            f"{ends[-1]} questions are asked for, {2 * ordinary} of them without a role, and there are {there}; ask "
            "fewer"
        )
    parts = [range(*each) for each in pairwise(ends)]
    return dict(zip((SEARCH, CONFIRM), parts[:2], strict=True)), dict(zip((SEARCH, CONFIRM), parts[2:], strict=True))


def _is_of(reply: Rollout, role: str) -> bool:
    """Whether a reply is to a prompt of this role."""
    return bool(reply.request.labels["role"] == role)


def _points(judge: Judge, judgement: Judgement) -> float | None:
    """A judgement as a score of 0 to 100, whatever the judge gives."""
    value = judgement.trait.value
    return value if value is None or not gives_grades(judge) else min(100.0, 100 * value / FULLY)

"""The judge that needs no second model: is the response likelier under the trait's instruction or under its opposite?

A proxy, and to be reported as one: it measures how the subject model itself ties a response to the trait's
instructions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from persona_lens.backend import Backend, TokenBatch
from persona_lens.backend.batches import ContextError, context_length, forward_rows
from persona_lens.core.progress import Progress, no_progress
from persona_lens.judging.protocol import EMPTY, Exchange, Judgement, JudgingError, Score, finite
from persona_lens.runs.cost import Work, reading_work
from persona_lens.traits import Arm, Trait

if TYPE_CHECKING:
    from persona_lens.models import ChatFormat


@dataclass(frozen=True)
class Calibration:
    """Score = 100 / (1 + exp(-(slope * evidence + intercept))).

    Attributes:
        slope: Per unit of evidence; positive when more evidence means more of the trait.
        intercept: Log-odds at no evidence.
    """

    slope: float
    intercept: float

    def score(self, evidence: float) -> float:
        """The score of one piece of evidence, 0 to 100."""
        from scipy.special import expit  # slow to import; vectors carry a calibration that few ask for a score

        return 100 * float(expit(self.slope * evidence + self.intercept))

    def to_json(self) -> dict[str, float]:
        """The parameters by name."""
        return asdict(self)


def fit_calibration(evidence: Sequence[float], positive: Sequence[bool]) -> Calibration:
    """Fit the curve to responses from both arms, by Platt's method.

    Platt's targets stand a little inside 0 and 1, so that arms which do not overlap still have a finite fit.

    Args:
        evidence: One number a response.
        positive: Whether it was written under the trait's positive instruction.

    Raises:
        JudgingError: If an arm is empty, or the evidence tells nothing, or the wrong way round.
    """
    x, y = np.asarray(evidence, dtype=np.float64), np.asarray(positive, dtype=bool)
    n_positive, n_negative = int(y.sum()), int((~y).sum())
    if not n_positive or not n_negative:
        empty = "negative" if n_positive else "positive"
        raise JudgingError(f"there is no response of the {empty} arm to calibrate the likelihood judge on")
    if np.ptp(x) == 0:  # the deviation of equal numbers need not round to 0
        raise JudgingError("all responses have the same evidence; the likelihood judge cannot tell them apart")
    slope, intercept = fit_logistic(x, y)
    if slope <= 0:
        raise JudgingError(
            "responses of the positive arm show less of the trait than those of the negative arm: the model does not "
            "follow the trait's instructions, or the arms are swapped in the trait file"
        )
    return Calibration(slope, intercept)


def fit_logistic(x: NDArray[np.float64], y: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and intercept of the log-odds that ``y`` is true, by Platt's method; both values of it must be there.

    Args:
        x: One number a case, not all the same.
        y: Whether it was one.
    """
    from scipy.optimize import minimize  # slow to import

    n_true, n_false = int(y.sum()), int((~y).sum())
    mean, spread = x.mean(), x.std()
    z = (x - mean) / spread
    target = np.where(y, (n_true + 1) / (n_true + 2), 1 / (n_false + 2))

    def loss(parameters: np.ndarray) -> float:
        logits = parameters[0] * z + parameters[1]
        return float(np.mean(np.logaddexp(0, logits) - target * logits))

    slope, intercept = minimize(loss, np.zeros(2), method="BFGS").x
    # Rounded so that the last bits of the optimiser do not decide whether two runs agree.
    return round(float(slope / spread), 9), round(float(intercept - slope * mean / spread), 9)


PROXY = "likelihood (a proxy: the subject model's own preference between the trait's instructions)"


@dataclass(frozen=True)
class Evidence:
    """What the subject model says of one response.

    Attributes:
        preference: Mean over the instruction pairs of log p(response | positive) - log p(response | negative), per
            response token, in nats.
        surprise: -log p(response | no instruction) per response token, in nats; the log of its perplexity. It rises
            when steering makes text incoherent.
    """

    preference: float
    surprise: float

    def to_json(self) -> dict[str, float]:
        """The values by name."""
        return asdict(self)

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Evidence | None:
        """What a row of ``evidence.jsonl`` says; None where there was nothing to weigh.

        Raises:
            KeyError, TypeError, ValueError: If it is no such row.
        """
        if "reason" in row:
            return None
        return Evidence(finite(row["preference"]), finite(row["surprise"]))


class LikelihoodJudge:
    """Scores by the unsteered subject model's log-probabilities.

    Args:
        backend: The subject model; it runs without edits here.
        chat: Its chat format.
        trait: Gives the instruction pairs.
        calibration: Turns preference into 0-100, see `persona_lens.judging.fit_calibration`; needed to score, not to
            weigh.
        batch_tokens: Response tokens that run at once at most.
    """

    def __init__(
        self,
        backend: Backend,
        chat: ChatFormat,
        trait: Trait,
        calibration: Calibration | None = None,
        *,
        batch_tokens: int = 8192,
    ) -> None:
        self.backend = backend
        self.chat = chat
        self.trait = trait
        self.calibration = calibration
        self.batch_tokens = batch_tokens
        pairs = range(len(trait.instructions))
        self._systems: list[str | None] = [trait.system_prompt(arm, i) for arm in Arm for i in pairs]

    def describe(self) -> dict[str, Any]:
        """See `persona_lens.judging.Judge.describe`."""
        calibration = self.calibration.to_json() if self.calibration else None
        info = self.backend.info
        return {
            "judge": "likelihood",
            "note": PROXY,
            # Responses may be another model's than the one that weighs them; what it runs on makes no other scores.
            "model": {name: getattr(info, name) for name in ("model", "revision", "weights", "dtype")},
            "chat": self.chat.digest,
            "trait": self.trait.content_hash(),
            "calibration": calibration,
        }

    @property
    def pieces_at_once(self) -> int:
        """See `persona_lens.judging.Judge.pieces_at_once`."""
        return self.backend.calls_at_once

    def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        """Question by question: the responses to one follow the same prompts."""
        groups: dict[str, list[int]] = {}
        for index, exchange in enumerate(exchanges):
            groups.setdefault(exchange.question, []).append(index)
        return list(groups.values())

    def judge(self, exchanges: Sequence[Exchange], progress: Progress = no_progress) -> list[Judgement]:
        """See `persona_lens.judging.Judge.judge`.

        Raises:
            JudgingError: If the judge has no calibration.
        """
        reasons = [self._reason(exchange) for exchange in exchanges]
        weighed = iter(self.weigh([e for e, reason in zip(exchanges, reasons, strict=True) if reason is None]))
        judged = [
            self.judgement_of(next(weighed)) if reason is None else Judgement(Score(None, reason)) for reason in reasons
        ]
        progress(len(exchanges), len(exchanges), "judging")
        return judged

    def judgement_of(self, evidence: Evidence | None) -> Judgement:
        """The judgement that one piece of evidence leads to; None stands for an empty response.

        Raises:
            JudgingError: If the judge has no calibration.
        """
        if self.calibration is None:
            raise JudgingError(
                "the likelihood judge needs a calibration; take the one stored with the extracted vectors"
            )
        if evidence is None:
            return Judgement(Score(None, EMPTY))
        return Judgement(Score(self.calibration.score(evidence.preference)), surprise=evidence.surprise)

    def check_room(self, questions: Iterable[str], new: int) -> None:
        """Raise unless responses of so many tokens fit behind the longest prompt that they are weighed after.

        Raises:
            ContextError: Saying how long that is, and what the model takes.
        """
        limit = context_length(self.backend)
        if limit is None:
            return
        longest = max((len(prompt) for question in questions for prompt in self._prompts(question)), default=0)
        if longest + new > limit:
            raise ContextError(
                f"the likelihood judge reads responses behind the trait's instructions: {longest:,} tokens and up to "
                f"{new:,} of a response, but the model takes {limit:,} together; ask for fewer new tokens, or take "
                "another judge (--judge)"
            )

    def weigh(self, exchanges: Sequence[Exchange]) -> list[Evidence | None]:
        """The evidence of each response; None for an empty one."""
        answers = [self._ids(exchange) for exchange in exchanges]
        weighed: list[Evidence | None] = [None] * len(exchanges)
        for question, chosen in self._batches(exchanges, answers):
            evidence = self._weigh_question(question, [answers[i] for i in chosen])
            for index, found in zip(chosen, evidence, strict=True):
                weighed[index] = found
        return weighed

    def _reason(self, exchange: Exchange) -> str | None:
        """Why a response cannot be weighed behind the longest of its prompts."""
        limit, response = context_length(self.backend), len(self._ids(exchange))
        if limit is None or not response:
            return None
        longest = max(map(len, self._prompts(exchange.question))) + response
        return None if longest <= limit else f"the judge reads {longest:,} tokens, and the model takes {limit:,}"

    def _ids(self, exchange: Exchange) -> tuple[int, ...]:
        if exchange.response_ids is not None:
            return exchange.response_ids
        return tuple(self.chat.encode_answer(exchange.response))

    def _batches(
        self, exchanges: Sequence[Exchange], answers: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[str, list[int]]]:
        """Responses to the same question together, since they follow the same eleven prompts; empty ones left out."""
        present = (i for i, ids in enumerate(answers) if ids)
        order = sorted(present, key=lambda i: (exchanges[i].question, len(answers[i]), i))
        for question, group in groupby(order, key=lambda i: exchanges[i].question):
            batch: list[int] = []
            for index in group:
                tokens = (len(batch) + 1) * (len(self._systems) + 1) * len(answers[index])
                if batch and tokens > self.batch_tokens:
                    yield question, batch
                    batch = []
                batch.append(index)
            yield question, batch

    def work(self, exchanges: Sequence[Exchange]) -> Work:
        """See `persona_lens.judging.PlannedJudge.work`."""
        return reading_work("judging", self.backend, self.passes(exchanges), logprobs=True)

    def passes(self, exchanges: Sequence[Exchange]) -> Iterator[TokenBatch]:
        """What `weigh` runs the model over."""
        answers = [self._ids(exchange) for exchange in exchanges]
        for question, chosen in self._batches(exchanges, answers):
            yield self._tokens(question, [answers[i] for i in chosen])

    def _tokens(self, question: str, answers: Sequence[tuple[int, ...]]) -> TokenBatch:
        prompts = self._prompts(question)
        return TokenBatch.of([prompt for prompt in prompts for _ in answers], [ids for _ in prompts for ids in answers])

    def _prompts(self, question: str) -> list[list[int]]:
        return [self.chat.encode(system, question) for system in (*self._systems, None)]

    def _weigh_question(self, question: str, answers: Sequence[tuple[int, ...]]) -> Iterator[Evidence]:
        result = forward_rows(self.backend, self._tokens(question, answers), logprobs=True)
        means = [float(values.mean()) for values in result.logprobs or ()]
        pairs = len(self.trait.instructions)
        for index in range(len(answers)):
            column = means[index :: len(answers)]
            positive, negative = sum(column[:pairs]) / pairs, sum(column[pairs : 2 * pairs]) / pairs
            yield Evidence(preference=positive - negative, surprise=-column[-1])

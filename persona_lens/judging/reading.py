"""Judges that read responses with a model in a backend.

`LikelihoodJudge` needs no second model: is the response likelier under the trait's instruction or under its opposite?
A proxy, and to be reported as one: it measures how the subject model itself ties a response to the trait's
instructions. `LocalJudge` is any chat model that reads a rubric: the expectation over the digits of its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from persona_lens.backend import Backend, TokenBatch
from persona_lens.backend.batches import ContextError, batches_by_length, context_length, forward_rows
from persona_lens.core.documents import Record
from persona_lens.core.progress import Progress, no_progress
from persona_lens.judging.llm import COHERENCE, fill_rubric
from persona_lens.judging.protocol import (
    EMPTY,
    Exchange,
    Judged,
    Judgement,
    JudgingError,
    NumberTokens,
    Score,
    expected_number,
)
from persona_lens.models.reasoning import closed
from persona_lens.runs.cost import Work, reading_work
from persona_lens.traits import Arm

if TYPE_CHECKING:
    from torch import Tensor

    from persona_lens.models import ChatFormat

TOGETHER = 16  # exchanges; their rubrics begin alike, and that beginning is computed once
MAX_TOKENS = 8192  # of a prompt, where nothing says what the model takes
PAIRS = 2  # of the trait's five; docs/judging.md has what others, and more of them, bring


@dataclass(frozen=True)
class Calibration(Record):
    """Score = 100 / (1 + exp(-(slope * evidence + intercept))).

    Attributes:
        slope: Per unit of evidence; positive when more evidence means more of the trait.
        intercept: Log-odds at no evidence.
        pairs: Of how many instruction pairs the evidence is the mean; None for all that the trait has.
    """

    slope: float
    intercept: float
    pairs: int | None = None

    def score(self, evidence: float) -> float:
        """The score of one piece of evidence, 0 to 100."""
        from scipy.special import expit  # slow to import; vectors carry a calibration that few ask for a score

        return 100 * float(expit(self.slope * evidence + self.intercept))


def fit_calibration(evidence: Sequence[float], positive: Sequence[bool], pairs: int | None = None) -> Calibration:
    """Fit the curve to responses from both arms, by Platt's method.

    Platt's targets stand a little inside 0 and 1, so that arms which do not overlap still have a finite fit.

    Args:
        evidence: One number a response.
        positive: Whether it was written under the trait's positive instruction.
        pairs: See `Calibration`.

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
    return Calibration(slope, intercept, pairs)


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


@dataclass(frozen=True)
class Evidence(Record):
    """What the subject model says of one response.

    Attributes:
        log_odds: Mean over instruction pairs of log p(response | positive) - log p(response | negative), per
            response token, in nats.
        nll: -log p(response | no instruction) per response token, in nats; the log of its perplexity. It rises
            when steering makes text incoherent.
    """

    log_odds: float
    nll: float


class ReadingJudge:
    """What judges have in common that read exchanges with a model.

    Args:
        backend: The model; it runs without edits here.
        chat: Its chat format.
        trait: What is judged.
    """

    def __init__(self, backend: Backend, chat: ChatFormat, trait: Judged) -> None:
        self.backend = backend
        self.chat = chat
        self.trait = trait

    @property
    def concurrency(self) -> int:
        """See `persona_lens.judging.Judge.concurrency`."""
        return self.backend.calls_at_once

    def work(self, exchanges: Sequence[Exchange]) -> Work:
        """See `persona_lens.judging.Judge`."""
        return reading_work("judging", self.backend, self.passes(exchanges), logprobs=True)

    def passes(self, exchanges: Sequence[Exchange]) -> Iterator[TokenBatch]:
        """What the model runs over."""
        raise NotImplementedError

    def _logprobs(self, tokens: TokenBatch) -> list[Tensor]:
        """The log-probabilities of each row's response, in nats."""
        return list(forward_rows(self.backend, tokens, logprobs=True).logprobs or ())


class LikelihoodJudge(ReadingJudge):
    """Scores by the unsteered subject model's log-probabilities.

    Args:
        backend: The subject model; it runs without edits here.
        chat: Its chat format.
        trait: Gives the instruction pairs.
        calibration: Turns log-odds into 0-100, see `persona_lens.judging.fit_calibration`; needed to score, not
            for the evidence.
        pairs: How many instruction pairs are compared, spread over the trait's list; a calibration says it itself.
        batch_tokens: Response tokens that run at once at most.

    Raises:
        JudgingError: If the trait has fewer pairs.
    """

    def __init__(
        self,
        backend: Backend,
        chat: ChatFormat,
        trait: Judged,
        calibration: Calibration | None = None,
        *,
        pairs: int = PAIRS,
        batch_tokens: int = 8192,
    ) -> None:
        super().__init__(backend, chat, trait)
        self.calibration = calibration
        self.batch_tokens = batch_tokens
        available = len(trait.instructions)
        self.pairs = pairs if calibration is None else calibration.pairs or available
        if not 1 <= self.pairs <= available:
            raise JudgingError(f"{trait.name} has {available} instruction pairs; {self.pairs} are asked for")
        self.compared = [number * (available - 1) // max(1, self.pairs - 1) for number in range(self.pairs)]
        self._systems: list[str | None] = [trait.system_prompt(arm, i) for arm in Arm for i in self.compared]

    def describe(self) -> dict[str, Any]:
        """See `persona_lens.judging.Judge.describe`."""
        return {
            "judge": "likelihood",
            "note": "likelihood (a proxy: the subject model's own preference between the trait's instructions)",
            # Responses may be another model's than the one that reads them; what it runs on makes no other scores.
            "model": {name: getattr(self.backend.info, name) for name in ("model", "revision", "weights", "dtype")},
            "chat": self.chat.digest,
            "trait": self.trait.content_hash(),
            "pairs": self.pairs,
            "calibration": self.calibration.to_json() if self.calibration else None,
        }

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
        evidence = iter(self.evidence([e for e, reason in zip(exchanges, reasons, strict=True) if reason is None]))
        judged = [
            self.judgement_of(next(evidence)) if reason is None else Judgement(Score(None, reason))
            for reason in reasons
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
        return Judgement(Score(self.calibration.score(evidence.log_odds)), nll=evidence.nll)

    def check_room(self, questions: Iterable[str], new: int) -> None:
        """Raise unless responses of so many tokens fit behind the longest prompt that they are read behind.

        Raises:
            ContextError: Saying how long that is, and what the model takes.
        """
        if (limit := context_length(self.backend)) is None:
            return
        longest = max(map(self._longest_prompt, questions), default=0)
        if longest + new > limit:
            raise ContextError(
                f"the likelihood judge reads responses behind the trait's instructions: {longest:,} tokens and up to "
                f"{new:,} of a response, but the model takes {limit:,} together; ask for fewer new tokens, or take "
                "another judge (--judge)"
            )

    def evidence(self, exchanges: Sequence[Exchange]) -> list[Evidence | None]:
        """The evidence of each response; None for an empty one."""
        found: list[Evidence | None] = [None] * len(exchanges)
        for chosen, tokens in self._batches(exchanges):
            means = [float(values.mean()) for values in self._logprobs(tokens)]
            for place, index in enumerate(chosen):
                column = means[place :: len(chosen)]
                positive, negative = sum(column[: self.pairs]), sum(column[self.pairs : -1])
                found[index] = Evidence(log_odds=(positive - negative) / self.pairs, nll=-column[-1])
        return found

    def _reason(self, exchange: Exchange) -> str | None:
        """Why a response cannot be read behind the longest of its prompts."""
        limit, response = context_length(self.backend), len(self._ids(exchange))
        if limit is None or not response:
            return None
        longest = self._longest_prompt(exchange.question) + response
        return None if longest <= limit else f"the judge reads {longest:,} tokens, and the model takes {limit:,}"

    def _ids(self, exchange: Exchange) -> tuple[int, ...]:
        if exchange.response_ids is not None:
            return exchange.response_ids
        return tuple(self.chat.encode_answer(exchange.response))

    def _batches(self, exchanges: Sequence[Exchange]) -> Iterator[tuple[list[int], TokenBatch]]:
        """Responses to one question together, each behind all of its prompts in turn; empty ones are left out."""
        answers = [self._ids(exchange) for exchange in exchanges]
        for piece in self.pieces(exchanges):
            prompts, present = self._prompts(exchanges[piece[0]].question), [i for i in piece if answers[i]]
            lengths = [len(prompts) * len(answers[i]) for i in present]
            for places in batches_by_length(lengths, len(present), self.batch_tokens):
                batch = [present[place] for place in places]
                rows = [(prompt, answers[i]) for prompt in prompts for i in batch]
                yield batch, TokenBatch.of([prompt for prompt, _ in rows], [ids for _, ids in rows])

    def passes(self, exchanges: Sequence[Exchange]) -> Iterator[TokenBatch]:
        """See `ReadingJudge.passes`."""
        return (tokens for _, tokens in self._batches(exchanges))

    def _longest_prompt(self, question: str) -> int:
        return max(map(len, self._prompts(question)))

    def _prompts(self, question: str) -> list[list[int]]:
        return [closed(self.chat.parts, self.chat.encode(system, question)) for system in (*self._systems, None)]


class LocalJudge(ReadingJudge):
    """Scores by the probabilities that a model gives to every number from 0 to 100.

    Args:
        backend: The judging model; it runs without edits.
        chat: Its chat format.
        trait: Gives the rubric.
        coherence: Whether to ask for coherence too.
        prefill: Words that the judge's answer begins with, such as ``Score: ``. Small models need them to come to the
            number; but then they cannot refuse.
        max_tokens: There is no score behind a prompt of more, or of more than the model takes, else `MAX_TOKENS`.
    """

    def __init__(
        self,
        backend: Backend,
        chat: ChatFormat,
        trait: Judged,
        *,
        coherence: bool = True,
        prefill: str = "",
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(backend, chat, trait)
        self.rubrics = (trait.judge_rubric, COHERENCE) if coherence else (trait.judge_rubric,)
        self.prefill = prefill
        added: Any = chat.tokenizer.get_added_vocab()
        self._marks = (*chat.tokenizer.all_special_tokens, *added)
        self._numbers = NumberTokens(chat.encode_answer)
        context = context_length(backend)
        room = None if context is None else context - max(map(len, self._numbers.sequences))
        self.max_tokens = min((limit for limit in (max_tokens, room) if limit is not None), default=MAX_TOKENS)

    def describe(self) -> dict[str, Any]:
        """See `persona_lens.judging.Judge.describe`."""
        return {
            "judge": "local",
            "model": asdict(self.backend.info),
            "chat": self.chat.digest,
            "trait": self.trait.content_hash(),
            "coherence": len(self.rubrics) > 1,
            "prefill": self.prefill,
            "max_tokens": self.max_tokens,
        }

    def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        """See `persona_lens.judging.Judge.pieces`."""
        order = sorted(range(len(exchanges)), key=lambda i: (len(exchanges[i].response), i))
        return [order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)]

    def judge(self, exchanges: Sequence[Exchange], progress: Progress = no_progress) -> list[Judgement]:
        """See `persona_lens.judging.Judge.judge`."""
        scores = [self._scores(rubric, exchanges) for rubric in self.rubrics]
        progress(len(exchanges), len(exchanges), "judging")
        return [Judgement(each[0], each[1] if len(each) > 1 else None) for each in zip(*scores, strict=True)]

    def passes(self, exchanges: Sequence[Exchange]) -> Iterator[TokenBatch]:
        """See `ReadingJudge.passes`."""
        for piece in self.pieces(exchanges):
            for rubric in self.rubrics:
                prompts = [self._prompt(rubric, exchanges[i]) for i in piece]
                if not all(isinstance(each, str) for each in prompts):
                    yield self._tokens(prompts)

    def _scores(self, rubric: str, exchanges: Sequence[Exchange]) -> Iterator[Score]:
        prompts = [self._prompt(rubric, exchange) for exchange in exchanges]
        nothing = all(isinstance(each, str) for each in prompts)
        rows = [] if nothing else [values.tolist() for values in self._logprobs(self._tokens(prompts))]
        for each in prompts:
            if isinstance(each, str):
                yield Score(None, each)
            else:
                own, rows = rows[: len(self._numbers.sequences)], rows[len(self._numbers.sequences) :]
                yield expected_number(self._numbers.distribution(own))

    def _prompt(self, rubric: str, exchange: Exchange) -> tuple[int, ...] | str:
        """What stands before the number; or, where there is nothing to ask, why."""
        if not exchange.response.strip():
            return EMPTY
        asked = self.chat.encode(None, fill_rubric(rubric, exchange, self._marks))
        prompt = (*closed(self.chat.parts, asked), *self.chat.encode_answer(self.prefill))
        if len(prompt) > self.max_tokens:
            return f"the judge's prompt has {len(prompt):,} tokens, more than {self.max_tokens:,}"
        return prompt

    def _tokens(self, prompts: Sequence[tuple[int, ...] | str]) -> TokenBatch:
        asked, sequences = [each for each in prompts if not isinstance(each, str)], self._numbers.sequences
        return TokenBatch.of([each for each in asked for _ in sequences], [ids for _ in asked for ids in sequences])

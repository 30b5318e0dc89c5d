"""`Judge`, what it takes and gives: traits, exchanges, scores; the number that an answer holds (method, section 3)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from persona_lens.core.documents import Record
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.progress import Progress, no_progress
from persona_lens.traits import Arm

EMPTY = "empty response"


@runtime_checkable
class Judged(Protocol):
    """What a judge takes of what it judges: a `persona_lens.traits.Trait`, or a `persona_lens.traits.PlayedRole`."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def judge_rubric(self) -> str:
        """What a judge is asked that reads, with the slots ``{question}`` and ``{answer}`` once each."""
        ...

    @property
    def instructions(self) -> Sequence[object]:
        """The pairs of system prompts that call it forth and hold it back."""
        ...

    def system_prompt(self, arm: Arm, pair_index: int, /) -> str:
        """The system prompt of one arm of a pair."""
        ...

    def content_hash(self) -> str:
        """The fingerprint of what determines a judgement."""
        ...


class JudgingError(PersonaLensError):
    """A judge that cannot work as it is asked to."""


@dataclass(frozen=True)
class Exchange:
    """A question and the response to it.

    Attributes:
        question: What was asked, without any system prompt.
        response: The answer as text.
        response_ids: The answer's token ids under the subject model, where they are known.
    """

    question: str
    response: str
    response_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Score:
    """A number from 0 to 100 for one response.

    Attributes:
        value: The number; None where there is none.
        reason: Why there is none.
        method: How it was found, where a judge has several ways.
    """

    value: float | None
    reason: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class Judgement(Record):
    """What a judge says of one response.

    Attributes:
        trait: How strongly the response shows the trait.
        coherence: How coherent it is; None from a judge that does not ask.
        nll: -log p of the response under the unsteered subject model, nats a token; None from a judge that does
            not compute it, or for an empty response.
    """

    trait: Score
    coherence: Score | None = None
    nll: float | None = None


@runtime_checkable
class Judge(Protocol):
    """Scores responses for one trait, or for a role.

    A judge may have two methods more: ``prepare()`` finds out, at little cost, everything that would keep it from
    judging, and raises an error for it; ``work(exchanges)`` says what judging these asks at most, if nothing of it is
    in a cache, as a `persona_lens.runs.cost.Work`.
    """

    @property
    def concurrency(self) -> int:
        """How many pieces may be judged at the same time, in threads."""
        ...

    def describe(self) -> dict[str, Any]:
        """What determines the scores, as JSON values; part of a vector's provenance."""
        ...

    def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        """How to cut a large piece of work: indices of the exchanges that are judged, and saved, together."""
        ...

    def judge(self, exchanges: Sequence[Exchange], progress: Progress = no_progress) -> list[Judgement]:
        """A judgement of each exchange, in their order.

        Args:
            exchanges: What to judge.
            progress: Told how many are done.
        """
        ...


class Method(StrEnum):
    """How a number is had from a judge that answers in words."""

    AUTO = "auto"
    """The first of the others that the server allows, as one question shows."""
    LOGPROBS = "logprobs"
    """Expectation over the likeliest first tokens: the paper's way."""
    SAMPLES = "samples"
    """Mean of several sampled answers: for servers without log-probabilities, or whose tokens are single digits."""
    NUMBER = "number"
    """The number of one greedy answer."""


HIGHEST = 100
MIN_MASS = 0.25
"""Probability that all numbers together must have for a score; below it the judge meant something else."""
REFUSED = "refusal"
"""Begins the reason where the judge would not rate."""

# ASCII on purpose: Python's int() also takes digits of other scripts, underscores and signs.
_WHOLE = re.compile(r"\s*([0-9]{1,3})\s*")
_IN_TEXT = re.compile(r"(?<![\w.,+-])([0-9]{1,3}(?:\.[0-9]+)?)(?![\w%]|[.,][0-9])(?:\s*(?:/|out of)\s*100\b)?")
_REFUSAL = re.compile(r"\bREFUSAL\b")


def whole_number(token: str) -> int | None:
    """The number from 0 to 100 that a token is, or None."""
    found = _WHOLE.fullmatch(token)
    return int(found[1]) if found and int(found[1]) <= HIGHEST else None


def expected_number(probabilities: Iterable[tuple[int, float]]) -> Score:
    """Sum of k p(k) over sum of p(k).

    Args:
        probabilities: Numbers from 0 to 100 with their probabilities; a number may come several times.

    Returns:
        The expectation; no score where all numbers together have a probability below `MIN_MASS`.
    """
    pairs = list(probabilities)
    mass = math.fsum(p for _, p in pairs)
    if mass < MIN_MASS - 1e-9:  # a sum that is exactly the limit may round to less
        return Score(None, f"{REFUSED}: numbers have a probability of {mass:.2f} together", Method.LOGPROBS)
    value = math.fsum(k * p for k, p in pairs) / mass
    return Score(min(max(value, 0.0), float(HIGHEST)), method=Method.LOGPROBS)


def score_of_tokens(top: Iterable[tuple[str, float]]) -> Score:
    """The score in the likeliest first tokens of an answer.

    Args:
        top: Tokens with their log-probabilities, in nats.
    """
    numbers = ((whole_number(token), logprob) for token, logprob in top)
    return expected_number((number, math.exp(logprob)) for number, logprob in numbers if number is not None)


def score_of_text(text: str) -> Score:
    """The score in an answer that says a number, such as ``85``, ``Score: 85`` or ``85/100``.

    Returns:
        The number; no score where there is none from 0 to 100, or more than one.
    """
    if says_refusal(text):
        return Score(None, REFUSED, Method.NUMBER)
    found = {float(match[1]) for match in _IN_TEXT.finditer(text)}
    if len(found) != 1:
        what = "several numbers" if found else "no number"
        return Score(None, f"the judge's answer holds {what}: {shown(text)}", Method.NUMBER)
    value = found.pop()
    if value > HIGHEST:
        return Score(None, f"the judge's answer is beyond {HIGHEST}: {shown(text)}", Method.NUMBER)
    return Score(value, method=Method.NUMBER)


def score_of_samples(texts: Sequence[str]) -> Score:
    """The mean of the numbers in several sampled answers; no score where fewer than a quarter hold one."""
    scores = [score_of_text(text) for text in texts]
    values = [score.value for score in scores if score.value is not None]
    method = f"{Method.SAMPLES}: {len(values)} of {len(texts)}"
    if not values or len(values) < MIN_MASS * len(texts):
        reason = next((score.reason for score in scores if score.reason), None)
        return Score(None, reason, method)
    return Score(math.fsum(values) / len(values), method=method)


class NumberTokens:
    """The numbers from 0 to 100 as the token ids that a model writes them with, whatever its tokenizer.

    A number of several tokens begins with those of another: 57 begins like 5. So 5 itself has the probability of its
    own tokens less that of all numbers which go on from them.

    Args:
        encode: Token ids of a text at the beginning of an answer.

    Attributes:
        sequences: Token ids that together hold every number: those which are no other number's beginning.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self._numbers = {tuple(encode(str(number))): number for number in range(HIGHEST + 1)}
        beginnings = {ids[:length] for ids in self._numbers for length in range(1, len(ids))}
        self.sequences = tuple(ids for ids in self._numbers if ids not in beginnings)

    def distribution(self, logprobs: Sequence[Sequence[float]]) -> list[tuple[int, float]]:
        """Each number's probability to be the answer.

        Args:
            logprobs: For each of ``sequences`` the log-probabilities of its tokens, in nats.
        """
        reached: dict[tuple[int, ...], float] = {}
        for ids, values in zip(self.sequences, logprobs, strict=True):
            for length in range(1, len(ids) + 1):
                reached[ids[:length]] = math.exp(math.fsum(values[:length]))
        alone = dict(reached)
        for ids, probability in reached.items():
            if len(ids) > 1:
                alone[ids[:-1]] -= probability
        return [(number, max(alone[ids], 0.0)) for ids, number in self._numbers.items()]


def says_refusal(text: str) -> bool:
    """Whether an answer refuses to rate, in the word that rubrics ask for, or its first token alone."""
    return _REFUSAL.search(text) is not None or (len(text.strip()) > 1 and "REFUSAL".startswith(text.strip()))


def shown(text: str) -> str:
    """An answer in quotation marks, on a line of reasonable length."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:60] + "…") if line else "nothing"

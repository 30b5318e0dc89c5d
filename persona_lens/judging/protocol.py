"""What every judge does: a judgement of each response, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Protocol, runtime_checkable

from persona_lens.errors import PersonaLensError
from persona_lens.progress import Progress, no_progress

EMPTY = "empty response"


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

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Score:
        """The score that its fields by name stand for.

        Raises:
            KeyError, TypeError, ValueError: If there are others.
        """
        words = row["reason"], row["method"]
        if not all(each is None or isinstance(each, str) for each in words):
            raise TypeError("values of other types")
        return Score(None if row["value"] is None else finite(row["value"]), *words)


def finite(value: Any) -> float:
    """A number of a row.

    Raises:
        TypeError, ValueError: If it is none, or not finite.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"no number: {value!r:.40}")
    if not isfinite(value):
        raise ValueError(f"not finite: {value}")
    return float(value)


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one response.

    Attributes:
        trait: How strongly the response shows the trait.
        coherence: How coherent it is; None from a judge that does not ask.
        surprise: -log p of the response under the unsteered subject model, nats a token; None from a judge that does
            not compute it, or for an empty response.
    """

    trait: Score
    coherence: Score | None = None
    surprise: float | None = None

    def to_row(self) -> dict[str, Any]:
        """The judgement as JSON values."""
        return asdict(self)

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Judgement:
        """The judgement that `to_row` gave.

        Raises:
            KeyError, TypeError, ValueError: If it is no such row.
        """
        coherence = Score.from_row(row["coherence"]) if row["coherence"] is not None else None
        surprise = None if row["surprise"] is None else finite(row["surprise"])
        return Judgement(Score.from_row(row["trait"]), coherence, surprise)


@runtime_checkable
class Judge(Protocol):
    """Scores responses for one trait."""

    @property
    def pieces_at_once(self) -> int:
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


@runtime_checkable
class PreparedJudge(Protocol):
    """A judge that can find out whether it can work before there is anything to judge."""

    def prepare(self) -> Any:
        """Find out, at little cost, everything that would keep it from judging.

        Raises:
            PersonaLensError: If something does.
        """
        ...

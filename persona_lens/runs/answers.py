"""`Answer`: one judged response to a question, and means over many of them, question by question."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from persona_lens.core.statistics import SCORES, Estimate, bootstrap_mean


@dataclass(frozen=True)
class Answer:
    """One response to one of a trait's questions, with its judgement; an experiment adds the labels of its variants.

    Attributes:
        question: Number of the question.
        sample: Number of the sample.
        score: Trait score, 0 to 100; None if the response has none.
        surprise: -log p under the model without edits and system prompt, nats a token; None if the response is empty,
            or from a judge that does not compute it.
        coherence: 0 to 100; None from a judge that does not ask.
        text: The response.
    """

    question: int
    sample: int
    score: float | None
    surprise: float | None
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
    """The ``score``, ``surprise`` or ``coherence`` of each row, with the number of its question."""
    return [(row.question, getattr(row, quantity)) for row in rows]


def by_question(rows: Iterable[Answer], quantity: str) -> dict[int, float]:
    """Mean of ``score``, ``surprise`` or ``coherence`` for each question; questions without a value are left out."""
    return averaged(values_of(rows, quantity))


def mean_of(rows: Iterable[Answer], quantity: str) -> Estimate | None:
    """Mean of ``score``, ``surprise`` or ``coherence`` over questions; None without any value."""
    values = by_question(rows, quantity)
    within = None if quantity == "surprise" else SCORES
    return bootstrap_mean(list(values.values()), within=within) if values else None


def json_of(estimate: Any) -> Any:
    """What has values by name, as JSON; None stays None."""
    return None if estimate is None else estimate.to_json()

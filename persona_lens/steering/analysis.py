"""What a sweep shows: the curve over coefficients, the effect beside the null, and the choice of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

from persona_lens.core.statistics import CHANGES, SCORES, Estimate, bootstrap_mean, clear_side
from persona_lens.steering.steering import SteeringError
from persona_lens.steering.sweep import NONE, RANDOM, VECTOR, SweepRow

# Nats a token by which steered text may surprise the unsteered model more than its own text does, and still count as
# coherent.
COHERENCE_MARGIN = 1.0
# Mean coherence, 0 to 100, that counts as coherent where the judge gives one.
MIN_COHERENCE = 50.0


@dataclass(frozen=True)
class CurvePoint:
    """Mean score at one coefficient, with its interval over questions.

    Attributes:
        coefficient: Multiple of the raw vector.
        score: Trait score, 0 to 100.
        surprise: -log p under the unsteered model, nats a token; None where the judge did not compute it.
        coherence: 0 to 100; None where the judge did not ask.
    """

    coefficient: float
    score: Estimate
    surprise: Estimate | None
    coherence: Estimate | None = None

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {
            "coefficient": self.coefficient,
            "score": self.score.to_json(),
            "surprise": self.surprise.to_json() if self.surprise else None,
            "coherence": self.coherence.to_json() if self.coherence else None,
        }


@dataclass(frozen=True)
class Effect:
    """Score at the largest coefficient minus score at the smallest, question by question.

    Attributes:
        layer: Layer steered.
        low: Smallest coefficient.
        high: Largest coefficient.
        vector: The effect of the vector.
        random: The same for random directions of equal norm; None without them.
        difference: Vector minus random; None without them.
    """

    layer: int
    low: float
    high: float
    vector: Estimate
    random: Estimate | None
    difference: Estimate | None

    @property
    def clear(self) -> int:
        """1 or -1 if the effect is clear, else 0: see `persona_lens.core.statistics.clear_side`."""
        return clear_side(self.vector, self.difference)

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {
            "layer": self.layer,
            "low": self.low,
            "high": self.high,
            "vector": self.vector.to_json(),
            "random": self.random.to_json() if self.random else None,
            "difference": self.difference.to_json() if self.difference else None,
            "clear": self.clear,
        }


def curve(rows: Sequence[SweepRow], layer: int, direction: str = VECTOR) -> list[CurvePoint]:
    """Mean score, surprise and coherence at each coefficient, 0 included.

    Raises:
        SteeringError: If there is no scored response at some coefficient, or none at that layer.
    """
    steered = [r for r in rows if r.layer == layer and r.direction == direction]
    if not steered:
        raise SteeringError(f"no response was steered along the {direction} at layer {layer}{_steered_layers(rows)}")
    chosen = [r for r in rows if r.direction == NONE] + steered
    points = []
    for coefficient in sorted({row.coefficient for row in chosen}):
        at = [row for row in chosen if row.coefficient == coefficient]
        score = mean_of(at, "score")
        if score is None:
            raise SteeringError(f"no response at layer {layer}, coefficient {coefficient:g} has a score")
        points.append(CurvePoint(coefficient, score, mean_of(at, "surprise"), mean_of(at, "coherence")))
    return points


def effect(rows: Sequence[SweepRow], layer: int) -> Effect:
    """The effect of steering at a layer, beside that of random directions.

    Raises:
        SteeringError: If no question has a scored response at both ends.
    """
    coefficients = sorted({r.coefficient for r in rows if r.layer == layer} | {0.0})
    if len(coefficients) == 1:
        raise SteeringError(f"no response was steered at layer {layer}{_steered_layers(rows)}")
    low, high = coefficients[0], coefficients[-1]
    vector = _difference_by_question(rows, layer, VECTOR, low, high)
    if not vector:
        raise SteeringError(f"no question has a response at both ends of the sweep at layer {layer}")
    random = _difference_by_question(rows, layer, RANDOM, low, high)
    both = [vector[question] - random[question] for question in vector if question in random]
    null, difference = (
        bootstrap_mean(each, within=CHANGES) if each else None for each in (list(random.values()), both)
    )
    return Effect(layer, low, high, bootstrap_mean(list(vector.values()), within=CHANGES), null, difference)


def choose_layer(rows: Sequence[SweepRow], margin: float = COHERENCE_MARGIN) -> int:
    """The layer with the strongest effect whose text stays coherent at both ends (method, section 4).

    Coherent: at either end the mean surprise exceeds that of unsteered text by at most ``margin`` nats a token; or,
    where the judge gave coherence instead, its mean is at least `MIN_COHERENCE`. Where no layer is, the most coherent
    is taken.

    Raises:
        SteeringError: If every unsteered response is empty.
    """
    layers = sorted({row.layer for row in rows if row.layer is not None})
    unsteered = [row for row in rows if row.direction == NONE]
    own = by_question(unsteered, "surprise")
    if not own and not by_question(unsteered, "coherence"):
        raise SteeringError("every unsteered response is empty; there is nothing to compare steered text with")
    most = margin + fmean(own.values()) if own else -MIN_COHERENCE

    def incoherence(layer: int) -> float:
        try:
            points = curve(rows, layer)
        except SteeringError:  # nothing but empty responses is not coherent text
            return inf
        return max(map(_incoherence, (points[0], points[-1])))

    coherent = [layer for layer in layers if incoherence(layer) <= most]
    if not coherent:
        return min(layers, key=incoherence)
    return max(coherent, key=lambda layer: effect(rows, layer).vector.mean)


def _incoherence(point: CurvePoint) -> float:
    if point.surprise is not None:
        return point.surprise.mean
    return -point.coherence.mean if point.coherence is not None else inf


def _steered_layers(rows: Sequence[SweepRow]) -> str:
    layers = sorted({row.layer for row in rows if row.layer is not None})
    return f"; the sweep has layers {', '.join(map(str, layers)) or 'none'}"


@runtime_checkable
class Answered(Protocol):
    """A judged response to one of a trait's questions."""

    @property
    def question(self) -> int:
        """Number of the question."""
        ...


def by_question(rows: Iterable[Answered], quantity: str) -> dict[int, float]:
    """Mean of ``score``, ``surprise`` or ``coherence`` for each question; questions without a value are left out."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if (value := getattr(row, quantity)) is not None:
            values.setdefault(row.question, []).append(value)
    return {question: fmean(found) for question, found in values.items()}


def mean_of(rows: Iterable[Answered], quantity: str) -> Estimate | None:
    """Mean of ``score``, ``surprise`` or ``coherence`` over questions; None without any value."""
    values = by_question(rows, quantity)
    within = None if quantity == "surprise" else SCORES
    return bootstrap_mean(list(values.values()), within=within) if values else None


def _difference_by_question(
    rows: Sequence[SweepRow], layer: int, direction: str, low: float, high: float
) -> dict[int, float]:
    def at(coefficient: float) -> dict[int, float]:
        if coefficient == 0:
            return by_question([r for r in rows if r.direction == NONE], "score")
        return by_question(
            [r for r in rows if (r.layer, r.direction, r.coefficient) == (layer, direction, coefficient)], "score"
        )

    lower, upper = at(low), at(high)
    return {question: upper[question] - lower[question] for question in upper if question in lower}

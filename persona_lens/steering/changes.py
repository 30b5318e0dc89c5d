"""`Change`: how far a steering moves a quantity, question by question, beside what random directions do to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from persona_lens.statistics import Estimate, bootstrap_mean


@dataclass(frozen=True)
class Change:
    """Steered minus unsteered, with 95% bootstrap intervals over questions.

    Attributes:
        vector: Under the steering.
        random: Under random rotations of it; None without them.
        difference: The one minus the other, question by question; None without them.
    """

    vector: Estimate
    random: Estimate | None
    difference: Estimate | None

    @property
    def clear(self) -> int:
        """1 or -1 if the change and its difference from the null's have intervals on the same side of 0; else 0.

        Without a null, and with a single question, nothing is clear.
        """
        side = _side(self.vector)
        return side if self.difference is not None and side == _side(self.difference) else 0

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {
            "vector": self.vector.to_json(),
            "random": self.random.to_json() if self.random else None,
            "difference": self.difference.to_json() if self.difference else None,
            "clear": self.clear,
        }


Value = tuple[int, float | None]
"""Number of a question, and what was measured of one response to it; None where there is nothing to measure."""


def change_of(unsteered: Iterable[Value], steered: Iterable[Value], random: Iterable[Value] = ()) -> Change | None:
    """The change of a quantity; None where no question has it both steered and unsteered.

    Args:
        unsteered: Values of the unsteered responses.
        steered: Those under the steering.
        random: Those under its random rotations.
    """
    base = _by_question(unsteered)
    moved, null = _minus(_by_question(steered), base), _minus(_by_question(random), base)
    if not moved:
        return None
    both = _minus(moved, null)
    return Change(_estimate(moved), _estimate(null) if null else None, _estimate(both) if both else None)


def _by_question(values: Iterable[Value]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for question, value in values:
        if value is not None:
            found.setdefault(question, []).append(value)
    return {question: fmean(each) for question, each in found.items()}


def _minus(these: Mapping[int, float], those: Mapping[int, float]) -> dict[int, float]:
    return {question: value - those[question] for question, value in these.items() if question in those}


def _estimate(values: Mapping[int, float]) -> Estimate:
    return bootstrap_mean([value for _, value in sorted(values.items())])


def _side(estimate: Estimate) -> int:
    if estimate.n < 2:
        return 0
    return 1 if estimate.low > 0 else -1 if estimate.high < 0 else 0

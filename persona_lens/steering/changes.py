"""`Change`: how far a steering moves a quantity, question by question, beside what random directions do to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from persona_lens.statistics import Ends, Estimate, bootstrap_mean, clear_side


@dataclass(frozen=True)
class Change:
    """Steered minus unsteered, with 95% intervals over questions.

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
        """1 or -1 if it is clear, else 0: see `persona_lens.statistics.clear_side`."""
        return clear_side(self.vector, self.difference)

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


def change_of(
    unsteered: Iterable[Value], steered: Iterable[Value], random: Iterable[Value] = (), *, within: Ends | None = None
) -> Change | None:
    """The change of a quantity; None where no question has it both steered and unsteered.

    Args:
        unsteered: Values of the unsteered responses.
        steered: Those under the steering.
        random: Those under its random rotations.
        within: Ends of what a change can be, such as `persona_lens.statistics.CHANGES` of scores.
    """
    base = _by_question(unsteered)
    moved, null = _minus(_by_question(steered), base), _minus(_by_question(random), base)
    if not moved:
        return None
    both = _minus(moved, null)
    estimates = [_estimate(each, within) if each else None for each in (null, both)]
    return Change(_estimate(moved, within), *estimates)


def _by_question(values: Iterable[Value]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for question, value in values:
        if value is not None:
            found.setdefault(question, []).append(value)
    return {question: fmean(each) for question, each in found.items()}


def _minus(these: Mapping[int, float], those: Mapping[int, float]) -> dict[int, float]:
    return {question: value - those[question] for question, value in these.items() if question in those}


def _estimate(values: Mapping[int, float], within: Ends | None) -> Estimate:
    return bootstrap_mean([value for _, value in sorted(values.items())], within=within)

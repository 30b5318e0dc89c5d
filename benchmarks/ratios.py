"""Paired timing: two pieces of work in turn, and the median of the ratios pair by pair."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Ratio:
    """How long one piece of work takes beside another.

    Attributes:
        name: What was compared.
        ratio: Median over pairs of time / baseline time.
        low: Smallest of the ratios.
        high: Largest of the ratios.
        seconds: Median of the work: seconds, or what the name says.
        baseline_seconds: Median of the baseline.
        limit: What the ratio should be at most.
    """

    name: str
    ratio: float
    low: float
    high: float
    seconds: float
    baseline_seconds: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the ratio is within its limit."""
        return self.ratio <= self.limit

    def __str__(self) -> str:
        verdict = "ok  " if self.holds else "FAIL"
        spread = f"at most {self.limit:.2f}; {self.low:.3f} to {self.high:.3f}"
        return f"{verdict} {self.ratio:.3f} ({spread}; {self.seconds:.2f} / {self.baseline_seconds:.2f}) {self.name}"


def _nothing() -> None:
    pass


def compare(
    name: str,
    work: Callable[[], object],
    baseline: Callable[[], object],
    *,
    limit: float,
    pairs: int,
    settle: Callable[[], None] = _nothing,
) -> Ratio:
    """Time two pieces of work in turn; which goes first alternates. Warm both up before.

    Args:
        name: What is compared.
        work: The work.
        baseline: What it stands beside.
        limit: What the ratio should be at most.
        pairs: How often to time the two.
        settle: Waits until a device that works on its own is idle, before a clock is read.
    """
    times: list[tuple[float, float]] = []
    for pair in range(pairs):
        if pair % 2:
            second = timed(baseline, settle)
            times.append((timed(work, settle), second))
        else:
            first = timed(work, settle)
            times.append((first, timed(baseline, settle)))
    ratios = [a / b for a, b in times]
    return Ratio(
        name,
        median(ratios),
        min(ratios),
        max(ratios),
        median(a for a, _ in times),
        median(b for _, b in times),
        limit,
    )


def timed(work: Callable[[], object], settle: Callable[[], None] = _nothing) -> float:
    """How many seconds some work takes; ``settle`` as `compare` takes it."""
    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start

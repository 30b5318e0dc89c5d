"""`Bisection`: the strength at which text falls apart at a layer, closed in from both sides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, log, log2, sqrt

# What holds and what breaks are told apart as far as this factor: coefficients have two digits, and random directions
# of equal length differ by more.
CLOSE = 1.25


@dataclass(frozen=True)
class Bisection:
    """What is known of a layer: how strong text may be steered there.

    Strengths are multiplied, not added up: the middle of 0.1 and 0.9 is 0.3.

    Attributes:
        low: The greatest strength at which text held together; the least that may be tried while none has.
        high: The least at which it did not; the greatest that may be tried while none has.
        held: Whether text was seen to hold together at ``low``.
        broke: Whether it was seen to break at ``high``.
    """

    low: float
    high: float
    held: bool = False
    broke: bool = False

    @property
    def next(self) -> float | None:
        """The strength to try; None once the two are close. The ends are tried where only they are left."""
        if self.high > self.low * CLOSE:
            return sqrt(self.low * self.high)
        if not self.held and not (self.broke and self.high == self.low):
            return self.low
        return self.high if not self.broke and self.high > self.low else None

    def after(self, strength: float, holds: bool) -> Bisection:
        """What is known once the strength was tried."""
        if holds:
            return replace(self, low=strength, held=True)
        return replace(self, high=strength, broke=True)


def most_steps(least: float, greatest: float) -> int:
    """How many strengths a bisection between the two tries at most."""
    if greatest == least:
        return 1
    apart = log(greatest / least) / log(CLOSE)
    return max(0, ceil(log2(apart))) + 1 if apart > 1 else 2

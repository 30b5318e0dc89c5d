"""The heat map's colours: blue below the centre, red above it, for light pages (and terminals) and for dark ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

STEPS = 20  # shades to each side
LIGHT_INK, DARK_INK = "#1b1f24", "#e7e9ec"  # legible on every shade: at least 4.5 to 1, as the tests compute
_LIGHT = ("#5aa0dc", "#ffffff", "#f0806f")  # lowest, centre, highest
_DARK = ("#0d5f9f", "#14171c", "#ad3a2f")
_FAR = 3.0  # times the 90th percentile: beyond it lie outliers, such as the first token of most models
_DIGITS = 3  # significant ones of the scale's end
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Scale:
    """Values onto shades.

    Attributes:
        centre: The value without colour.
        limit: Distance from it, above 0, at which the colour is fullest; values beyond it have the same colour.
        clipped: Whether any value lies beyond.
    """

    centre: float
    limit: float
    clipped: bool

    @classmethod
    def of(cls, values: Iterable[float], centre: float = 0.0, limit: float | None = None) -> Scale:
        """A scale for values: to the furthest one, unless few are far from all others.

        Args:
            values: NaN is left out.
            centre: The value without colour.
            limit: A distance to use, so that several heat maps can be compared.
        """
        distances = np.abs(np.array([value - centre for value in values if not math.isnan(value)]))
        finite = distances[np.isfinite(distances)]
        if limit is None:
            furthest = float(finite.max()) if len(finite) else 0.0
            usual = _FAR * float(np.quantile(finite, 0.9, method="lower")) if len(finite) else 0.0
            limit = min(furthest, usual) or furthest or 1.0
        return cls(centre, limit, bool((distances > limit * (1 + 1e-9)).any()))

    def step(self, value: float) -> int | None:
        """The shade of a value, from ``-STEPS`` to ``STEPS``; None for NaN."""
        if math.isnan(value):
            return None
        return round(max(-1.0, min(1.0, (value - self.centre) / self.limit)) * STEPS)

    def write(self, value: float) -> str:
        """A value in as many digits as the scale has."""
        if math.isnan(value):
            return "none"
        if math.isinf(value):
            return f"{MINUS if value < 0 else '+'}∞"
        size = max(self.limit, abs(self.centre))
        digits = min(max(_DIGITS - 1 - math.floor(math.log10(size)), 0), 12)
        rounded = round(value, digits) + 0.0  # no negative zero
        return f"{rounded:{'+' if rounded else ''}.{digits}f}".replace("-", MINUS)

    @property
    def ends(self) -> tuple[str, str, str]:
        """Lowest value, centre and highest, written."""
        low, high = self.write(self.centre - self.limit), self.write(self.centre + self.limit)
        middle = self.write(self.centre) if self.centre else "0"
        return (f"≤ {low}" if self.clipped else low, middle, f"≥ {high}" if self.clipped else high)


def light(step: int) -> str:
    """A shade for light pages: ``#rrggbb``."""
    return _shade(_LIGHT, step)


def dark(step: int) -> str:
    """A shade for dark pages: ``#rrggbb``."""
    return _shade(_DARK, step)


def _shade(colours: tuple[str, str, str], step: int) -> str:
    low, centre, high = colours
    end, share = high if step > 0 else low, abs(step) / STEPS
    return "#" + "".join(
        f"{round(int(centre[i : i + 2], 16) * (1 - share) + int(end[i : i + 2], 16) * share):02x}" for i in (1, 3, 5)
    )

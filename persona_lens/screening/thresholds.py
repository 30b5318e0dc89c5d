"""`RowThreshold`: from which value on a row is flagged, by what a clean reference set has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from persona_lens.screening.errors import ScreeningError


class Decision(StrEnum):
    """What becomes of a row."""

    KEPT = "kept"
    FLAGGED = "flagged"
    UNDECIDED = "undecided"


class Band(StrEnum):
    """Where rows are undecided."""

    INTERVAL = "interval"  # within the 95% interval of the threshold
    NONE = "none"  # nowhere: above the threshold is flagged


@dataclass(frozen=True)
class RowThreshold:
    """Rows above ``high`` are flagged, rows above ``low`` undecided (method, section 7).

    Attributes:
        gauge: Trait and layer.
        false_positive_rate: Share of the reference rows that may be above ``value``.
        value: The percentile of the reference, in residual-stream units.
        low: Lower end of the band of undecided rows.
        high: Its upper end.
        rows: How many reference rows there are.
    """

    gauge: str
    false_positive_rate: float
    value: float
    low: float
    high: float
    rows: int

    def decide(self, score: float) -> Decision:
        """What becomes of a row with this value; without one it is undecided."""
        if score <= self.low:
            return Decision.KEPT
        return Decision.FLAGGED if score > self.high else Decision.UNDECIDED

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)


def threshold_of(
    gauge: str, reference: NDArray[np.float64], rate: float, undecided: Band | float = Band.INTERVAL
) -> RowThreshold:
    """The lowest threshold above which no more than a share of the reference lies.

    Args:
        gauge: Trait and layer.
        reference: Values of clean rows; NaN is left out.
        rate: The share: 0.05 is the 95th percentile.
        undecided: A larger share: rows between both percentiles are undecided. ``interval``: those within the
            percentile's 95% interval, which rests on ranks alone; it ends at the largest reference row, however few
            there are. ``none``: no row.

    Raises:
        ScreeningError: If a share is none, or there are no reference rows.
    """
    check_rates(rate, undecided)
    known = np.sort(reference[np.isfinite(reference)])
    if not len(known):
        raise ScreeningError("no row of the reference set has a value, so that there is no threshold")
    value = _at(known, rate)
    if undecided is Band.NONE:
        return RowThreshold(gauge, rate, value, value, value, len(known))
    if undecided is Band.INTERVAL:
        ranks = stats.binom.ppf([0.025, 0.975], len(known), 1 - rate)
        low, high = (float(known[int(np.clip(rank, 0, len(known) - 1))]) for rank in ranks)
        return RowThreshold(gauge, rate, value, min(low, value), max(high, value), len(known))
    return RowThreshold(gauge, rate, value, _at(known, float(undecided)), value, len(known))


def check_rates(rate: float, undecided: Band | float) -> None:
    """Raise `ScreeningError` unless ``rate`` is a share and ``undecided`` a band or a larger share."""
    if not 0 < rate < 1:
        raise ScreeningError(f"a false-positive rate is above 0 and below 1, such as 0.05; got {rate:g}")
    if not isinstance(undecided, Band) and not rate < undecided < 1:
        raise ScreeningError(
            f"rows are undecided up to a rate above the false-positive rate {rate:g} and below 1; got {undecided:g}"
        )


def decide(thresholds: Sequence[RowThreshold], scores: Sequence[float]) -> Decision:
    """Flagged if any trait flags the row, else undecided if any is, else kept."""
    decisions = {each.decide(score) for each, score in zip(thresholds, scores, strict=True)}
    return next(each for each in (Decision.FLAGGED, Decision.UNDECIDED, Decision.KEPT) if each in decisions)


def _at(ordered: NDArray[np.float64], rate: float) -> float:
    return float(np.quantile(ordered, 1 - rate, method="inverted_cdf"))

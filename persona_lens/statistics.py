"""Intervals and separations: the few statistics that every result here is reported with."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% bootstrap interval.

    Attributes:
        mean: The mean.
        low: Lower end; equal to the mean where there is one unit only.
        high: Upper end.
        n: Number of units that were resampled.
    """

    mean: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)

    def clear_of(self, value: float) -> bool:
        """Whether the interval excludes a value."""
        return not self.low <= value <= self.high


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """Percentile bootstrap of a mean over independent units (here: questions).

    Args:
        values: One number a unit; average within a unit first.
        seed: Of the resampling, so that a report can be repeated exactly.

    Raises:
        ValueError: If there are no values.
    """
    if not len(values):
        raise ValueError("there is nothing to take the mean of")
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) == 1 or float(np.ptp(data)) == 0:
        return Estimate(mean, mean, mean, len(data))
    result = stats.bootstrap(
        (data,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed), vectorized=True
    )
    interval = result.confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), len(data))


def resampled_rows(clusters: Sequence[Hashable], seed: int = 0) -> Iterator[NDArray[np.intp]]:
    """Rows of each bootstrap resample: clusters are drawn with replacement, and all rows of a cluster come together.

    Args:
        clusters: What each row belongs to (here: its question).
        seed: Of the resampling.

    Yields:
        `RESAMPLES` arrays of row numbers, a row as often as its cluster was drawn.
    """
    members: dict[Hashable, list[int]] = {}
    for row, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(row)
    rows = [np.asarray(found, dtype=np.intp) for found in members.values()]
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])


def percentile_interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """Ends of the 95% percentile interval; None if more than a tenth of the resamples left the statistic undefined.

    Args:
        values: The statistic in each resample, NaN where it is undefined.
    """
    defined = values[np.isfinite(values)]
    if len(defined) < 0.9 * len(values):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's r of every column with ``y``; NaN if either is constant.

    Args:
        x: [n] or [n, columns].
        y: [n].

    Returns:
        A single number, or [columns].
    """
    spread, height = np.ptp(x, axis=0), np.ptp(y)
    # Scaled by the range first, so that the squares of tiny differences are not rounded to nothing.
    a = (x - x.min(axis=0)) / np.where(spread > 0, spread, 1)
    b = (y - y.min()) / (height or 1)
    a, b = a - a.mean(axis=0), b - b.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (b @ a) / np.sqrt((a * a).sum(axis=0) * (b @ b))
    found: NDArray[np.float64] = np.where((spread > 0) & (height > 0), np.clip(r, -1, 1), np.nan)
    return found


def auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Probability that a positive value exceeds a negative one, ties counting half."""
    # As scipy.stats.mannwhitneyu does, which works out a p-value too: slow in a bootstrap.
    n = len(positive)
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    return float(ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negative))


def separation(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Difference of means in units of the pooled standard deviation (d')."""
    pooled = np.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2)
    return float((positive.mean() - negative.mean()) / pooled) if pooled > 0 else 0.0

"""`StreamedMeans`: means of many quantities with bootstrap intervals, in memory that does not grow with the rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from persona_lens.statistics import RESAMPLES, Estimate, percentile_interval


class StreamedMeans:
    """Means over rows that come in pieces.

    The interval is that of the Poisson bootstrap: in each resample a row counts as often as a Poisson variable of mean
    1 says, which for more than a few rows is the bootstrap that draws rows with replacement, and needs no row twice.

    Args:
        columns: How many quantities a row has.
        seed: Of the resampling.
    """

    def __init__(self, columns: int, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._sums = np.zeros((RESAMPLES, columns))
        self._counts = np.zeros((RESAMPLES, columns))
        self._total = np.zeros(columns)
        self._n = np.zeros(columns, dtype=np.int64)

    def add(self, values: NDArray[np.float64]) -> None:
        """Take in rows: float64 [rows, columns], NaN where a row lacks a quantity."""
        weights = self._random.poisson(1.0, (RESAMPLES, len(values))).astype(np.float64)
        there = np.isfinite(values)
        known = np.where(there, values, 0.0)
        self._sums += weights @ known
        self._counts += weights @ there
        self._total += known.sum(axis=0)
        self._n += there.sum(axis=0)

    def estimates(self) -> list[Estimate | None]:
        """The mean of each quantity with its 95% interval; None where no row has it."""
        return [self._estimate(column) for column in range(len(self._n))]

    def _estimate(self, column: int) -> Estimate | None:
        n = int(self._n[column])
        if not n:
            return None
        mean = float(self._total[column] / n)
        with np.errstate(divide="ignore", invalid="ignore"):
            resampled = self._sums[:, column] / self._counts[:, column]
        low, high = (percentile_interval(resampled) if n > 1 else None) or (mean, mean)
        return Estimate(mean, low, high, n)

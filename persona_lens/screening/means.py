"""`StreamedMeans`: means of many quantities with intervals, in memory that does not grow with the rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from persona_lens.statistics import Estimate, bootstrap_mean, large_mean

KEPT = 1000
"""Rows up to which all are kept and resampled; of more, the mean is as good as normal."""


class StreamedMeans:
    """Means over rows that come in pieces.

    Args:
        columns: How many quantities a row has.
        seed: Of the resampling.
    """

    def __init__(self, columns: int, seed: int = 0) -> None:
        self._seed = seed
        self._first: list[NDArray[np.float64]] = []
        self._rows = 0
        self._n = np.zeros(columns, dtype=np.int64)
        self._mean = np.zeros(columns)
        self._squares = np.zeros(columns)

    def add(self, values: NDArray[np.float64]) -> None:
        """Take in rows: float64 [rows, columns], NaN where a row lacks a quantity."""
        self._rows += len(values)
        if self._rows <= KEPT:
            self._first.append(np.array(values, dtype=np.float64))
        else:
            self._first = []
        there = np.isfinite(values)
        count = there.sum(axis=0)
        mean = np.where(there, values, 0.0).sum(axis=0) / np.maximum(count, 1)
        squares = (np.where(there, values - mean, 0.0) ** 2).sum(axis=0)
        # Chan's update: sums of squares about the mean so far, so that a large mean does not swallow a small spread.
        total = np.maximum(self._n + count, 1)
        self._squares += squares + (mean - self._mean) ** 2 * self._n * count / total
        self._mean += (mean - self._mean) * count / total
        self._n += count

    def estimates(self) -> list[Estimate | None]:
        """The mean of each quantity with its 95% interval; None where no row has it."""
        return [self._estimate(column) for column in range(len(self._n))]

    def _estimate(self, column: int) -> Estimate | None:
        n = int(self._n[column])
        if not n:
            return None
        if self._rows <= KEPT:
            known = np.concatenate([rows[:, column] for rows in self._first])
            return bootstrap_mean(known[np.isfinite(known)].tolist(), self._seed)
        return large_mean(float(self._mean[column]), float(self._squares[column]), n)

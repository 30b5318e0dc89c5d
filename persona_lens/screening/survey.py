"""`Survey`: one pass over what was scored: means, the reference, labels, extremes; and what finetuning would shift."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from persona_lens.core.documents import Record
from persona_lens.core.statistics import Estimate, auc, auc_interval, bootstrap_mean, large_mean
from persona_lens.data.transcripts import CALLS_TOOLS
from persona_lens.screening.rows import QUANTITIES, ScoredRow
from persona_lens.screening.samples import ScreeningError
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.provenance import FORECASTS, Quantity, ShiftForecast

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


CLEAN = ("normal", "clean", "none", "0", "false", "False", "no")
_POINTS = 100
_MOST = 20  # labels


@dataclass(frozen=True)
class Separation(Record):
    """Rows of one label against the clean ones.

    Attributes:
        auc: Probability that a labelled row has a larger value than a clean one, ties counting half.
        low: Lower end of its 95% interval over rows (`persona_lens.core.statistics.auc_interval`).
        high: Upper end.
        labelled: How many rows have the label.
        clean: How many are clean.
        roc: Points of the curve: shares of clean and of labelled rows above a threshold, from (0, 0) to (1, 1).
    """

    auc: float
    low: float
    high: float
    labelled: int
    clean: int
    roc: tuple[tuple[float, float], ...]


def separation_of(labelled: NDArray[np.float64], clean: NDArray[np.float64]) -> Separation | None:
    """ROC and AUC; None if either kind has no row with a value.

    Args:
        labelled: Values of the rows with a label; NaN is left out.
        clean: Those of the clean rows.
    """
    labelled, clean = (values[np.isfinite(values)] for values in (labelled, clean))
    if not len(labelled) or not len(clean):
        return None
    places, where = np.unique(np.concatenate([labelled, clean]), return_inverse=True)
    positive, negative = where[: len(labelled)], where[len(labelled) :]
    found = auc(labelled, clean)
    low, high = auc_interval(labelled, clean)
    return Separation(found, low, high, len(labelled), len(clean), _roc(positive, negative, len(places)))


def _roc(positive: NDArray[np.intp], negative: NDArray[np.intp], places: int) -> tuple[tuple[float, float], ...]:
    shares = [
        np.concatenate([[0.0], np.bincount(each, minlength=places)[::-1].cumsum() / len(each)])
        for each in (negative, positive)
    ]
    kept = np.unique(np.linspace(0, places, min(places + 1, _POINTS)).round().astype(int))
    return tuple((float(x), float(y)) for x, y in zip(shares[0][kept], shares[1][kept], strict=True))


class LabelledValues:
    """The values of labelled rows, 8 bytes each, by label.

    Args:
        columns: How many values a row has.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._values: dict[str, array[float]] = {}

    def add(self, label: str, values: NDArray[np.float64]) -> None:
        """Take in a row: float64 [columns].

        Raises:
            ScreeningError: If there are more labels than can be labels.
        """
        if label not in self._values and len(self._values) == _MOST:
            raise ScreeningError(
                f"the column of labels has more than {_MOST} different values, such as {label[:40]!r}; name one of few"
            )
        self._values.setdefault(label, array("d")).extend(values.tolist())

    def by_label(self) -> Mapping[str, NDArray[np.float64]]:
        """Float64 [rows, columns] by label, labels in their order of appearance."""
        return {label: np.array(values).reshape(-1, self._columns) for label, values in self._values.items()}


def clean_label(labels: Sequence[str], chosen: str | None) -> str:
    """The label of clean rows.

    Args:
        labels: The labels there are.
        chosen: What was asked for; None finds one that is usual.

    Raises:
        ScreeningError: If it is not among them, or none of them is usual.
    """
    found = next((name for name in CLEAN if name in labels), None) if chosen is None else chosen
    if found is None or found not in labels:
        there = ", ".join(repr(label[:40]) for label in labels) or "none"
        raise ScreeningError(f"which label do clean rows have? Name one with clean (--clean); the labels are: {there}")
    if len(labels) < 2:
        raise ScreeningError(f"all rows have the label {found!r}; AUC needs another one to tell from it")
    return found


MOST_GROUPS = 50
OTHERS = "(others)"
NO_GROUP = "(none)"

Extreme = tuple[float, int, int]
"""Value, dataset and row."""


@dataclass
class Tally:
    """Rows of a dataset, or of a group of its rows."""

    means: StreamedMeans
    rows: int = 0
    rejected: int = 0
    tools: int = 0
    tokens: int = 0

    def add(self, rows: Sequence[ScoredRow], traits: int) -> None:
        """Take in rows."""
        self.rows += len(rows)
        self.rejected += sum(row.problem is not None for row in rows)
        self.tools += sum(CALLS_TOOLS in (row.problem or "") for row in rows)
        self.tokens += sum(row.tokens for row in rows)
        self.means.add(np.stack([row.values[:, :traits].ravel() for row in rows]))

    def to_json(self, gauges: Sequence[str]) -> dict[str, Any]:
        """Counts, and by gauge and quantity the mean with its interval."""
        found = iter(self.means.estimates())
        means: dict[str, dict[str, Any]] = {gauge: {} for gauge in gauges}
        for quantity in QUANTITIES:
            for gauge in gauges:
                estimate = next(found)
                means[gauge][quantity.value] = estimate.to_json() if isinstance(estimate, Estimate) else None
        counts = {"rows": self.rows, "rejected": self.rejected, "call_tools": self.tools, "tokens": self.tokens}
        return {**counts, "means": means}


@dataclass
class Survey:
    """What one pass over the rows finds; its memory grows by 8 bytes for each value of a reference or labelled row.

    Attributes:
        traits: How many gauges are of traits; those of random directions come behind them.
        gauges: How many there are.
        score: By which value rows are ranked and flagged.
        reference: Which datasets are clean references.
        top_k: How many extremes are kept on either side.
        seed: Of the bootstraps.
    """

    traits: int
    gauges: int
    score: Quantity
    reference: Collection[int]
    top_k: int
    seed: int = 0
    datasets: dict[int, Tally] = field(default_factory=dict)
    groups: dict[tuple[int, str], Tally] = field(default_factory=dict)
    top: list[list[Extreme]] = field(init=False)
    bottom: list[list[Extreme]] = field(init=False)
    labelled: LabelledValues = field(init=False)

    def __post_init__(self) -> None:
        self.top, self.bottom = [[] for _ in range(self.traits)], [[] for _ in range(self.traits)]
        self.labelled = LabelledValues(len(QUANTITIES) * self.gauges)
        self.lowest, self.highest = np.full(self.traits, np.inf), np.full(self.traits, -np.inf)
        self._reference: array[float] = array("d")

    @property
    def reference_scores(self) -> NDArray[np.float64]:
        """Float64 [rows, traits]."""
        return np.array(self._reference).reshape(-1, self.traits)

    def add(self, rows: Sequence[ScoredRow]) -> None:
        """Take in rows of one dataset."""
        number = rows[0].dataset
        tally = self.datasets.setdefault(number, self._new_tally(number))
        tally.add(rows, self.traits)
        self._group(number, rows)
        for row in rows:
            if row.problem is None:
                self._note(row)

    def _note(self, row: ScoredRow) -> None:
        scores = row.values[QUANTITIES.index(self.score), : self.traits]
        there = np.isfinite(scores)
        self.lowest = np.where(there, np.minimum(self.lowest, scores), self.lowest)
        self.highest = np.where(there, np.maximum(self.highest, scores), self.highest)
        if row.dataset in self.reference:
            self._reference.extend(scores.tolist())
            return
        if row.label is not None:
            self.labelled.add(row.label, row.values.ravel())
        for gauge in np.flatnonzero(there):
            score = float(scores[gauge])
            keep_largest(self.top[gauge], (score, -row.dataset, -row.number), self.top_k)
            keep_largest(self.bottom[gauge], (-score, -row.dataset, -row.number), self.top_k)

    def _group(self, number: int, rows: Sequence[ScoredRow]) -> None:
        members: dict[str, list[ScoredRow]] = {}
        for row in rows:
            if row.group is not None or any(each == number for each, _ in self.groups):
                members.setdefault(NO_GROUP if row.group is None else row.group, []).append(row)
        for group, found in members.items():
            full = sum(each == number for each, _ in self.groups) >= MOST_GROUPS
            key = (number, OTHERS if full and (number, group) not in self.groups else group)
            self.groups.setdefault(key, self._new_tally(number, len(self.groups) + 1)).add(found, self.traits)

    def _new_tally(self, *numbers: int) -> Tally:
        seed = np.random.SeedSequence((self.seed, *numbers)).generate_state(1)[0]
        return Tally(StreamedMeans(len(QUANTITIES) * self.traits, int(seed)))


def keep_largest(heap: list[Extreme], item: Extreme, most: int) -> None:
    """Add to a heap that holds the largest items only."""
    if len(heap) < most:
        heapq.heappush(heap, item)
    elif most and item > heap[0]:
        heapq.heapreplace(heap, item)


_LEAST = 3


def fit_forecast(
    trait: str,
    layer: int,
    values: Sequence[float],
    shifts: Sequence[float],
    *,
    quantity: Quantity = Quantity.DIFFERENCE,
    source: str = "",
) -> ShiftForecast:
    """Fit a line by least squares.

    Args:
        trait: The trait.
        layer: Layer of the values.
        values: Mean value of each dataset.
        shifts: Trait score after finetuning on it, minus that before.
        quantity: Which value.
        source: What was finetuned, in words.

    Raises:
        ScreeningError: If there are fewer than three datasets, or their values are all the same.
    """
    x, y = np.asarray(values, dtype=np.float64), np.asarray(shifts, dtype=np.float64)
    if len(x) != len(y) or len(x) < _LEAST or not np.ptp(x):
        raise ScreeningError(
            f"a forecast is fitted on at least {_LEAST} datasets of different values, each with a shift; got "
            f"{len(x)} values and {len(y)} shifts"
        )
    line = stats.linregress(x, y)
    residuals = y - line.intercept - line.slope * x
    return ShiftForecast(
        trait,
        layer,
        quantity,
        float(line.slope),
        float(line.intercept),
        float(np.sqrt((residuals**2).sum() / (len(x) - 2))),
        len(x),
        float(x.mean()),
        float(((x - x.mean()) ** 2).sum()),
        float(x.min()),
        float(x.max()),
        source,
    )


def with_forecasts(vectors: PersonaVectors, forecasts: Sequence[ShiftForecast]) -> PersonaVectors:
    """The same vectors with forecasts in their provenance, where `screen` finds them.

    Raises:
        ScreeningError: If a forecast is of another trait.
    """
    if other := [each.trait for each in forecasts if each.trait != vectors.trait]:
        raise ScreeningError(f"the forecast is of {other[0]!r}, but the vectors are of {vectors.trait!r}")
    return vectors.with_provenance(**{FORECASTS: [each.to_json() for each in forecasts]})

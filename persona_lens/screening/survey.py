"""`Survey`: what was scored, column by column; and from which value on rows are flagged (`Flagging`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from persona_lens.core.documents import Record
from persona_lens.core.files import named
from persona_lens.core.statistics import Estimate, auc, auc_interval, bootstrap_mean, large_mean
from persona_lens.data.datasets import Dataset
from persona_lens.data.transcripts import CALLS_TOOLS
from persona_lens.runs import RunError, RunFolder
from persona_lens.screening.rows import DECISIONS, QUANTITIES, Decision, ScoredRow, scored_windows
from persona_lens.screening.samples import BaseResponses, ScreeningError, ScreeningSettings
from persona_lens.vectors.provenance import Quantity

KEPT = 1000
"""Rows up to which all are resampled; of more, the mean is as good as normal."""
CLEAN = ("normal", "clean", "none", "0", "false", "False", "no")
MOST_LABELS, MOST_GROUPS = 20, 50
OTHERS, NO_GROUP = "(others)", "(none)"
NONE = -1  # of a label or group
_POINTS = 100

Values = NDArray[np.float64]
Rows = slice | NDArray[np.intp]
"""Numbers of rows in a survey."""


@dataclass(eq=False)
class Survey:
    """Every row in columns, in the order of the datasets.

    The values lie in a file without a name and are read column by column, so that memory grows by no more than some
    bytes for each row.

    Attributes:
        run: The run.
        datasets: What was scored, the clean references last.
        references: How many of them are clean references.
        gauges: How many gauges there are.
        seed: Of the bootstraps.
        table: By row, as `_kind` has it.
        labels: Label of each code, of rows that are not references and have values.
        groups: Dataset and group of each code.
    """

    run: RunFolder
    datasets: Sequence[Dataset]
    references: int
    gauges: int
    seed: int = 0
    table: NDArray[Any] = field(init=False)
    labels: list[str] = field(default_factory=list)
    groups: list[tuple[int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        fields = [("dataset", "i4"), ("number", "i8"), ("tokens", "i8"), ("rejected", "?"), ("tools", "?")]
        codes = [("label", "i4"), ("group", "i4")]
        kind = np.dtype([*fields, *codes, ("values", "f8", (len(QUANTITIES), self.gauges))])
        with named(self.run.path, RunError), TemporaryFile(dir=self.run.path) as file:
            for rows in scored_windows(self.run, self.gauges):
                np.array([self._entry(row) for row in rows], kind).tofile(file)
            file.flush()
            self.table = np.memmap(file, kind, "r") if file.tell() else np.empty(0, kind)

    def _entry(self, row: ScoredRow) -> tuple[Any, ...]:
        bad = row.problem is not None
        about = (row.dataset, row.number, row.tokens, bad, bad and CALLS_TOOLS in str(row.problem))
        return (*about, self._label(row), self._group(row), row.values)

    def _label(self, row: ScoredRow) -> int:
        if row.label is None or row.problem is not None or row.dataset >= self.first_reference:
            return NONE
        if row.label not in self.labels:
            if len(self.labels) == MOST_LABELS:
                raise ScreeningError(
                    f"the column of labels has more than {MOST_LABELS} different values, such as {row.label[:40]!r}; "
                    "name one of few"
                )
            self.labels.append(row.label)
        return self.labels.index(row.label)

    def _group(self, row: ScoredRow) -> int:
        if self.datasets[row.dataset].by is None:
            return NONE
        key = (row.dataset, NO_GROUP if row.group is None else row.group)
        if key not in self.groups and sum(number == row.dataset for number, _ in self.groups) >= MOST_GROUPS:
            key = (row.dataset, OTHERS)
        if key not in self.groups:
            self.groups.append(key)
        return self.groups.index(key)

    @property
    def first_reference(self) -> int:
        """Number of the first dataset that is a clean reference."""
        return len(self.datasets) - self.references

    def rows_of(self, first: int, stop: int) -> slice:
        """The rows of some datasets that follow each other."""
        start, end = np.searchsorted(self.table["dataset"], (first, stop))
        return slice(int(start), int(end))

    def column(self, quantity: Quantity, gauge: int) -> Values:
        """Float64 [rows]; NaN where a row lacks the quantity."""
        return np.asarray(self.table["values"][:, QUANTITIES.index(quantity), gauge])

    def tally(self, rows: Rows, gauges: Sequence[str], *numbers: int) -> dict[str, Any]:
        """Counts of rows, and by gauge and quantity the mean with its interval, as JSON values.

        Args:
            rows: Which.
            gauges: Names of the first gauges, those of traits.
            numbers: What the seed of the resampling depends on.
        """
        seed = int(np.random.SeedSequence((self.seed, *numbers)).generate_state(1)[0])
        means: dict[str, dict[str, Any]] = {gauge: {} for gauge in gauges}
        for number, gauge in enumerate(gauges):
            for quantity in QUANTITIES:
                found = mean_of(self.column(quantity, number)[rows], seed)
                means[gauge][quantity.value] = found.to_json() if found else None
        rejected, tools = (int(self.table[name][rows].sum()) for name in ("rejected", "tools"))
        count, tokens = len(self.table["tokens"][rows]), int(self.table["tokens"][rows].sum())
        counts = {"rows": count, "rejected": rejected, "call_tools": tools, "tokens": tokens}
        return {**counts, "means": means if count else {}}


def mean_of(values: Values, seed: int = 0) -> Estimate | None:
    """The mean of rows that may lack a quantity (NaN), with its 95% interval; None where no row has it."""
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    if len(values) <= KEPT:
        return bootstrap_mean(known.tolist(), seed)
    mean = float(known.mean())
    return large_mean(mean, float(((known - mean) ** 2).sum()), len(known))


def largest(values: Values, most: int) -> NDArray[np.intp]:
    """Places of the largest values, the largest first and of equal ones the earlier; NaN is left out."""
    there = np.flatnonzero(np.isfinite(values))
    found: NDArray[np.intp] = there[np.argsort(-values[there], kind="stable")[:most]]
    return found


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


class Band(StrEnum):
    """Where rows are undecided."""

    INTERVAL = "interval"  # within the 95% interval of the threshold
    NONE = "none"  # nowhere: above the threshold is flagged


@dataclass(frozen=True)
class RowThreshold(Record):
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


def _at(ordered: NDArray[np.float64], rate: float) -> float:
    return float(np.quantile(ordered, 1 - rate, method="inverted_cdf"))


def decide(thresholds: Sequence[RowThreshold], scores: NDArray[np.float64]) -> NDArray[np.int8]:
    """What becomes of rows: flagged if any trait flags them, else undecided if any is (as without a value), else kept.

    Args:
        thresholds: One for each trait's gauge.
        scores: float64 [rows, traits].

    Returns:
        Of each row the place of its decision in `DECISIONS`.
    """
    low, high = (np.array([getattr(each, end) for each in thresholds]) for end in ("low", "high"))
    flagged, kept = (scores > high).any(axis=1), (scores <= low).all(axis=1)
    places = [DECISIONS.index(each) for each in (Decision.FLAGGED, Decision.KEPT, Decision.UNDECIDED)]
    return np.select([flagged, kept], places[:2], places[2]).astype(np.int8)


@dataclass(frozen=True)
class Flagging(Record):
    """How rows are ranked and flagged; part of a run's configuration.

    Attributes:
        score: By which value; None takes the difference to the base responses where every row has one, else the raw
            projection.
        false_positive_rate: Share of the reference rows that may be flagged, by each trait.
        undecided: See `persona_lens.screening.threshold_of`.
        clean: Label of clean rows; None finds one that is usual.
        random_directions: How many of them stand beside the traits where rows are labelled.
        top_k: How many rows are shown at either end.
        judged: Flagged rows of a trait that a judge is asked about at most, the largest first.
        subsets: So many rows with the largest values of the first trait, with the smallest, and drawn at random are
            written to files of their own, to be trained on; 0 writes none.

    Raises:
        ScreeningError: If a value is out of range.
    """

    score: Quantity | None = None
    false_positive_rate: float = 0.05
    undecided: Band | float = Band.INTERVAL
    clean: str | None = None
    random_directions: int = 20
    top_k: int = 10
    judged: int = 100
    subsets: int = 0

    def __post_init__(self) -> None:
        check_rates(self.false_positive_rate, self.undecided)
        for name in ("random_directions", "top_k", "judged", "subsets"):
            if getattr(self, name) < 0:
                raise ScreeningError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def resolved_score(self, settings: ScreeningSettings) -> Quantity:
        """By which value rows are flagged in a run with these settings.

        Raises:
            ScreeningError: If not every row has it.
        """
        whole = settings.base is not BaseResponses.NONE and settings.base_share == 1
        if self.score is Quantity.DIFFERENCE and not whole:
            raise ScreeningError(
                "rows are ranked by the difference to base responses, but not every row gets one; generate or supply "
                "them for all, or rank by raw or prompt_difference"
            )
        return self.score or (Quantity.DIFFERENCE if whole else Quantity.RAW)

"""Intervals and separations: the few statistics that every result here is reported with.

One interval serves everywhere. That of a mean is the studentised bootstrap over independent units (questions, most of
the time), nowhere narrower than Student's: of normal and of skewed data it covers 94% to 98% at 5 to 20 units, where
the percentile bootstrap covers 77% to 92%. That of another statistic is the interval of the mean of its jackknife
pseudo-values, on a scale where those are about normal. `tests/core/test_statistics.py` simulates the coverage.
Percentiles, which the jackknife does not serve, keep the percentile bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from persona_lens.core.documents import Record
from persona_lens.core.text import counted

RESAMPLES = 2000
FEW = 5  # units; with fewer, no interval can be relied on
LEVEL = 0.95
SCORES = (0.0, 100.0)
"""The ends of the scale that judges score on."""
CHANGES = (-100.0, 100.0)
"""The ends of differences of such scores."""
SHARES = (0.0, 1.0)  # such as of right answers
SHARE_CHANGES = (-1.0, 1.0)
_AT_ONCE = 4_000_000  # numbers drawn at once

Values = NDArray[np.float64]
Ends = tuple[float, float]
Verdict = Literal["clear", "unclear", "reversed", "no null"]


@dataclass(frozen=True)
class Estimate(Record):
    """A mean with its 95% interval.

    Attributes:
        mean: The mean.
        low: Lower end; equal to the mean where there is one unit only.
        high: Upper end.
        n: Number of units that the interval rests on.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def side(self) -> int:
        """1 or -1 if the interval is on one side of 0, else 0; a single unit has no interval to go by."""
        if self.n < 2:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def few(n: int, noun: str = "question") -> str:
    """What to say beside a figure that rests on fewer than `FEW` units, such as ``only 3 questions``; else nothing."""
    return f"only {counted(n, noun)}" if n < FEW else ""


def clear_side(change: Estimate, difference: Estimate | None) -> int:
    """Whether a change is clear: the one definition of the word here.

    Args:
        change: What a steering changes, against the unsteered model.
        difference: That minus what random directions of equal norm change, unit by unit; None without them.

    Returns:
        1 or -1 if both intervals lie on that side of 0, else 0. Without random directions, and with a single unit,
        nothing is clear.
    """
    return change.side if difference is not None and difference.side == change.side else 0


def verdict_of(change: Estimate, difference: Estimate | None, towards: int = 1) -> Verdict:
    """What may be said of a change that was to go one way.

    Args:
        change: See `clear_side`.
        difference: See `clear_side`.
        towards: 1 or -1: the side that was asked for.

    Returns:
        ``clear`` or ``reversed`` if it is clear (`clear_side`) on that side or on the other; ``no null`` if its
        interval lies on that side with nothing to compare it with, ``reversed`` if on the other; else ``unclear``.
    """
    if difference is None:
        return {towards: "no null", -towards: "reversed"}.get(change.side, "unclear")  # type: ignore[return-value]
    return {towards: "clear", -towards: "reversed"}.get(clear_side(change, difference), "unclear")  # type: ignore[return-value]


def bootstrap_mean(values: Sequence[float], seed: int = 0, *, within: Ends | None = None) -> Estimate:
    """A mean over independent units (here: questions) with the 95% interval of the studentised bootstrap.

    Without any spread there is nothing to resample: the interval is then the mean alone; or, where the ends of the
    scale are known, what a share of units that could have been missed (with a chance of 5%) may move the mean. Of
    differences of shares most may be 0, and a resample then misses the few that are not: see `_of_few_differences`.

    Args:
        values: One number a unit; average within a unit first.
        seed: Of the resampling, so that a report can be repeated exactly.
        within: Ends of the scale, such as `SCORES`; the interval does not go beyond.

    Raises:
        ValueError: If there are no values.
    """
    if not len(values):
        raise ValueError("there is nothing to take the mean of")
    data = np.asarray(values, dtype=np.float64)
    mean, n = float(data.mean()), len(data)
    if n == 1:
        return Estimate(mean, mean, mean, n)
    if within == SHARE_CHANGES and 2 * np.count_nonzero(data) <= n:
        low, high = _clipped(_of_few_differences(data), within)
    elif float(np.ptp(data)) == 0:
        low, high = (mean, mean) if within is None else _missed(mean, n, within)
    else:
        down, up = _reach(data, seed)
        low, high = _clipped((mean - down, mean + up), within)
    return Estimate(mean, low, high, n)


def large_mean(mean: float, squares: float, n: int) -> Estimate:
    """A mean over very many units, with Student's 95% interval: what `bootstrap_mean` comes to there.

    Args:
        mean: The mean.
        squares: Sum of the squared differences from it.
        n: Units.
    """
    if n == 1:
        return Estimate(mean, mean, mean, n)
    reach = _student(squares / (n - 1) / n, n - 1)
    return Estimate(mean, mean - reach, mean + reach, n)


@dataclass(frozen=True)
class Scale:
    """Where a statistic's pseudo-values are about normal.

    Attributes:
        to: From the statistic to that scale.
        back: And back.
        ends: Ends of the statistic's own scale; None if it has none.
        saturates: Whether a statistic that sits on an end, whichever unit is left out, may owe that to few units.
    """

    to: Callable[[Values], Values]
    back: Callable[[Values], Values]
    ends: Ends | None = None
    saturates: bool = False


PLAIN = Scale(np.asarray, np.asarray)
CORRELATION = Scale(np.arctanh, np.tanh, (-1.0, 1.0))  # Fisher's z
SHARE = Scale(special.logit, special.expit, SHARES, saturates=True)


def jackknifed(
    statistic: Callable[[NDArray[np.intp]], Values],
    clusters: Sequence[Hashable],
    scale: Scale | Sequence[Scale],
    seed: int = 0,
) -> list[Ends | None]:
    """95% intervals of statistics of clustered rows; None where there is one cluster only, or one is not defined.

    Args:
        statistic: From row numbers to float64 [statistics], NaN where one is undefined.
        clusters: What each row belongs to (here: its question).
        scale: Of the statistics, or of each of them.
        seed: Of the resampling.
    """
    members = _members(clusters)
    rows = np.arange(len(clusters))
    whole = np.asarray(statistic(rows), dtype=np.float64)
    if len(members) < 2:
        return [None] * len(whole)
    without = np.array([statistic(np.delete(rows, own)) for own in members])
    scales = [scale] * len(whole) if isinstance(scale, Scale) else scale
    each = zip(whole, without.T, scales, strict=True)
    return [jackknife_interval(float(value), left, own, seed) for value, left, own in each]


def jackknife_interval(value: float, without: Values, scale: Scale, seed: int = 0) -> Ends | None:
    """The 95% interval of a statistic: that of the mean of its jackknife pseudo-values.

    Args:
        value: The statistic of all units.
        without: The statistic with each unit left out in turn, NaN where it is undefined.
        scale: Of the statistic.
        seed: Of the resampling.

    Returns:
        Its ends; None if the statistic is undefined, or is without more than a tenth of the units.
    """
    defined = without[np.isfinite(without)]
    n = len(defined)
    if not np.isfinite(value) or n < max(2, 0.9 * len(without)):
        return None
    if np.ptp(defined) <= 1e-12:
        return _missed(value, n, scale.ends) if scale.saturates and scale.ends else (value, value)
    with np.errstate(divide="ignore", invalid="ignore"):
        at, others = float(scale.to(np.array([value]))[0]), scale.to(defined)
    if not (np.isfinite(at) and np.isfinite(others).all()):  # on an end of the scale, or without some unit
        scale, at, others = Scale(np.asarray, np.asarray, scale.ends), value, defined
    pseudo = n * at - (n - 1) * others
    down, up = _reach(pseudo, seed)
    low, high = scale.back(np.array([at - down, at + up])).tolist()
    return _clipped((low, high), scale.ends)


def auc_interval(positive: Values, negative: Values) -> Ends:
    """95% interval of `auc` over independent rows of both kinds: DeLong's variance on the logit scale.

    An AUC of 0 or 1, which has no variance, gets the interval of what the smaller kind may have missed.
    """
    above, below = (_wins(*each) / len(each[1]) for each in ((positive, negative), (negative, positive)))
    value = auc(positive, negative)
    parts = [_of_mean(each) for each in (above, below) if len(each) > 1]
    variance = sum(part for part, _ in parts)
    if value in SHARES or variance == 0:
        return _missed(value, min(len(positive), len(negative)), SHARES)
    reach = _student(variance, _degrees(parts)) / (value * (1 - value))
    at = special.logit(value)
    return float(special.expit(at - reach)), float(special.expit(at + reach))


def crossed_interval(table: Values, seed: int = 0, *, within: Ends | None = None) -> Ends:
    """95% interval of the mean of a table whose rows and columns are both drawn from more: runs and questions.

    The wider of two: Student's with the variance of two crossed factors and Satterthwaite's degrees of freedom, and
    that of `bootstrap_mean` over columns.

    Args:
        table: float64 [rows, columns].
        seed: Of the resampling.
        within: See `bootstrap_mean`.
    """
    rows, columns = table.mean(axis=1), table.mean(axis=0)
    over = [bootstrap_mean(each, seed, within=within) for each in (columns, rows)]
    if min(table.shape) < 2:
        found = over[0] if len(columns) > 1 else over[1]
        return found.low, found.high
    parts = [_of_mean(each) for each in (rows, columns)]
    rest = table - rows[:, None] - columns + table.mean()
    both = float((rest**2).sum()) / ((len(rows) - 1) * (len(columns) - 1)) / table.size
    variance = max(sum(part for part, _ in parts) - both, *(part for part, _ in parts))
    if variance == 0:
        return over[0].low, over[0].high
    reach = _student(variance, _degrees(parts))
    mean = float(table.mean())
    return _clipped((min(over[0].low, mean - reach), max(over[0].high, mean + reach)), within)


def _of_mean(values: Values) -> tuple[float, int]:
    """The variance of a mean, and its degrees of freedom."""
    return float(values.var(ddof=1)) / len(values), len(values) - 1


def _degrees(parts: Sequence[tuple[float, int]]) -> float:
    """Satterthwaite's degrees of freedom of a sum of variances, each with its own."""
    return sum(part for part, _ in parts) ** 2 / sum(part**2 / degrees for part, degrees in parts)


def _student(variance: float, degrees: float) -> float:
    """How far Student's interval reaches to either side."""
    return float(special.stdtrit(degrees, 0.5 + LEVEL / 2) * np.sqrt(variance))


def _reach(data: Values, seed: int) -> Ends:
    """How far the interval of a mean reaches below and above it."""
    n, width = len(data), float(np.ptp(data))
    units = (data - data.min()) / width  # so that the squares of tiny differences are not rounded to nothing
    spread = float(units.std(ddof=1))
    units = (units - units.mean()) / spread
    rng = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // n)
    drawn = [
        _studentised(units[rng.integers(n, size=(min(at_once, RESAMPLES - start), n))])
        for start in range(0, RESAMPLES, at_once)
    ]
    low, high = np.quantile(np.concatenate(drawn), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    least = _student(1 / n, n - 1)
    return width * spread * max(float(high), least), width * spread * max(-float(low), least)


def _of_few_differences(data: Values) -> Ends:
    """The interval of a mean of differences that are mostly 0, with one more at either end: Bonett and Price (2012)."""
    n, mean = len(data) + 2, float(data.mean())
    centre = float(data.sum()) / n
    reach = float(special.ndtri(0.5 + LEVEL / 2) * np.sqrt((((data**2).sum() + 2) / n - centre**2) / n))
    return min(mean, centre - reach), max(mean, centre + reach)


def _studentised(drawn: Values) -> Values:
    """The mean of each resample, [resamples, units], over its spread.

    Scores saturate, so that a resample may have no spread at all; it then counts with a small one.
    """
    found: Values = drawn.mean(axis=1) / np.maximum(drawn.std(axis=1, ddof=1), 0.5 / drawn.shape[1])
    return found


def _missed(value: float, n: int, within: Ends) -> Ends:
    """The interval of equal values: on an end of the scale, units that are elsewhere may have been missed."""
    share = 1 - (1 - LEVEL) ** (1 / n)
    low, high = within
    if value not in within:
        return value, value
    return (value - share * (high - low), value) if value == high else (value, value + share * (high - low))


def _clipped(ends: Ends, within: Ends | None) -> Ends:
    return ends if within is None else (max(ends[0], within[0]), min(ends[1], within[1]))


def _wins(these: Values, those: Values) -> Values:
    """Of each of these, how many of those it exceeds, ties counting half."""
    ordered = np.sort(those)
    found: Values = (np.searchsorted(ordered, these, "left") + np.searchsorted(ordered, these, "right")) / 2
    return found


def _members(clusters: Sequence[Hashable]) -> list[NDArray[np.intp]]:
    members: dict[Hashable, list[int]] = {}
    for row, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(row)
    return [np.asarray(found, dtype=np.intp) for found in members.values()]


def resampled_rows(clusters: Sequence[Hashable], seed: int = 0) -> Iterator[NDArray[np.intp]]:
    """Rows of each bootstrap resample: clusters are drawn with replacement, and all rows of a cluster come together.

    Args:
        clusters: What each row belongs to (here: its question).
        seed: Of the resampling.

    Yields:
        `RESAMPLES` arrays of row numbers, a row as often as its cluster was drawn.
    """
    rows = _members(clusters)
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
    # scipy.stats.mannwhitneyu works out a p-value too, which is slow in a bootstrap. Halves add up exactly, so that
    # values in equal orders have equal AUCs.
    return float(_wins(positive, negative).sum()) / (len(positive) * len(negative))


def separation(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Difference of means in units of the pooled standard deviation (d')."""
    pooled = np.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2)
    return float((positive.mean() - negative.mean()) / pooled) if pooled > 0 else 0.0

"""How far where a prompt ends goes with what its replies show, beside random directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.ma import masked_invalid
from numpy.typing import NDArray
from scipy.stats import rankdata

from persona_lens.core.documents import Record
from persona_lens.core.statistics import CORRELATION, Ends, Verdict, jackknifed, pearson

LEAST = 3  # prompts; with fewer, every correlation is a coincidence
LEAST_SD = 1.0  # points: conditions whose scores vary less are left out within conditions (method, section 5)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A number with its 95% interval over questions (`core.statistics.jackknifed`); None where undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Null:
    """The same number for random directions: its mean, and the range of the middle 95% of them; None where undefined.

    Attributes:
        mean: Over the directions.
        low: 2.5th percentile.
        high: 97.5th percentile.
        n: Directions.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class LayerCorrelation(Record):
    """Correlations at one layer.

    Attributes:
        layer: Block index, 0-based.
        pearson: Over all prompts.
        spearman: Over all prompts, of ranks.
        within_pearson: Mean over conditions of the correlation within each.
        within_spearman: The same of ranks.
        null: ``pearson`` of random directions; None if there were none.
        within_null: ``within_pearson`` of random directions.
    """

    layer: int
    pearson: Measured
    spearman: Measured
    within_pearson: Measured
    within_spearman: Measured
    null: Null | None
    within_null: Null | None

    def verdict(self, null: Null | None) -> Verdict:
        """What may be said of where prompts end, and how their replies will be.

        ``reversed`` if the interval of ``pearson`` lies below 0, ``no null`` or ``clear`` if it lies above; ``clear``
        only if the value also exceeds what 97.5% of random directions have; ``unclear`` otherwise.

        Args:
            null: Random directions that had the vector's freedom: those of this layer, or the best of all layers.
        """
        r = self.pearson
        if r.value is None or r.low is None or r.high is None:
            return "unclear"
        if r.high < 0 or r.low <= 0:
            return "reversed" if r.high < 0 else "unclear"
        if null is None or null.high is None:
            return "no null"
        return "clear" if r.value > null.high else "unclear"


@dataclass(frozen=True)
class Correlations(Record):
    """How projections at several layers go with scores.

    Attributes:
        layers: One entry a layer.
        prompts: How many prompts they rest on.
        within: Conditions that count in the means within conditions.
        left_out: Conditions whose scores vary by less than a standard deviation of `LEAST_SD`, or have too few prompts.
        best_null: The largest ``pearson`` of each random direction over all layers: what choosing the best of the
            layers alone gives. None without random directions.
    """

    layers: tuple[LayerCorrelation, ...]
    prompts: int
    within: tuple[str, ...]
    left_out: tuple[str, ...]
    best_null: Null | None

    def at(self, layer: int) -> LayerCorrelation:
        """The entry of a layer."""
        return next(each for each in self.layers if each.layer == layer)


def correlate(
    projections: Values,
    scores: Values,
    conditions: Sequence[str],
    questions: Sequence[int],
    layers: Sequence[int],
    null: Values | None = None,
    *,
    seed: int = 0,
) -> Correlations:
    """Correlate projections with scores, one pair a prompt.

    Args:
        projections: [prompts, layers].
        scores: [prompts], the mean score of each prompt's responses.
        conditions: Name of each prompt's condition.
        questions: Number of each prompt's question; intervals are over questions.
        layers: Block indices.
        null: [prompts, random directions, layers].
        seed: Of the resampling.
    """
    groups = {name: np.flatnonzero(np.array([c == name for c in conditions])) for name in dict.fromkeys(conditions)}
    used = [name for name, rows in groups.items() if len(rows) >= LEAST and scores[rows].std(ddof=1) >= LEAST_SD]
    code = np.array([used.index(name) if name in used else -1 for name in conditions])
    measured = _statistics(projections, scores, code)
    ends = jackknifed(
        lambda rows: _statistics(projections[rows], scores[rows], code[rows]).ravel(), questions, CORRELATION, seed
    )
    intervals = [ends[kind * len(layers) : (kind + 1) * len(layers)] for kind in range(4)]
    nulls = None
    if null is not None:
        flat = null.reshape(len(null), -1)
        nulls = _statistics(flat, scores, code)[[0, 2]].reshape(2, *null.shape[1:])  # pearson, and that within
    found = []
    for at, layer in enumerate(layers):
        four = (_measured(measured[kind, at], intervals[kind][at]) for kind in range(4))
        beside = (None, None) if nulls is None else (_null(nulls[0, :, at]), _null(nulls[1, :, at]))
        found.append(LayerCorrelation(layer, *four, *beside))  # type: ignore[arg-type]  # a star hides which is which
    return Correlations(
        tuple(found),
        len(scores),
        tuple(used),
        tuple(name for name in groups if name not in used),
        None if nulls is None else _null(masked_invalid(nulls[0]).max(axis=1).filled(np.nan)),
    )


def _statistics(x: Values, y: Values, code: NDArray[np.int64]) -> Values:
    """[pearson, spearman, within pearson, within spearman] by column of x; NaN where one is not defined.

    Within is the mean over the groups with one code; those of -1 are left out, and those of few rows.
    """
    groups = [rows for each in np.unique(code[code >= 0]) if len(rows := np.flatnonzero(code == each)) >= LEAST]
    undefined = np.full((1, x.shape[1]), np.nan)
    found = []
    for ranked in (False, True):
        overall = _r(x, y, ranked) if len(y) >= LEAST else undefined[0]
        within = np.array([_r(x[rows], y[rows], ranked) for rows in groups] or undefined)
        found.append((overall, masked_invalid(within).mean(axis=0).filled(np.nan)))
    return np.array([found[0][0], found[1][0], found[0][1], found[1][1]])


def _r(x: Values, y: Values, ranked: bool) -> Values:
    return pearson(rankdata(x, axis=0), rankdata(y)) if ranked else pearson(x, y)


def _measured(value: float, interval: Ends | None) -> Measured:
    if not np.isfinite(value):
        return Measured(None, None, None)
    return Measured(float(value), *(interval or (None, None)))


def _null(values: Values) -> Null:
    defined = values[np.isfinite(values)]
    if not len(defined):
        return Null(None, None, None, 0)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Null(float(defined.mean()), float(low), float(high), len(defined))

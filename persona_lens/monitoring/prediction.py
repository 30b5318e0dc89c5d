"""How well the end of a prompt foretells replies: correlations beside random directions, and probability curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.ma import masked_invalid
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import isotonic_regression
from scipy.special import expit, logit
from scipy.stats import rankdata

from persona_lens.core.documents import Record
from persona_lens.core.statistics import CORRELATION, Ends, Verdict, jackknifed, pearson
from persona_lens.judging.reading import fit_logistic
from persona_lens.monitoring.gauges import MonitoringError

LEAST = 3  # prompts; with fewer, every correlation is a coincidence
LEAST_SD = 1.0  # points: conditions whose scores vary less are left out within conditions (method, section 5)
FOLDS = 5
DIGITS = 9  # the last bits of an optimiser must not decide whether two runs agree

Values = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """A number with its 95% interval over questions (`core.statistics.jackknifed`); None where undefined."""

    value: float | None
    low: float | None
    high: float | None

    @staticmethod
    def of(value: float, interval: Ends | None) -> Measured:
        """A number that may be NaN, whose interval may be missing."""
        if not np.isfinite(value):
            return Measured(None, None, None)
        return Measured(float(value), *(interval or (None, None)))


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

    @staticmethod
    def of(values: Values) -> Null:
        """The values of all directions, NaN where one is undefined."""
        defined = values[np.isfinite(values)]
        if not len(defined):
            return Null(None, None, None, 0)
        low, high = np.percentile(defined, [2.5, 97.5])
        return Null(float(defined.mean()), float(low), float(high), len(defined))


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
        four = (Measured.of(measured[kind, at], intervals[kind][at]) for kind in range(4))
        beside = (None, None) if nulls is None else (Null.of(nulls[0, :, at]), Null.of(nulls[1, :, at]))
        found.append(LayerCorrelation(layer, *four, *beside))  # type: ignore[arg-type]  # a star hides which is which
    return Correlations(
        tuple(found),
        len(scores),
        tuple(used),
        tuple(name for name in groups if name not in used),
        None if nulls is None else Null.of(masked_invalid(nulls[0]).max(axis=1).filled(np.nan)),
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


@dataclass(frozen=True, eq=False)
class Observations:
    """What prompts were followed by.

    Attributes:
        projections: Of each prompt's last token, residual-stream units.
        shown: How many of its responses show the trait.
        responses: How many of its responses have a score, at least 1.
        questions: Number of its question; prompts that share one are not independent.
    """

    projections: Values
    shown: Counts
    responses: Counts
    questions: Counts

    @staticmethod
    def of(
        projections: Sequence[float], shown: Sequence[int], responses: Sequence[int], questions: Sequence[int]
    ) -> Observations:
        """From plain numbers.

        Raises:
            MonitoringError: If there are none, or they do not go together.
        """
        lengths = {len(projections), len(shown), len(responses), len(questions)}
        if len(lengths) > 1 or not projections or min(responses) < 1:
            raise MonitoringError("a calibration needs for each prompt a projection, a question and a scored response")
        if not np.isfinite(np.asarray(projections, float)).all():
            raise MonitoringError("a calibration needs finite projections")
        if any(not 0 <= k <= n for k, n in zip(shown, responses, strict=True)):
            raise MonitoringError("of a prompt's responses, between none and all show the trait")
        return Observations(
            np.asarray(projections, np.float64), *(np.asarray(v, np.int64) for v in (shown, responses, questions))
        )

    def rows(self, rows: NDArray[Any]) -> Observations:
        """Some of them, by number or mask."""
        return Observations(self.projections[rows], self.shown[rows], self.responses[rows], self.questions[rows])

    def folds(self) -> Iterator[tuple[NDArray[np.bool_], Observations]]:
        """Each part that is held out, as a mask, and the others; a question is never on both sides."""
        questions, place = np.unique(self.questions, return_inverse=True)
        for fold in range(min(FOLDS, len(questions))):
            held_out = place % min(FOLDS, len(questions)) == fold
            yield held_out, self.rows(~held_out)

    @property
    def share(self) -> float:
        """The share of responses that show the trait, one more of each kind counted, so that it is never 0 or 1."""
        return float((self.shown.sum() + 1) / (self.responses.sum() + 2))


@dataclass(frozen=True)
class Logistic(Record):
    """1 / (1 + exp(-(slope * projection + intercept))); the slope is never negative."""

    slope: float
    intercept: float
    kind: Literal["logistic"] = "logistic"

    @staticmethod
    def fit(observations: Observations) -> Logistic:
        """Fit a curve by Platt's method.

        It is flat at the share that shows the trait where a rising one cannot be fitted: if all or none do, or if more
        projection goes with less of the trait.
        """
        flat = Logistic(0.0, round(float(logit(observations.share)), DIGITS))
        x, shown, responses = observations.projections, observations.shown, observations.responses
        if not 0 < shown.sum() < responses.sum() or np.ptp(x) == 0:
            return flat
        yes = np.concatenate([np.arange(n) < k for k, n in zip(shown, responses, strict=True)])
        slope, intercept = fit_logistic(np.repeat(x, responses), yes)
        return Logistic(slope, intercept) if slope > 0 else flat

    def probability(self, projections: Values) -> Values:
        """Of each projection."""
        found: Values = expit(self.slope * projections + self.intercept)
        return found


@dataclass(frozen=True)
class Isotonic(Record):
    """The steps that fit best among all that never fall, with straight lines between them.

    Attributes:
        projections: Where the steps begin and end, ascending; at least one.
        probabilities: There.

    Raises:
        ValueError: If there is none, or not a probability for each.
    """

    projections: tuple[float, ...]
    probabilities: tuple[float, ...]
    kind: Literal["isotonic"] = "isotonic"

    def __post_init__(self) -> None:
        if not self.projections or len(self.projections) != len(self.probabilities):
            raise ValueError("a curve has as many probabilities as projections, and at least one")

    @staticmethod
    def fit(observations: Observations) -> Isotonic:
        """Fit the best curve that never falls.

        No probability is nearer to 0 or 1 than one more response of the other kind would leave it.
        """
        places, where = np.unique(observations.projections, return_inverse=True)
        total = np.bincount(where, weights=observations.responses)
        share = np.bincount(where, weights=observations.shown) / total
        n = observations.responses.sum()
        fitted = isotonic_regression(share, weights=total).x
        fitted = np.clip(fitted, 1 / (n + 2), (n + 1) / (n + 2)).round(DIGITS)
        # Within a step only its ends are needed.
        changes = np.r_[True, fitted[1:] != fitted[:-1]]
        ends = changes | np.r_[changes[1:], True]
        return Isotonic(tuple(places[ends].tolist()), tuple(fitted[ends].tolist()))

    def probability(self, projections: Values) -> Values:
        """Of each projection; beyond the ends as at the ends."""
        found: Values = np.interp(projections, self.projections, self.probabilities)
        return found


Curve = Annotated[Logistic | Isotonic, Field(discriminator="kind")]
KINDS: dict[str, type[Logistic] | type[Isotonic]] = {"logistic": Logistic, "isotonic": Isotonic}

"""Curves from a projection to the probability that the reply shows the trait, and what they are fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import isotonic_regression
from scipy.special import expit, logit

from persona_lens.core.documents import Record
from persona_lens.judging.reading import fit_logistic
from persona_lens.monitoring.gauges import MonitoringError

FOLDS = 5
DIGITS = 9  # the last bits of an optimiser must not decide whether two runs agree

Values = NDArray[np.float64]
Counts = NDArray[np.int64]


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

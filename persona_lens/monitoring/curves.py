"""Curves from a projection to the probability that the reply shows the trait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.special import expit, logit

from persona_lens.core.errors import PersonaLensError
from persona_lens.judging.likelihood import fit_logistic


class MonitoringError(PersonaLensError):
    """What cannot be monitored or shown; where one row of a file is at fault, the message begins with its place."""


Values = NDArray[np.float64]
Counts = NDArray[np.int64]
DIGITS = 9  # the last bits of an optimiser must not decide whether two runs agree


@dataclass(frozen=True)
class Logistic:
    """1 / (1 + exp(-(slope * projection + intercept))); the slope is never negative."""

    slope: float
    intercept: float

    def probability(self, projections: Values) -> Values:
        """Of each projection."""
        found: Values = expit(self.slope * projections + self.intercept)
        return found

    def to_json(self) -> dict[str, Any]:
        """The parameters by name."""
        return {"kind": "logistic", "slope": self.slope, "intercept": self.intercept}


@dataclass(frozen=True)
class Isotonic:
    """The steps that fit best among all that never fall, with straight lines between them.

    Attributes:
        projections: Where the steps begin and end, ascending.
        probabilities: There.
    """

    projections: tuple[float, ...]
    probabilities: tuple[float, ...]

    def probability(self, projections: Values) -> Values:
        """Of each projection; beyond the ends as at the ends."""
        found: Values = np.interp(projections, self.projections, self.probabilities)
        return found

    def to_json(self) -> dict[str, Any]:
        """The parameters by name."""
        return {
            "kind": "isotonic",
            "projections": list(self.projections),
            "probabilities": list(self.probabilities),
        }


Curve = Logistic | Isotonic


def curve_from_json(value: Mapping[str, Any]) -> Curve:
    """The curve that ``to_json`` gave.

    Raises:
        KeyError, TypeError, ValueError: If it did not.
    """
    if value["kind"] == "logistic":
        return Logistic(float(value["slope"]), float(value["intercept"]))
    if value["kind"] != "isotonic" or not value["projections"]:
        raise ValueError(f"unknown curve {value['kind']!r}")
    projections = tuple(map(float, value["projections"]))
    probabilities = tuple(map(float, value["probabilities"]))
    if len(projections) != len(probabilities):
        raise ValueError("a curve has as many probabilities as projections")
    return Isotonic(projections, probabilities)


def fit_logistic_curve(projections: Values, shown: Counts, responses: Counts) -> Logistic:
    """Fit a logistic curve by Platt's method.

    It is flat at the share that shows the trait where a rising one cannot be fitted: if all or none do, or if more
    projection goes with less of the trait.

    Args:
        projections: One a prompt.
        shown: How many of the prompt's responses show the trait.
        responses: How many it has.
    """
    flat = Logistic(0.0, round(float(logit(share_shown(shown, responses))), DIGITS))
    if not 0 < shown.sum() < responses.sum() or np.ptp(projections) == 0:
        return flat
    each = np.repeat(projections, responses)
    yes = np.concatenate([np.arange(n) < k for k, n in zip(shown, responses, strict=True)])
    slope, intercept = fit_logistic(each, yes)
    return Logistic(slope, intercept) if slope > 0 else flat


def fit_isotonic_curve(projections: Values, shown: Counts, responses: Counts) -> Isotonic:
    """Fit the best curve that never falls (arguments as for `fit_logistic_curve`).

    No probability is nearer to 0 or 1 than one more response of the other kind would leave it.
    """
    places, where = np.unique(projections, return_inverse=True)
    total = np.bincount(where, weights=responses)
    share = np.bincount(where, weights=shown) / total
    fitted = isotonic_regression(share, weights=total).x
    n = responses.sum()
    fitted = np.clip(fitted, 1 / (n + 2), (n + 1) / (n + 2)).round(DIGITS)
    # Within a step only its ends are needed.
    changes = np.r_[True, fitted[1:] != fitted[:-1]]
    ends = changes | np.r_[changes[1:], True]
    return Isotonic(tuple(places[ends].tolist()), tuple(fitted[ends].tolist()))


def share_shown(shown: Counts, responses: Counts) -> float:
    """The share of responses that show the trait, one more of each kind counted, so that it is never 0 or 1."""
    return float((shown.sum() + 1) / (responses.sum() + 2))

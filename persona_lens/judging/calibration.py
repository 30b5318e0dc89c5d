"""From a judge's evidence to 0-100: a logistic curve fitted on responses whose arm is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from persona_lens.judging.protocol import JudgingError


@dataclass(frozen=True)
class Calibration:
    """Score = 100 / (1 + exp(-(slope * evidence + intercept))).

    Attributes:
        slope: Per unit of evidence; positive when more evidence means more of the trait.
        intercept: Log-odds at no evidence.
    """

    slope: float
    intercept: float

    def score(self, evidence: float) -> float:
        """The score of one piece of evidence, 0 to 100."""
        return 100 * float(expit(self.slope * evidence + self.intercept))

    def to_json(self) -> dict[str, float]:
        """The parameters by name."""
        return asdict(self)


def fit_calibration(evidence: Sequence[float], positive: Sequence[bool]) -> Calibration:
    """Fit the curve to responses from both arms, by Platt's method.

    Platt's targets stand a little inside 0 and 1, so that arms which do not overlap still have a finite fit.

    Args:
        evidence: One number a response.
        positive: Whether it was written under the trait's positive instruction.

    Raises:
        JudgingError: If an arm is empty, or the evidence tells nothing, or the wrong way round.
    """
    x, y = np.asarray(evidence, dtype=np.float64), np.asarray(positive, dtype=bool)
    n_positive, n_negative = int(y.sum()), int((~y).sum())
    if not n_positive or not n_negative:
        empty = "negative" if n_positive else "positive"
        raise JudgingError(f"there is no response of the {empty} arm to calibrate the likelihood judge on")
    if np.ptp(x) == 0:  # the deviation of equal numbers need not round to 0
        raise JudgingError("all responses have the same evidence; the likelihood judge cannot tell them apart")
    slope, intercept = fit_logistic(x, y)
    if slope <= 0:
        raise JudgingError(
            "responses of the positive arm show less of the trait than those of the negative arm: the model does not "
            "follow the trait's instructions, or the arms are swapped in the trait file"
        )
    return Calibration(slope, intercept)


def fit_logistic(x: NDArray[np.float64], y: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and intercept of the log-odds that ``y`` is true, by Platt's method; both values of it must be there.

    Args:
        x: One number a case, not all the same.
        y: Whether it was one.
    """
    n_true, n_false = int(y.sum()), int((~y).sum())
    mean, spread = x.mean(), x.std()
    z = (x - mean) / spread
    target = np.where(y, (n_true + 1) / (n_true + 2), 1 / (n_false + 2))

    def loss(parameters: np.ndarray) -> float:
        logits = parameters[0] * z + parameters[1]
        return float(np.mean(np.logaddexp(0, logits) - target * logits))

    slope, intercept = minimize(loss, np.zeros(2), method="BFGS").x
    # Rounded so that the last bits of the optimiser do not decide whether two runs agree.
    return round(float(slope / spread), 9), round(float(intercept - slope * mean / spread), 9)

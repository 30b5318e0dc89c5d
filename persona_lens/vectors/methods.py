"""Methods: how a direction is made of the activations that an extraction kept, at one layer.

`METHODS` holds those of this package and those that others add by an entry point. Where a model is wide and responses
are few, nothing here is as large as the square of the width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from persona_lens.core.documents import header_text
from persona_lens.core.errors import PersonaLensError, first_line
from persona_lens.core.plugins import Registry
from persona_lens.vectors.samples import Array, Samples

DIFFERENCE = "difference"


class FitError(PersonaLensError):
    """A direction that cannot be made; the message says why, and what to do."""


Direction: TypeAlias = Callable[[Samples], Array]


@dataclass(frozen=True)
class Method:
    """A way to make a direction; the object that an entry point of the group ``persona_lens.methods`` names.

    Attributes:
        name: What users call it.
        summary: What it does, in one sentence.
        source: Where it comes from.
        direction: From the responses kept at one layer to the direction, float64 [d_model], which points to the
            positive arm. It raises `FitError` where they do not suffice.
        own_length: Whether the length means something, such as a step from one arm to the other. If not, the direction
            is given the length of the difference of means at the layer.
        settings: What determines the direction besides the responses, as JSON values.
        requires: Distributions that it needs.
    """

    name: str
    summary: str
    source: str
    direction: Direction
    own_length: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    requires: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        header_text(self.settings)  # else it would fail only once the vectors are made

    def apply(self, samples: Samples) -> Array:
        """The vector: the direction with its own length, or with that of the difference of means.

        Raises:
            FitError: If the responses do not suffice, or what the method gives is no direction.
        """
        try:
            found = np.asarray(self.direction(samples), dtype=np.float64)
        except PersonaLensError:
            raise
        except Exception as error:  # a stranger's code may raise anything
            raise FitError(f"the method {self.name} fails: {first_line(error)}") from error
        if found.shape != samples.activations.shape[1:] or not np.isfinite(found).all():
            raise FitError(
                f"the method {self.name} gives no direction of {samples.activations.shape[1]} finite numbers, but "
                f"{list(found.shape)}; take another method"
            )
        length = np.linalg.norm(found)
        if self.own_length or length == 0:
            return found
        scaled: Array = found * (np.linalg.norm(samples.difference) / length)
        return scaled


def _length_controlled(samples: Samples) -> Array:
    """By Frisch, Waugh and Lovell: what of the arm is not linear in the logarithm of the length."""
    others = np.stack([np.ones(len(samples)), np.log(np.maximum(samples.length, 1))], axis=1)
    arm = samples.positive.astype(np.float64)
    rest = arm - others @ np.linalg.lstsq(others, arm, rcond=None)[0]
    if rest @ rest < 1e-9 * len(samples):
        raise FitError(
            "the lengths of the responses alone say which arm they are of, so that nothing of the arm is left once "
            "length is accounted for; take another method, or more responses"
        )
    centred = samples.activations - samples.activations.mean(axis=0)
    found: Array = centred.T @ rest / (rest @ rest)
    return found


REGULARISATION = 1.0


def _logistic(samples: Samples) -> Array:
    from sklearn.linear_model import LogisticRegression

    centred = samples.activations - samples.activations.mean(axis=0)
    scale = np.sqrt(np.mean(centred**2))
    if scale == 0:
        return np.zeros(centred.shape[1])
    probe = LogisticRegression(C=REGULARISATION, tol=1e-8, max_iter=10_000)
    found: Array = probe.fit(centred / scale, samples.positive).coef_[0] / scale
    return found


def _discriminant(samples: Samples) -> Array:
    """The inverse of the shrunk covariance within the arms, times the difference of means.

    Each arm's covariance is shrunk towards its own variances, as scikit-learn does it: it is a diagonal and a product
    of few rows, whose inverse (Woodbury) needs no matrix larger than responses by responses.
    """
    difference = samples.difference
    diagonal, factors = np.zeros_like(difference), []
    for arm in (samples.positive, ~samples.positive):
        rows = samples.activations[arm]
        if len(rows) < 2:
            raise FitError("the method lda needs two responses of each arm at least; take more samples, or difference")
        rows = rows - rows.mean(axis=0)
        spread = rows.std(axis=0)
        spread[spread == 0] = 1.0
        shrinkage, level = _ledoit_wolf(rows / spread)
        share = len(rows) / len(samples)
        diagonal += share * shrinkage * level * spread**2
        factors.append(rows * np.sqrt(share * (1 - shrinkage) / len(rows)))
    factor = np.concatenate(factors)  # [n, d_model]
    if len(samples) >= len(diagonal) or not diagonal.all():
        covariance = factor.T @ factor + np.diag(diagonal)
        found: Array = np.linalg.lstsq(covariance, difference, rcond=None)[0]
        return found
    inner = np.eye(len(factor)) + factor / diagonal @ factor.T
    weights = np.linalg.solve(inner, factor @ (difference / diagonal))
    solved: Array = (difference - factor.T @ weights) / diagonal
    return solved


def _ledoit_wolf(rows: Array) -> tuple[float, float]:
    """How far a covariance is shrunk, 0 to 1, and the variance that it is shrunk towards, by Ledoit and Wolf (2004).

    scikit-learn's own works with columns by columns; the same sums are had of rows by rows.

    Args:
        rows: [n, d_model], of mean 0.
    """
    n, width = rows.shape
    products = rows @ rows.T
    lengths = np.diag(products)
    level = float(lengths.sum()) / n / width
    squared = float((products**2).sum()) / n**2
    noise = (float((lengths**2).sum()) / n - squared) / (n * width)
    distance = squared / width - level**2
    return (min(noise, distance) / distance if distance > 0 and noise > 0 else 0.0), level


def _principal(samples: Samples) -> Array:
    one, other = samples.twins()
    if not len(one):
        raise FitError(
            "the method pca compares twins, and of no response that was kept the same question, pair and sample of the "
            "other arm was kept too; take another method"
        )
    rows = samples.activations[one] - samples.activations[other]
    component: Array = rows.T @ np.linalg.eigh(rows @ rows.T)[1][:, -1]
    return component if component @ rows.sum(axis=0) >= 0 else -component


def _built_in(*methods: Method) -> dict[str, Method]:
    return {each.name: each for each in methods}


PERSONA_VECTORS = "Chen et al., Persona Vectors (2025)"
METHODS: Registry[Method] = Registry(
    "persona_lens.methods",
    Method,
    "method",
    FitError,
    _built_in(
        Method(
            DIFFERENCE,
            "The mean of the positive responses minus the mean of the negative ones, as `extract` makes it.",
            PERSONA_VECTORS,
            lambda samples: samples.difference,
            own_length=True,
        ),
        Method(
            "length",
            "The difference of means at equal length: the arm's coefficient in a least-squares regression on the arm "
            "and the logarithm of the response's length.",
            "Frisch and Waugh, Partial Time Regressions as Compared with Individual Trends (1933)",
            _length_controlled,
            own_length=True,
            settings={"controlled": "log(tokens of the response)"},
        ),
        Method(
            "logistic",
            "The weights of a logistic regression that tells the arms apart, with an L2 penalty.",
            "Alain and Bengio, Understanding Intermediate Layers Using Linear Classifier Probes (2016)",
            _logistic,
            settings={"C": REGULARISATION, "scaled_by": "root mean square of all centred entries"},
            requires=("scikit-learn",),
        ),
        Method(
            "lda",
            "Linear discriminant analysis: the difference of means, with what varies much within the arms counting "
            "less, by a shrunk covariance.",
            "Ledoit and Wolf, A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices (2004)",
            _discriminant,
            settings={"shrinkage": "Ledoit-Wolf, by arm, towards each entry's own variance"},
        ),
        Method(
            "pca",
            "The first principal component, not centred, of the differences between twins of the two arms.",
            "Zou et al., Representation Engineering (2023); repeng's pca_center",
            _principal,
        ),
    ),
)


def methods() -> dict[str, Method]:
    """The methods by name, those of other packages too."""
    return METHODS.usable()

"""`Diagnostics`: what can be said of an extraction's vectors, layer by layer, before anything is generated under them.

That a layer's vector tells responses apart does not mean that it steers, and nothing is ranked by these figures:
`benchmarks.steerability` measures whether any of them foretells which layer does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from persona_lens.core.documents import Record

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerDiagnostics(Record):
    """One layer's. A null is what 95% of cases stay below in which there is nothing of the trait; None is not known.

    Attributes:
        layer: Block index, 0-based.
        consistency: Mean cosine of a single difference, of the two responses to one question under one pair of
            instructions, with the mean of all differences to other questions.
        consistency_null: With the arms of each question swapped at random.
        d_prime: How far apart the arms stand on the vector, on questions that it was not made from, in standard
            deviations.
        d_prime_null: On random directions.
        auc: How often a positive response stands higher there than a negative one.
        auc_null: On random directions.
        halves: Mean cosine of the vectors of two halves of the questions.
        halves_null: With the arms of each question swapped at random.
        relative_norm: Length of the vector over the mean length of the residual at the responses' tokens.
        logit_rise: The largest rise of a token's logit that the vector brings by the direct path, over that which
            random directions as long as it bring on average.
        logit_rise_null: The same of random directions.
        accessibility: How far apart the arms' mean residuals stand in standard deviations, sent through the final norm
            and the unembedding: the mean logit of the tokens that the positive arm promotes most minus that of those
            that it suppresses most, the tokens being chosen on other questions.
        accessibility_null: With tokens drawn at random.
    """

    layer: int
    consistency: float | None = None
    consistency_null: float | None = None
    d_prime: float | None = None
    d_prime_null: float | None = None
    auc: float | None = None
    auc_null: float | None = None
    halves: float | None = None
    halves_null: float | None = None
    relative_norm: float | None = None
    logit_rise: float | None = None
    logit_rise_null: float | None = None
    accessibility: float | None = None
    accessibility_null: float | None = None


MEASURES = tuple(
    each.name
    for each in fields(LayerDiagnostics)
    if each.name not in ("layer", "auc") and not each.name.endswith("_null")
)
"""What may foretell steering; not AUC, which is 1 at most layers of a clear trait."""
BEYOND = "_beyond"
BEYOND_CHANCE = tuple(f"{name}{BEYOND}" for name in MEASURES if f"{name}_null" in LayerDiagnostics.__dataclass_fields__)
"""The same minus their nulls."""


@dataclass(frozen=True)
class Diagnostics(Record):
    """Those of every layer.

    Attributes:
        trait: Name of the trait.
        reduction: Which of the vectors.
        responses: How many were kept.
        differences: How many pairs of twins are among them, which differ in nothing but the arm.
        questions: How many questions those answer.
        layers: One for each layer.
    """

    trait: str
    reduction: str
    responses: int
    differences: int
    questions: int
    layers: tuple[LayerDiagnostics, ...]

    def values(self, measure: str) -> Array | None:
        """A measure, one of `MEASURES` or `BEYOND_CHANCE`, float64 [layers]; None where some layer has none."""
        plain = measure.removesuffix(BEYOND)
        if plain != measure:
            value, null = self.values(plain), self.values(f"{plain}_null")
            return None if value is None or null is None else value - null
        found = [getattr(each, measure) for each in self.layers]
        known = [value for value in found if value is not None and isfinite(value)]
        return np.array(known) if known and len(known) == len(found) else None


def rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Values of a layer as they are kept: four digits say more than is known, and the last bits differ by machine."""
    return {
        name: None if value is None or not isfinite(value) else float(f"{value:.4g}") for name, value in values.items()
    }

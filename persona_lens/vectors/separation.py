"""How well directions tell an extraction's arms apart, on questions they were not made from, beside random directions.

Questions are cut into two folds, the even and the odd ones. A direction from one fold is tested on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from persona_lens.core.statistics import auc, separation

FOLDS = 2
RANDOM_DIRECTIONS = 20
Array = NDArray[np.float64]


def unit(rows: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
    """Rows of length one; a zero row stays."""
    found: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return found


def null_units(layers: int, d_model: int, seed: int) -> Float[Tensor, "directions layers d_model"]:
    """The random directions that others stand beside, of length one."""
    noise = torch.randn(RANDOM_DIRECTIONS, layers, d_model, generator=torch.Generator().manual_seed(seed))
    return unit(noise)


def separation_row(layer: int, folds: Sequence[tuple[Array, Array]]) -> dict[str, Any]:
    """How well projections tell the arms apart at a layer.

    Args:
        layer: Block index, 0-based.
        folds: Of each fold the projections of its positive and of its negative responses, [directions, responses]:
            first those on the direction that the other folds gave, then on each random one.

    Returns:
        ``d_prime`` and ``auc`` of the direction, averaged over folds; ``random_d_prime`` and ``random_auc``, what 19 of
        20 random directions stay below, taken the way round that separates better; and ``better``: whether the
        direction exceeds both.
    """

    def averaged(measure: Callable[[Array, Array], float]) -> Array:
        each = [[measure(p, n) for p, n in zip(positive, negative, strict=True)] for positive, negative in folds]
        mean: Array = np.mean(each, axis=0)
        return mean

    d_primes, aucs = averaged(separation), averaged(auc)
    found = {
        "d_prime": float(d_primes[0]),
        "auc": float(aucs[0]),
        "random_d_prime": float(np.quantile(np.abs(d_primes[1:]), 0.95)),
        "random_auc": float(np.quantile(np.maximum(aucs[1:], 1 - aucs[1:]), 0.95)),
    }
    better = found["d_prime"] > found["random_d_prime"] and found["auc"] > found["random_auc"]
    return {"layer": layer, **found, "better": better}

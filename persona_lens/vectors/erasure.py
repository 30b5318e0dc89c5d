"""Erasure: other traits are taken out of activations, so that no linear reading of their arms is left (LEACE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from persona_lens.vectors.samples import Array, Samples

PACKAGE = "concept-erasure"


def eraser(others: Sequence[Samples]) -> Callable[[Array], Array]:
    """What takes the arms of other runs out of activations at the same layer, by least-squares concept erasure.

    The package works with squares of the width. All that it changes lies in the span of the responses, so it is given
    them there: the same result, of matrices no larger than responses by responses.

    Args:
        others: The kept responses of each other run. All runs are erased at once, each counted from its own mean.

    Returns:
        From activations float64 [n, d_model] to the same without the other runs' arms.
    """
    from concept_erasure import LeaceFitter

    centre = np.concatenate([each.activations for each in others]).mean(axis=0)
    rows = np.concatenate([each.activations - each.activations.mean(axis=0) for each in others])
    concepts = np.zeros((len(rows), len(others)))
    start = 0
    for column, each in enumerate(others):
        concepts[start : start + len(each), column] = each.positive - each.positive.mean()
        start += len(each)
    n, width = rows.shape
    basis = np.linalg.qr(rows.T)[0] if n < width else np.eye(width)  # [d_model, at most n]
    within = rows @ basis
    # Its trace cannot grow, so that constraining it would change nothing.
    fitter = LeaceFitter(
        basis.shape[1], len(others), dtype=torch.float64, shrinkage=False, constrain_cov_trace=False
    ).update(torch.from_numpy(within), torch.from_numpy(concepts))
    fitter.sigma_xx_ = torch.from_numpy(_shrunk(within.T @ within / n, n, width) * (n - 1))
    found = fitter.eraser
    left, right = basis @ found.proj_left.numpy(), found.proj_right.numpy() @ basis.T

    def erase(activations: Array) -> Array:
        found: Array = activations - (activations - centre) @ right.T @ left.T
        return found

    return erase


def _shrunk(covariance: Array, n: int, width: int) -> Array:
    """A covariance as `concept_erasure.optimal_linear_shrinkage` shrinks it, where it stands for a wider one."""
    trace = float(np.trace(covariance))
    distance = float((covariance**2).sum()) - trace**2 / width
    share = trace**2 / n / distance if distance > 0 else 0.0
    found: Array = (1 - share) * covariance + share * trace / width * np.eye(len(covariance))
    return found

"""Means of the kept responses' activations, and how well the two arms separate on the vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from persona_lens.rollouts import Request
from persona_lens.statistics import auc, separation
from persona_lens.traits import Arm

Reductions = Callable[[], Iterator[tuple[list[int], dict[str, Tensor]]]]
FOLDS = 2
RANDOM_DIRECTIONS = 20


@dataclass
class ArmMeans:
    """Sums over the kept responses, by arm and by fold of the questions, in float64.

    Attributes:
        sums: [arm, fold] -> reduction -> float64 [layers, d_model].
        counts: [arm, fold] -> number of responses.
    """

    sums: dict[tuple[Arm, int], dict[str, Tensor]]
    counts: dict[tuple[Arm, int], int]

    def difference(self, folds: Sequence[int] = tuple(range(FOLDS))) -> dict[str, Float[Tensor, "layers d_model"]]:
        """mean(positive) - mean(negative) over the questions of the folds, by reduction, float32."""
        positive, negative = self._mean(Arm.POSITIVE, folds), self._mean(Arm.NEGATIVE, folds)
        return {name: (positive[name] - negative[name]).float() for name in positive if name in negative}

    def _mean(self, arm: Arm, folds: Sequence[int]) -> dict[str, Tensor]:
        present = [fold for fold in folds if (arm, fold) in self.sums]
        if not present:
            return {}
        count = sum(self.counts[arm, fold] for fold in present)
        names = self.sums[arm, present[0]]
        return {
            name: torch.stack([self.sums[arm, fold][name] for fold in present]).sum(dim=0) / count for name in names
        }


def arm_means(requests: Sequence[Request], kept: Sequence[bool], reductions: Reductions) -> ArmMeans:
    """Sum the kept responses' reductions, one shard in memory at a time."""
    found = ArmMeans({}, {})
    for indices, tensors in reductions():
        for position, index in enumerate(indices):
            if not kept[index]:
                continue
            key = (Arm(requests[index].labels["arm"]), fold_of(requests[index]))
            found.counts[key] = found.counts.get(key, 0) + 1
            sums = found.sums.setdefault(
                key, {name: torch.zeros_like(t[0], dtype=torch.float64) for name, t in tensors.items()}
            )
            for name, values in tensors.items():
                sums[name] += values[position].double()
    return found


def fold_of(request: Request) -> int:
    """The fold of a request's question: even and odd ones."""
    return int(request.labels["question_number"]) % FOLDS


def held_out_separation(
    requests: Sequence[Request], kept: Sequence[bool], reductions: Reductions, means: ArmMeans, seed: int
) -> list[dict[str, Any]]:
    """How well projections tell the arms apart, by layer, on questions that the direction was not made from.

    The direction comes from the even questions and is tested on the odd ones, and the other way round; the two results
    are averaged. Beside it stand random directions: some of them separate the arms quite well by luck, and a vector
    must do better than those.

    Returns:
        For each layer ``d_prime`` and ``auc`` of the vector, and ``random_d_prime`` and ``random_auc``: what 19 of 20
        random directions stay below, taken the way round that separates better; and ``better``: whether the vector
        exceeds both. Empty if a fold has fewer than two responses of one arm.
    """
    directions = [means.difference([1 - fold]).get("response_mean") for fold in range(FOLDS)]
    if any(means.counts.get((arm, fold), 0) < 2 for arm in Arm for fold in range(FOLDS)):
        return []
    units = torch.stack([_unit(d) for d in directions if d is not None])  # [fold, layers, d_model]
    noise = torch.randn(RANDOM_DIRECTIONS, *units.shape[1:], generator=torch.Generator().manual_seed(seed))
    randoms = _unit(noise)
    values: dict[tuple[Arm, int], list[Tensor]] = {(arm, fold): [] for arm in Arm for fold in range(FOLDS)}
    for indices, tensors in reductions():
        for position, index in enumerate(indices):
            if kept[index]:
                fold, h = fold_of(requests[index]), tensors["response_mean"][position]
                tried = torch.cat([units[fold].unsqueeze(0), randoms])
                found = einsum(h, tried, "layers d_model, directions layers d_model -> layers directions")
                values[Arm(requests[index].labels["arm"]), fold].append(found)
    columns = {
        key: rearrange(rows, "rows layers directions -> layers directions rows").double().numpy()
        for key, rows in values.items()
    }
    return [
        _separation_row(layer, {key: found[layer] for key, found in columns.items()}) for layer in range(units.shape[1])
    ]


def _unit(rows: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
    unit: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return unit


def _separation_row(layer: int, projections: Mapping[tuple[Arm, int], NDArray[np.float64]]) -> dict[str, Any]:
    """Of one layer's projections, [directions, rows] by arm and fold: first the vector's, then each random one's."""

    def averaged(measure: Callable[[NDArray[np.float64], NDArray[np.float64]], float]) -> NDArray[np.float64]:
        folds = [
            [measure(p, n) for p, n in zip(projections[Arm.POSITIVE, f], projections[Arm.NEGATIVE, f], strict=True)]
            for f in range(FOLDS)
        ]
        mean: NDArray[np.float64] = np.mean(folds, axis=0)
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

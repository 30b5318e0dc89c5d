"""`Components`: the few directions in which many traits' vectors of one layer differ, beside those of random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.geometry.cosines import GeometryError, stacked
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors

RANDOM_SETS = 200


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components of traits' directions at one layer, most important first.

    Attributes:
        names: The traits.
        layer: Block index, 0-based.
        reduction: Which of their vectors.
        explained: float32 [components]: each one's share of the variance.
        random_explained: float32 [components]: the share that 95% of random directions' components stay below.
        coordinates: float32 [traits, components]; the sign of a component is such that its largest one is positive.
        directions: float32 [components, d_model], of length one.
    """

    names: tuple[str, ...]
    layer: int
    reduction: str
    explained: Float[Tensor, " components"]
    random_explained: Float[Tensor, " components"]
    coordinates: Float[Tensor, "traits components"]
    directions: Float[Tensor, "components d_model"]

    def to_json(self) -> dict[str, Any]:
        """All but the directions, as JSON values."""
        return {
            "traits": list(self.names),
            "layer": self.layer,
            "reduction": self.reduction,
            "explained": self.explained.tolist(),
            "random_explained": self.random_explained.tolist(),
            "coordinates": self.coordinates.tolist(),
        }


def principal_components(
    vectors: Mapping[str, PersonaVectors],
    layer: int,
    reduction: str = DEFAULT_REDUCTION,
    *,
    normalised: bool = True,
    centred: bool = True,
    seed: int = 0,
) -> Components:
    """Principal components of the directions of several traits at one layer.

    Args:
        vectors: By name, all of one model; at least three.
        layer: Block index, 0-based.
        reduction: Which of the vectors.
        normalised: Take directions of length one, so that long vectors do not outweigh the others.
        centred: Subtract the mean direction first. It is what all the traits share, such as the direction in which
            anything told to play a part differs; left in, it is often the first component.
        seed: Of the random directions.

    Raises:
        GeometryError: If there are fewer than three vectors, or they are of different models.
        VectorsError: If there is no such layer or reduction, or a vector has none there.
    """
    if len(vectors) < 3:
        raise GeometryError(f"{len(vectors)} vectors have no components worth the name; give at least three")
    stacked(vectors, reduction)  # of one model, or refused
    given = torch.stack([each.vector(layer, reduction) for each in vectors.values()]).double()
    rows = _prepared(given, normalised, centred)
    kept = len(rows) - centred
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    coordinates, directions = (left * sizes)[:, :kept], right[:kept]
    signs = coordinates.gather(0, coordinates.abs().argmax(dim=0, keepdim=True)).sign()
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return Components(
        tuple(vectors),
        layer,
        reduction,
        _shares(rows)[:kept].float(),
        _random_shares(given, normalised, centred, seed)[:kept].float(),
        (coordinates * signs).float(),
        (directions * signs.T).float(),
    )


def _prepared(rows: Tensor, normalised: bool, centred: bool) -> Tensor:
    rows = rows / rows.norm(dim=-1, keepdim=True) if normalised else rows
    return rows - rows.mean(dim=0) if centred else rows


def _shares(rows: Tensor) -> Tensor:
    """Each component's share of the variance, largest first, by the small side of the rows."""
    variances = torch.linalg.eigvalsh(rows @ rows.T).flip(0).clamp(min=0)
    shares: Tensor = variances / variances.sum().clamp(min=1e-300)
    return shares


def _random_shares(given: Tensor, normalised: bool, centred: bool, seed: int) -> Tensor:
    """What 95% of random directions of the same lengths stay below."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(RANDOM_SETS):
        noise = torch.randn(given.shape, generator=generator, dtype=torch.float64)
        noise *= given.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        found.append(_shares(_prepared(noise, normalised, centred)))
    return torch.stack(found).quantile(0.95, dim=0)

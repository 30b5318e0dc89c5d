"""`Cosines`: how alike the directions of several traits are, layer by layer, beside what random directions would be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.errors import PersonaLensError
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors

CHANCE = 2.0
"""Standard deviations of a random cosine to either side within which about 95% of them lie."""


class GeometryError(PersonaLensError):
    """Vectors that cannot be compared."""


@dataclass(frozen=True, eq=False)
class Cosines:
    """Cosine of every pair of traits at every layer.

    Two independent random directions in d dimensions have a cosine of mean 0 and standard deviation 1/sqrt(d): what is
    within twice that says nothing. More than that says that two directions are alike, not why: the residual streams of
    language models have directions of their own that many differences of means share.

    Attributes:
        names: The traits, in the order of both axes.
        reduction: Which of their vectors.
        d_model: Width of the residual stream.
        values: float32 [layers, traits, traits], symmetric; NaN where a vector is zero.
    """

    names: tuple[str, ...]
    reduction: str
    d_model: int
    values: Float[Tensor, "layers traits traits"]

    @property
    def null_std(self) -> float:
        """Standard deviation of the cosine of two random directions."""
        return 1 / sqrt(self.d_model)

    def at(self, layer: int) -> Float[Tensor, "traits traits"]:
        """The matrix of one layer.

        Raises:
            GeometryError: If there is no such layer.
        """
        if not 0 <= layer < len(self.values):
            raise GeometryError(f"layer {layer} does not exist: the model has layers 0 to {len(self.values) - 1}")
        matrix: Tensor = self.values[layer]
        return matrix

    def to_json(self) -> dict[str, Any]:
        """The values by name, None where a cosine is undefined."""
        return {
            "traits": list(self.names),
            "reduction": self.reduction,
            "d_model": self.d_model,
            "null_std": self.null_std,
            "cosines": [
                [[value if isfinite(value) else None for value in row] for row in matrix]
                for matrix in self.values.tolist()
            ],
        }


def cosines(vectors: Mapping[str, PersonaVectors], reduction: str = DEFAULT_REDUCTION) -> Cosines:
    """How alike the directions of traits are.

    Args:
        vectors: By name, all of one model.
        reduction: Which of the vectors.

    Raises:
        GeometryError: If there are no vectors, or they are of different models.
        VectorsError: If there is no such reduction.
    """
    rows, first = stacked(vectors, reduction)
    units = rows / rows.norm(dim=-1, keepdim=True)
    values = torch.einsum("lad,lbd->lab", units, units).clamp(-1, 1).float()
    return Cosines(tuple(vectors), reduction, first.model.d_model, values)


def stacked(
    vectors: Mapping[str, PersonaVectors], reduction: str
) -> tuple[Float[Tensor, "layers traits d_model"], PersonaVectors]:
    """The rows of several vectors side by side, in float64, and the first of the vectors.

    Raises:
        GeometryError: If there are no vectors, or they are of different models.
        VectorsError: If there is no such reduction, or it is not taken over the same kind of tokens.
    """
    if not vectors:
        raise GeometryError("there are no vectors to compare")
    first_name, first = next(iter(vectors.items()))
    for name, other in vectors.items():
        if different := first.model.differences(other.model):
            raise GeometryError(
                f"the vectors of {first_name!r} and {name!r} belong to different models ({'; '.join(different)}), so "
                "their directions have nothing to do with each other; give vectors of one model"
            )
        first.check_alike(other, reduction)
    return torch.stack([each.rows(reduction) for each in vectors.values()], dim=1).double(), first


def layer_cosines(vectors: PersonaVectors, reduction: str = DEFAULT_REDUCTION) -> Float[Tensor, "layers layers"]:
    """How alike one trait's directions at different layers are: float32, NaN where there is no vector.

    Layers share the residual stream, so that neighbours are alike: a block only adds to what it gets.

    Raises:
        VectorsError: If there is no such reduction.
    """
    rows = vectors.rows(reduction).double()
    units = rows / rows.norm(dim=-1, keepdim=True)
    values: Tensor = (units @ units.T).clamp(-1, 1).float()
    return values

"""`Likeness`: how far two makings of a vector agree: of two seeds, two judges, a model and its finetuned copy."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.geometry.cosines import GeometryError
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors


@dataclass(frozen=True, eq=False)
class Likeness:
    """Two vectors, layer by layer.

    Attributes:
        names: Their traits.
        reduction: Which of their vectors.
        cosines: float32 [layers]; NaN where one of them has no vector.
        lengths: float32 [layers]: length of the second over that of the first.
        null_std: Standard deviation of the cosine of two random directions of this width.
        differences: What makes their models different, in words; empty for one model.
    """

    names: tuple[str, str]
    reduction: str
    cosines: Float[Tensor, " layers"]
    lengths: Float[Tensor, " layers"]
    null_std: float
    differences: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The values by name, None where one is undefined."""
        return {
            "traits": list(self.names),
            "reduction": self.reduction,
            "null_std": self.null_std,
            "different_models": list(self.differences),
            "cosines": [value if isfinite(value) else None for value in self.cosines.tolist()],
            "lengths": [value if isfinite(value) else None for value in self.lengths.tolist()],
        }


def likeness(
    one: PersonaVectors, other: PersonaVectors, reduction: str = DEFAULT_REDUCTION, *, allow_other_model: bool = False
) -> Likeness:
    """How far two vectors agree, layer by layer.

    Args:
        one: The first.
        other: The second.
        reduction: Which of their vectors.
        allow_other_model: Compare vectors of two models of one size, such as a model and its finetuned copy. The
            directions of models that were not trained from one another have nothing to do with each other.

    Raises:
        GeometryError: If they are of different models and that is not allowed, or of models of different sizes.
        VectorsError: If there is no such reduction.
    """
    different = one.model.differences(other.model)
    sizes = [(each.model.n_layers, each.model.d_model) for each in (one, other)]
    if sizes[0] != sizes[1]:
        raise GeometryError(
            f"the vectors belong to models of different sizes ({sizes[0][0]} layers of {sizes[0][1]}, and "
            f"{sizes[1][0]} of {sizes[1][1]}), so they cannot be compared"
        )
    if different and not allow_other_model:
        raise GeometryError(
            f"the vectors belong to different models ({'; '.join(different)}); if one is a finetuned copy of the "
            "other, allow it with allow_other_model (--allow-other-model)"
        )
    a, b = one.rows(reduction).double(), other.rows(reduction).double()
    cosines = torch.einsum("ld,ld->l", a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True))
    return Likeness(
        (one.trait, other.trait),
        reduction,
        cosines.clamp(-1, 1).float(),
        (b.norm(dim=-1) / a.norm(dim=-1)).float(),
        1 / sqrt(one.model.d_model),
        tuple(different),
    )

"""Geometry: cosines between directions of traits and layers, their components, how alike two makings are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.core.documents import Record
from persona_lens.core.errors import PersonaLensError
from persona_lens.vectors.provenance import DEFAULT_REDUCTION, OWN_REDUCTION
from persona_lens.vectors.vectors import PersonaVectors

CHANCE = 2.0
"""Standard deviations of a random cosine to either side within which about 95% of them lie."""


class GeometryError(PersonaLensError):
    """Vectors that cannot be compared."""


@dataclass(frozen=True, eq=False)
class Cosines(Record):
    """Cosine of every pair of traits at every layer.

    Two independent random directions in d dimensions have a cosine of mean 0 and standard deviation 1/sqrt(d): what is
    within twice that says nothing. More than that says that two directions are alike, not why: the residual streams of
    language models have directions of their own that many differences of means share.

    Attributes:
        traits: In the order of both axes.
        reduction: Which of their vectors.
        d_model: Width of the residual stream.
        null_std: Standard deviation of the cosine of two random directions.
        cosines: float32 [layers, traits, traits], symmetric; NaN where a vector is zero.
    """

    traits: tuple[str, ...]
    reduction: str
    d_model: int
    null_std: float
    cosines: Float[Tensor, "layers traits traits"]


def cosines(vectors: Mapping[str, PersonaVectors], reduction: str = OWN_REDUCTION) -> Cosines:
    """How alike the directions of traits are.

    Args:
        vectors: By name, all of one model.
        reduction: Which of the vectors.

    Raises:
        GeometryError: If there are no vectors, or they are of different models.
        VectorsError: If there is no such reduction.
    """
    reduction = _shared(reduction, *vectors.values())
    units = _units(_stacked(vectors, reduction))
    d_model = units.shape[-1]
    values = torch.einsum("lad,lbd->lab", units, units).clamp(-1, 1).float()
    return Cosines(tuple(vectors), reduction, d_model, chance(d_model), values)


def _shared(reduction: str, *vectors: PersonaVectors) -> str:
    """The reduction that is asked for, or the own one of all; where these differ, that of whole responses."""
    own = {each.default_reduction for each in vectors}
    return reduction or (own.pop() if len(own) == 1 else DEFAULT_REDUCTION)


def _units(rows: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
    units: Tensor = rows / rows.norm(dim=-1, keepdim=True)
    return units


def chance(d_model: int) -> float:
    """Standard deviation of the cosine of two random directions."""
    return 1 / sqrt(d_model)


def _stacked(vectors: Mapping[str, PersonaVectors], reduction: str) -> Float[Tensor, "layers traits d_model"]:
    """The rows of several vectors side by side, in float64.

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
    found: Tensor = torch.stack([each.rows(reduction) for each in vectors.values()], dim=1).double()
    return found


def layer_cosines(vectors: PersonaVectors, reduction: str = OWN_REDUCTION) -> Float[Tensor, "layers layers"]:
    """How alike one trait's directions at different layers are: float32, NaN where there is no vector.

    Layers share the residual stream, so that neighbours are alike: a block only adds to what it gets.

    Raises:
        VectorsError: If there is no such reduction.
    """
    units = _units(vectors.rows(reduction).double())
    values: Tensor = (units @ units.T).clamp(-1, 1).float()
    return values


RANDOM_SETS = 200


@dataclass(frozen=True, eq=False)
class Components(Record):
    """Principal components of traits' directions at one layer, most important first.

    Attributes:
        traits: Their names.
        layer: Block index, 0-based.
        reduction: Which of their vectors.
        explained: float32 [components]: each one's share of the variance.
        random_explained: float32 [components]: the share that 95% of random directions' components stay below.
        coordinates: float32 [traits, components]; the sign of a component is such that its largest one is positive.
        directions: float32 [components, d_model], of length one.
    """

    traits: tuple[str, ...]
    layer: int
    reduction: str
    explained: Float[Tensor, " components"]
    random_explained: Float[Tensor, " components"]
    coordinates: Float[Tensor, "traits components"]
    directions: Float[Tensor, "components d_model"]

    def to_json(self) -> dict[str, Any]:
        """All but the directions, as JSON values."""
        return {name: value for name, value in super().to_json().items() if name != "directions"}


def principal_components(
    vectors: Mapping[str, PersonaVectors],
    layer: int,
    reduction: str = OWN_REDUCTION,
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
    reduction = _shared(reduction, *vectors.values())
    _stacked(vectors, reduction)  # of one model, or refused
    given = torch.stack([each.vector(layer, reduction) for each in vectors.values()])
    return components_of(tuple(vectors), layer, reduction, given, normalised=normalised, centred=centred, seed=seed)


def components_of(
    names: tuple[str, ...],
    layer: int,
    reduction: str,
    given: Float[Tensor, "names d_model"],
    *,
    normalised: bool = True,
    centred: bool = True,
    seed: int = 0,
) -> Components:
    """Principal components of named rows of a layer; arguments otherwise as for `principal_components`."""
    given = given.double()
    rows = _prepared(given, normalised, centred)
    kept = len(rows) - centred
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    coordinates, directions = (left * sizes)[:, :kept], right[:kept]
    signs = coordinates.gather(0, coordinates.abs().argmax(dim=0, keepdim=True)).sign()
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return Components(
        names,
        layer,
        reduction,
        _shares(rows)[:kept].float(),
        _random_shares(given, normalised, centred, seed)[:kept].float(),
        (coordinates * signs).float(),
        (directions * signs.T).float(),
    )


def _prepared(rows: Tensor, normalised: bool, centred: bool) -> Tensor:
    rows = _units(rows) if normalised else rows
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
        noise = _units(noise) * given.norm(dim=-1, keepdim=True)
        found.append(_shares(_prepared(noise, normalised, centred)))
    return torch.stack(found).quantile(0.95, dim=0)


@dataclass(frozen=True, eq=False)
class Likeness(Record):
    """Two vectors, layer by layer.

    Attributes:
        traits: Their traits.
        reduction: Which of their vectors.
        null_std: Standard deviation of the cosine of two random directions of this width.
        different_models: What makes their models different, in words; empty for one model.
        cosines: float32 [layers]; NaN where one of them has no vector.
        lengths: float32 [layers]: length of the second over that of the first.
    """

    traits: tuple[str, str]
    reduction: str
    null_std: float
    different_models: tuple[str, ...]
    cosines: Float[Tensor, " layers"]
    lengths: Float[Tensor, " layers"]


def likeness(
    one: PersonaVectors, other: PersonaVectors, reduction: str = OWN_REDUCTION, *, allow_other_model: bool = False
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
    reduction = _shared(reduction, one, other)
    a, b = one.rows(reduction).double(), other.rows(reduction).double()
    cosines = torch.einsum("ld,ld->l", _units(a), _units(b)).clamp(-1, 1).float()
    lengths = (b.norm(dim=-1) / a.norm(dim=-1)).float()
    null_std = chance(one.model.d_model)
    return Likeness((one.trait, other.trait), reduction, null_std, tuple(different), cosines, lengths)

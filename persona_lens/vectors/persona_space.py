"""`PersonaSpace`: where roles and the default Assistant stand in a model's residual stream, and the axis between them.

After Lu et al., *The Assistant Axis* (arXiv 2601.10387): a role's vector is the mean residual of responses that play
it, the axis is the default's minus the mean of all roles', and persona space is spanned by the roles' components.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import ModelInfo
from persona_lens.core.documents import Record, header_text, read_artifact, save_tensors, write_once
from persona_lens.vectors.geometry import Components, GeometryError, components_of
from persona_lens.vectors.provenance import DEFAULT_REDUCTION, THINKING, VectorsError, check_provenance
from persona_lens.vectors.vectors import PersonaVectors

ASSISTANT = "assistant"
FORMAT_VERSION = 1
METADATA = "persona_lens_space"


@dataclass(frozen=True)
class Standing(Record):
    """Where the default Assistant stands on one component, among the roles.

    Attributes:
        component: Counted from 1.
        coordinate: Its distance from the roles' mean along the component, in residual-stream units.
        place: That as a share of the roles' range: 0 at the lowest role, 1 at the highest, beyond them outside 0 to 1.
        from_end: How far it is from the nearer end of the range, as a share of it; 0 at an end or beyond.
    """

    component: int
    coordinate: float
    place: float
    from_end: float


@dataclass(frozen=True, eq=False, repr=False)
class PersonaSpace:
    """Roles of one model.

    Attributes:
        model: The model.
        roles: Names, at least three.
        means: float32 [roles, n_layers, d_model]: mean residual of the responses that play each, after block l.
        default: float32 [n_layers, d_model]: the same of the default Assistant's responses.
        provenance: Everything needed to make them again, as JSON values.

    Raises:
        VectorsError: If shapes do not fit the model, a number is not finite, or there are fewer than three roles.
    """

    model: ModelInfo
    roles: tuple[str, ...]
    means: Float[Tensor, "roles layers d_model"]
    default: Float[Tensor, "layers d_model"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (self.model.n_layers, self.model.d_model)
        if len(self.roles) < 3:
            raise VectorsError(f"{len(self.roles)} roles span no persona space; at least three are needed")
        if tuple(self.means.shape) != (len(self.roles), *shape) or tuple(self.default.shape) != shape:
            raise VectorsError(
                f"the means of {len(self.roles)} roles and of the default must be {[len(self.roles), *shape]} and "
                f"{list(shape)} for this model, got {list(self.means.shape)} and {list(self.default.shape)}"
            )
        if not bool(self.means.isfinite().all() and self.default.isfinite().all()):
            raise VectorsError("the means of a persona space hold NaN or infinity; make them again")

    def __repr__(self) -> str:
        return f"<PersonaSpace of {len(self.roles)} roles of {self.model.in_short}>"

    @property
    def axis(self) -> Float[Tensor, "layers d_model"]:
        """Mean of the default's responses minus the mean over roles: float32, positive is Assistant-like."""
        found: Tensor = (self.default.double() - self.means.double().mean(dim=0)).float()
        return found

    @property
    def reduction(self) -> str:
        """What the means are over: the response, or its answer, of a model that thinks before it."""
        thinking = self.provenance.get(THINKING)
        return str(thinking["default_reduction"]) if isinstance(thinking, Mapping) else DEFAULT_REDUCTION

    def vectors(self, **provenance: Any) -> PersonaVectors:
        """The axis as vectors of the trait ``assistant``, which work wherever a trait's do.

        Args:
            provenance: Further entries of their provenance, as JSON values.
        """
        known = {**self.provenance, **provenance}
        return PersonaVectors(ASSISTANT, self.model, {self.reduction: self.axis}, known)

    def components(self, layer: int, seed: int = 0) -> Components:
        """Principal components of the roles at a layer after subtracting their mean, without scaling.

        The default stands on the positive side of each.

        Args:
            layer: Block index, 0-based.
            seed: Of the random directions that their shares are held against.

        Raises:
            GeometryError: If there is no such layer.
        """
        if not 0 <= layer < self.model.n_layers:
            raise GeometryError(f"layer {layer} does not exist: the model has layers 0 to {self.model.n_layers - 1}")
        found = components_of(self.roles, layer, self.reduction, self.means[:, layer], normalised=False, seed=seed)
        signs = (found.directions.double() @ self._from_mean(layer)).sign()
        signs = torch.where(signs == 0, torch.ones_like(signs), signs).float()
        return replace(found, coordinates=found.coordinates * signs, directions=found.directions * signs.unsqueeze(1))

    def standings(self, components: Components) -> tuple[Standing, ...]:
        """Where the default stands on each component of a layer."""
        return tuple(_standings(components, self._from_mean(components.layer)))

    def place(self, vectors: PersonaVectors, components: Components) -> Float[Tensor, " components"]:
        """Cosine of a trait's vector with each component of a layer: float32.

        Raises:
            GeometryError: If the vectors belong to another model.
            VectorsError: If they have none at that layer.
        """
        if different := self.model.differences(vectors.model):
            raise GeometryError(f"the vectors of {vectors.trait!r} belong to another model: {'; '.join(different)}")
        v = vectors.vector(components.layer).double()
        cosines: Tensor = (components.directions.double() @ (v / v.norm())).float()
        return cosines

    def _from_mean(self, layer: int) -> Float[Tensor, " d_model"]:
        return self.default[layer].double() - self.means[:, layer].double().mean(dim=0)

    def save(self, path: Path | str) -> Path:
        """Write a safetensors file; its bytes depend on the content alone.

        Raises:
            VectorsError: If the file exists and holds something else.
        """
        return write_once(path, self.to_bytes(), VectorsError)

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        header = {
            "format_version": FORMAT_VERSION,
            "roles": list(self.roles),
            "model": asdict(self.model),
            "provenance": dict(self.provenance),
        }
        return save_tensors({"means": self.means, "default": self.default}, METADATA, header_text(header))


def load_space(path: Path | str) -> PersonaSpace:
    """Read a persona space from a file, or from the run folder that holds one. Nothing is unpickled.

    Raises:
        VectorsError: If there is no such file, or it is not of this format or version, or damaged.
    """
    file = Path(path)
    file = file / "space.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise VectorsError(f"{file} does not exist; make it with `persona-lens axis MODEL`")
    stranger = "holds tensors but no persona space"
    found = read_artifact(file, METADATA, FORMAT_VERSION, stranger=stranger, failed=VectorsError)
    try:
        roles, model = tuple(found.header["roles"]), ModelInfo(**found.header["model"])
        if not all(isinstance(name, str) for name in roles):
            raise TypeError("roles are names")
        tensors = (found.tensors["means"], found.tensors["default"])
        return PersonaSpace(model, roles, *tensors, check_provenance(found.header["provenance"]))
    except (KeyError, TypeError, ValueError) as error:
        raise VectorsError(f"the header of {file} is damaged: {error!r}; make it again") from error


def _standings(components: Components, from_mean: Float[Tensor, " d_model"]) -> Iterator[Standing]:
    low, high = components.coordinates.amin(dim=0).double(), components.coordinates.amax(dim=0).double()
    for number, direction in enumerate(components.directions.double()):
        coordinate = float(direction @ from_mean)
        place = (coordinate - float(low[number])) / max(float(high[number] - low[number]), 1e-12)
        yield Standing(number + 1, coordinate, place, max(0.0, min(place, 1 - place)))

"""`PersonaVectors`: a trait's directions in one model's residual stream, with where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from markupsafe import escape
from torch import Tensor

from persona_lens.backend import Backend, Edit, ModelInfo, Operation, Positions, Span
from persona_lens.backend.blocks import base_weights_of
from persona_lens.core.documents import header_text, parse_header, read_artifact, save_tensors, write_once
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.progress import note
from persona_lens.core.text import in_short
from persona_lens.vectors.provenance import (
    ANSWER_MEAN,
    DEFAULT_REDUCTION,
    OWN_REDUCTION,
    Provenanced,
    Tuned,
    VectorsError,
    check_provenance,
    inherited,
)

FORMAT_VERSION = 1
METADATA = "persona_lens"
LAYERS = "residual stream after block l, 0-based; the last layer before the final norm"
PROMPT_MEAN = "prompt_mean"
Settings = TypeVar("Settings")


@dataclass(frozen=True, eq=False, repr=False)
class PersonaVectors(Provenanced):
    """Difference of mean activations between a trait's two arms, for every layer and reduction (method, section 2).

    Attributes:
        trait: Name of the trait.
        model: The model they belong to.
        directions: By reduction (``response_mean``, ``prompt_mean``, ``prompt_last``; of a model that thinks before it
            answers ``answer_mean`` and ``thinking_mean`` too): float32 [n_layers, d_model], not normalised. Row l
            belongs to the residual stream after block l.
        provenance: Everything needed to make them again, as JSON values.

    Raises:
        VectorsError: If a vector has another shape than the model's, holds NaN or infinity, or all are zero.
    """

    trait: str
    model: ModelInfo
    directions: Mapping[str, Float[Tensor, "layers d_model"]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (self.model.n_layers, self.model.d_model)
        for name, rows in self.directions.items():
            if tuple(rows.shape) != shape or rows.dtype != torch.float32:
                raise VectorsError(
                    f"{name} must be float32 {list(shape)} for this model, got {rows.dtype} {list(rows.shape)}"
                )
            if len(broken := (~rows.isfinite().all(dim=-1)).nonzero().flatten()):
                raise VectorsError(
                    f"the {name} vectors of {self.trait!r} hold NaN or infinity at layer {int(broken[0])}; make them "
                    "again, since nothing can be computed with them"
                )
        if self.directions and not any(bool(rows.any()) for rows in self.directions.values()):
            raise VectorsError(f"the vectors of {self.trait!r} are zero at every layer: they point nowhere")

    def __repr__(self) -> str:
        tuned = f", tuned to layer {self.tuned.layer} and coefficient {self.tuned.coefficient:+g}" if self.tuned else ""
        return f"<PersonaVectors {self.trait} of {self.model.in_short}; {', '.join(self.directions)}{tuned}>"

    def _repr_html_(self) -> str:
        every = -(-self.model.n_layers // 8)
        lines = [("length at layer", *map(str, range(0, self.model.n_layers, every)))]
        lines += [
            (name, *(f"{length:.3g}" for length in self.norms(name)[::every].tolist())) for name in self.directions
        ]
        rows = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines)
        return f"<p>{escape(repr(self))}</p><table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    def __getitem__(self, layer: int) -> Float[Tensor, " d_model"]:
        """The `default_reduction`'s vector of a layer, which steers best; the others are in `directions`."""
        return self.vector(layer)

    @property
    def default_reduction(self) -> str:
        """Which of the vectors is meant where none is named: of a model that thinks, that of its answers."""
        return ANSWER_MEAN if ANSWER_MEAN in self.directions else DEFAULT_REDUCTION

    def settled(self, settings: Settings) -> Settings:
        """Settings that name a ``reduction``: the vectors' own where they name none."""
        own: Any = settings
        return settings if own.reduction else replace(own, reduction=self.default_reduction)

    def vector(self, layer: int, reduction: str = OWN_REDUCTION) -> Float[Tensor, " d_model"]:
        """One layer's vector, not normalised: float32 [d_model].

        Raises:
            VectorsError: If there is no such layer or reduction, or the vector is zero there.
        """
        reduction = reduction or self.default_reduction
        rows = self.rows(reduction)
        self.check_layer(layer)
        if layer in self.missing_layers:
            raise VectorsError(
                f"the vectors of {self.trait!r} have none for layer {layer}: the file that they were imported from has "
                "no such row; choose another layer"
            )
        row: Tensor = rows[layer]
        if float(row.norm()) == 0:
            raise VectorsError(
                f"the {reduction} vector of {self.trait!r} at layer {layer} is zero: it points nowhere; choose another "
                "layer"
            )
        return row

    def check_layer(self, layer: int) -> None:
        """Raise unless the model has such a layer.

        Raises:
            VectorsError: If it has not.
        """
        if not 0 <= layer < self.model.n_layers:
            raise VectorsError(f"layer {layer} does not exist: the model has layers 0 to {self.model.n_layers - 1}")

    def rows(self, reduction: str = OWN_REDUCTION) -> Float[Tensor, "layers d_model"]:
        """The vectors of every layer: float32 [n_layers, d_model], zero at `missing_layers`.

        Raises:
            VectorsError: If there is no such reduction.
        """
        reduction = reduction or self.default_reduction
        if reduction not in self.directions:
            raise VectorsError(f"no reduction {reduction!r}; there are {', '.join(self.directions)}")
        found: Tensor = self.directions[reduction]
        return found

    def check_alike(self, other: PersonaVectors, reduction: str) -> None:
        """Raise unless a reduction of both is a mean over the same kind of tokens.

        Raises:
            VectorsError: If the prompt mean of one takes in attention sinks and that of the other does not.
        """
        if reduction == PROMPT_MEAN and self.prompt_mean_sinks != other.prompt_mean_sinks:
            which = (self, other) if self.prompt_mean_sinks else (other, self)
            raise VectorsError(
                f"the prompt mean of {which[0].trait!r} takes in attention sinks, which dominate it, and that of "
                f"{which[1].trait!r} leaves them out; extract both in one way (`persona-lens extract`, --with-sinks)"
            )

    def norms(self, reduction: str = OWN_REDUCTION) -> Float[Tensor, " layers"]:
        """Length of the vector at each layer, in residual-stream units."""
        lengths: Tensor = self.rows(reduction).norm(dim=-1)
        return lengths

    def with_provenance(self, **entries: Any) -> PersonaVectors:
        """The same vectors with entries of their provenance set, as JSON values."""
        return replace(self, provenance={**self.provenance, **entries})

    def with_tuned(self, tuned: Tuned, found: Mapping[str, Any]) -> PersonaVectors:
        """The same vectors with a choice of layer and coefficient, and what it rests on, in their provenance."""
        return self.with_provenance(tuned={**asdict(tuned), **found})

    def with_monitor(self, found: Mapping[str, Any]) -> PersonaVectors:
        """The same vectors with what a monitoring study found in their provenance, as JSON values."""
        return self.with_provenance(monitor=dict(found))

    def edit(
        self,
        layer: int | None = None,
        coefficient: float | Float[Tensor, " batch"] | None = None,
        *,
        operation: Operation | str = Operation.ADD,
        threshold: float | None = None,
        target: float | None = None,
        relative: bool = False,
        positions: Positions | Span | str = Positions.ALL,
        reduction: str = OWN_REDUCTION,
        sinks: bool = False,
    ) -> Edit:
        """An edit that steers along this trait at one layer.

        Args:
            layer: Block index, 0-based; the one that was tuned if not given.
            coefficient: Multiple of the raw vector that ``add`` adds, 1 if not given; for the other operations the
                fraction of the change that is made. With neither layer nor coefficient, ``add`` takes the one tuned.
            operation: ``add``, ``ablate``, ``cap``, ``floor``, ``affine``, or one of another package.
            threshold: For ``cap`` the largest, for ``floor`` the smallest projection left, in residual-stream units.
            target: For ``affine``: the projection left, in residual-stream units.
            relative: For ``add``: the coefficient counts norms of the residual at each token, not of the vector.
            positions: ``all``, ``prompt``, ``response``, ``generating``, ``thinking``, ``answer``, or a `Span` of one
                of these.
            reduction: Which of the vectors.
            sinks: Edit attention sinks too, where the operation leaves them out.
        """
        try:
            chosen = Operation(operation)
        except ValueError as error:
            raise VectorsError(str(error)) from None
        if layer is None:
            tuned = self.tuned_choice()
            layer = tuned.layer
            if coefficient is None and chosen is Operation.ADD and not relative:
                coefficient = tuned.coefficient
        return Edit(
            layer,
            self.vector(layer, reduction),
            chosen,
            coefficient=1.0 if coefficient is None else coefficient,
            threshold=threshold,
            target=target,
            relative=relative,
            positions=_positions(positions),
            sinks=sinks,
        )

    def random_like(self, seed: int) -> PersonaVectors:
        """Random directions with the same norm at every layer: the null that a claim about these vectors needs."""
        generator = torch.Generator().manual_seed(seed)
        nulls = {}
        for name, rows in sorted(self.directions.items()):  # a file has another order than memory
            noise = torch.randn(rows.shape, generator=generator)
            nulls[name] = noise / noise.norm(dim=-1, keepdim=True) * rows.norm(dim=-1, keepdim=True)
        origin = {"random_like": self.trait, "seed": seed, **inherited(self)}
        return PersonaVectors(f"random({seed})", self.model, nulls, origin)

    def __add__(self, other: PersonaVectors) -> PersonaVectors:
        return self._combine(other, 1.0)

    def __sub__(self, other: PersonaVectors) -> PersonaVectors:
        return self._combine(other, -1.0)

    def __mul__(self, factor: float) -> PersonaVectors:
        scaled = {name: rows * factor for name, rows in self.directions.items()}
        origin = {"scaled": dict(self.provenance), **inherited(self)}
        return PersonaVectors(f"{factor:g}*{self.trait}", self.model, scaled, origin)

    __rmul__ = __mul__

    def _combine(self, other: PersonaVectors, sign: float) -> PersonaVectors:
        if different := self.model.differences(other.model):
            raise VectorsError(f"vectors of two models cannot be combined: {'; '.join(different)}")
        both = [name for name in self.directions if name in other.directions]
        if self.prompt_mean_sinks != other.prompt_mean_sinks:  # not the same mean
            both = [name for name in both if name != PROMPT_MEAN]
        if not both:
            raise VectorsError(f"{self.trait} and {other.trait} have no reduction in common to be combined")
        combined = {name: self.directions[name] + sign * other.directions[name] for name in both}
        name = f"{self.trait} {'+' if sign > 0 else '-'} {other.trait}"
        origin = {"parts": [dict(self.provenance), dict(other.provenance)], **inherited(self, other)}
        return PersonaVectors(name, self.model, combined, origin)

    def check_model(self, backend: Backend, *, allowable: bool = True) -> None:
        """Raise unless the vectors belong to the backend's model, or, told by a note, to the one it was finetuned from.

        Args:
            backend: The model.
            allowable: Whether the one who asks takes other models where that is asked for, so that it can be named.

        Raises:
            VectorsError: Naming what differs.
        """
        if not (different := self.model.differences(backend.info)):
            return
        if (base := base_weights_of(backend)) is not None and not self.model.differences(
            replace(backend.info, weights=base)
        ):
            of_base = f"belong to the model that {backend.info.model} was finetuned from ({self.model.model})"
            note(f"the vectors of {self.trait!r} {of_base}; they are used as they are")
            return
        allowing = ", or allow it with --allow-other-model (allow_other_model)" if allowable else ""
        raise VectorsError(
            f"the vectors of {self.trait!r} belong to another model than the one opened: {'; '.join(different)}. "
            f"Extract them on this model (persona-lens extract){allowing}."
        )

    def save(self, path: Path | str) -> Path:
        """Write a safetensors file; its bytes depend on the content alone.

        Raises:
            VectorsError: If the file exists and holds something else.
        """
        return write_once(path, self.to_bytes(), VectorsError)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the file's bytes."""
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return save_tensors(self.directions, METADATA, self.header())

    def header(self) -> str:
        """All but the tensors, as JSON; `read_header` reads it."""
        content = {
            "format_version": FORMAT_VERSION,
            "trait": self.trait,
            "layer_convention": LAYERS,
            "model": asdict(self.model),
            "model_fingerprint": self.model.fingerprint,
            "provenance": dict(self.provenance),
        }
        return header_text(content)


def _positions(given: Positions | Span | str) -> Positions | Span:
    try:
        return given if isinstance(given, Span) else Positions(given)
    except ValueError:
        raise VectorsError(f"positions is one of {', '.join(Positions)}; got {given!r}") from None


def random_directions(d_model: int, count: int, seed: int) -> Float[Tensor, "count d_model"]:
    """Random unit vectors."""
    noise = torch.randn(count, d_model, generator=torch.Generator().manual_seed(seed))
    units: Tensor = noise / noise.norm(dim=-1, keepdim=True)
    return units


def load_vectors(path: Path | str) -> PersonaVectors:
    """Read vectors from a file, or from the run folder that holds one. Nothing is unpickled.

    Raises:
        VectorsError: If there is no such file, or it is not of this format or version, or damaged.
    """
    file = Path(path)
    try:
        file = file / "vectors.safetensors" if file.is_dir() else file
        there = file.exists()
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        raise VectorsError(f"{in_short(str(file), 200)} cannot be read: {error}") from error
    if not there:
        raise VectorsError(f"{file} does not exist; make it with `persona-lens extract MODEL TRAIT`")
    stranger = "holds tensors but not persona vectors"
    found = read_artifact(file, METADATA, FORMAT_VERSION, stranger=stranger, failed=VectorsError)
    trait, model, provenance = _content(found.header, file)
    return PersonaVectors(trait, model, found.tensors, provenance)


def check_layers(layers: Sequence[int] | None, failed: type[PersonaLensError]) -> None:
    """Raise ``failed`` unless layers are given, each once; None stands for all, or for some that are found later."""
    if layers is not None and (not layers or len(set(layers)) < len(layers)):
        raise failed(f"layers must be given, each once: got {list(layers)}")


def read_header(text: str, file: Path) -> tuple[str, ModelInfo, dict[str, Any]]:
    """The trait, the model and the provenance in a header that `PersonaVectors.header` wrote.

    Args:
        text: The header.
        file: Where it comes from, for the messages.

    Raises:
        VectorsError: If it is of another version, or damaged.
    """
    return _content(parse_header(text, FORMAT_VERSION, file, VectorsError), file)


def _content(header: Mapping[str, Any], file: Path) -> tuple[str, ModelInfo, dict[str, Any]]:
    try:
        trait, provenance = header["trait"], check_provenance(header["provenance"])
        if not isinstance(trait, str):
            raise TypeError("trait is a text")
        return trait, ModelInfo.from_json(header["model"]), provenance
    except (KeyError, TypeError, ValueError) as error:
        why = repr(error) if isinstance(error, KeyError) else str(error)
        raise VectorsError(f"the header of {file} is damaged: {in_short(why, 200)}") from error

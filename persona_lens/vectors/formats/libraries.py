"""Objects of the packages repeng and steering-vectors, and files of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona_lens.backend import ModelInfo
from persona_lens.vectors.formats.form import Chosen, ExchangeError, Exported, Form, Imported, Stated
from persona_lens.vectors.formats.llama_cpp import model_type
from persona_lens.vectors.formats.rows import assemble, file_name, reduction_of
from persona_lens.vectors.formats.torch_files import archive_bytes, checked_tensor
from persona_lens.vectors.provenance import DEFAULT_REDUCTION
from persona_lens.vectors.vectors import PersonaVectors


def to_control_vector(
    vectors: PersonaVectors, layers: tuple[int, ...] | None = None, reduction: str = DEFAULT_REDUCTION
) -> Any:
    """A ``ControlVector`` with these vectors.

    Args:
        vectors: The vectors.
        layers: Block indices, 0-based; all by default.
        reduction: Which of the vectors.

    Raises:
        ExchangeError: If the package is not installed.
        VectorsError: If there is no such layer or reduction.
    """
    try:
        from repeng import ControlVector
    except (ImportError, AttributeError) as error:  # repeng 0.4 names np.float_, which numpy 2 no longer has
        raise ExchangeError(f"the package repeng cannot be imported ({error}): pip install repeng 'numpy<2'") from error
    rows = Chosen(layers, reduction).of(vectors)
    return ControlVector(model_type(vectors.model), {layer: row.numpy().copy() for layer, row in rows.items()})


def from_control_vector(given: Any, model: ModelInfo, trait: str, reduction: str = DEFAULT_REDUCTION) -> PersonaVectors:
    """Vectors with what a ``ControlVector`` holds; layers that it does not hold are missing.

    Args:
        given: The object.
        model: The model it belongs to, such as `Backend.info`.
        trait: A name for it.
        reduction: Under which name its vectors are kept.

    Raises:
        ExchangeError: If it belongs to another model.
    """
    if given.model_type != model_type(model):
        raise ExchangeError(
            f"the ControlVector is of a model of type {given.model_type!r}, and {model.model} is of type "
            f"{model_type(model)!r}: it belongs to another model"
        )
    rows = {int(layer): torch.from_numpy(np.asarray(row, dtype=np.float32)) for layer, row in given.directions.items()}
    return assemble_object(Path("the ControlVector"), "repeng", rows, Stated(model, trait, reduction))


LAYER_TYPE = "decoder_block"
INSTALL = "pip install --no-deps steering-vectors"


class Fields:
    """Takes the place of a pickled ``SteeringVector``: holds what it held."""


STAND_INS: Mapping[str, type] = {
    "steering_vectors.steering_vector.SteeringVector": Fields,
    "steering_vectors.SteeringVector": Fields,
}


def to_steering_vector(
    vectors: PersonaVectors, layers: tuple[int, ...] | None = None, reduction: str = DEFAULT_REDUCTION
) -> Any:
    """A ``SteeringVector`` with these vectors, which steers at all of its layers at once; see `to_control_vector`."""
    try:
        from steering_vectors import SteeringVector
    except ImportError as error:
        raise ExchangeError(f"the package steering-vectors cannot be imported ({error}): {INSTALL}") from error
    return SteeringVector(dict(Chosen(layers, reduction).of(vectors)), LAYER_TYPE)


def from_steering_vector(
    given: Any, model: ModelInfo, trait: str, reduction: str = DEFAULT_REDUCTION
) -> PersonaVectors:
    """Vectors with what a ``SteeringVector`` holds; arguments as for `from_control_vector`.

    Raises:
        ExchangeError: If it is of another layer type or another model.
    """
    place = Path("the SteeringVector")
    rows = _rows(place, vars(given))
    return assemble_object(place, FORM.name, rows, Stated(model, trait, reduction))


def assemble_object(place: Path, form: str, rows: Mapping[int, Any], stated: Stated) -> PersonaVectors:
    """`assemble` for an object in memory, which has no file to take a digest of."""
    return assemble(place, form, {reduction_of(stated): rows}, stated).vectors


def _rows(file: Path, content: Mapping[str, Any]) -> dict[int, Any]:
    kind = content.get("layer_type", LAYER_TYPE)
    if kind != LAYER_TYPE:
        raise ExchangeError(f"{file} is of layer type {str(kind)[:40]!r}; only {LAYER_TYPE!r} is the residual stream")
    activations = content.get("layer_activations")
    if not isinstance(activations, dict) or not activations:
        raise ExchangeError(f"{file} has no layer_activations; a steering vector has tensors by layer there")
    rows = {}
    for layer, value in activations.items():
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ExchangeError(f"{file} has a layer {str(layer)[:40]!r}; layers are whole numbers")
        rows[layer] = checked_tensor(value, f"the vector of layer {layer} in {file}", 1)
    return rows


def _is_steering_vector(content: Any, stated: Stated) -> bool:
    return isinstance(content, Fields) or (isinstance(content, dict) and "layer_activations" in content)


def _read(file: Path, content: Any, stated: Stated) -> Imported:
    rows = _rows(file, vars(content) if isinstance(content, Fields) else content)
    return assemble(file, FORM.name, {reduction_of(stated): rows}, stated)


def _write(vectors: PersonaVectors, chosen: Chosen) -> Exported:
    rows = {layer: row.contiguous().clone() for layer, row in chosen.of(vectors).items()}
    content = {"layer_activations": rows, "layer_type": LAYER_TYPE}
    notes = (
        "in Python: SteeringVector(**torch.load(FILE, weights_only=True))",
        *(("it steers at all of its layers at once; --layers chooses some",) if len(rows) > 1 else ()),
    )
    return Exported({f"{file_name(vectors.trait)}.pt": archive_bytes(content)}, notes)


FORM = Form("steering-vectors", "the package steering-vectors", ".pt", "archive", _is_steering_vector, _read, _write)

"""llama.cpp's control vectors: GGUF files that its ``--control-vector`` takes; repeng has them too, and as objects.

What it expects: tensors ``direction.N`` with N >= 1, float32, of one dimension and equal length. ``direction.N`` is
added to the residual stream after block N, counted from 0, at every token: N is the layer here, and nothing has to be
shifted. Block 0 has no place in the format: a ``direction.0`` makes llama.cpp refuse the file, so none is ever written.
llama.cpp itself reads no metadata; other programs check ``general.architecture`` (``controlvector``),
``controlvector.model_hint`` (the model's type, such as ``llama``) and ``controlvector.layer_count`` (the number of
directions).

llama.cpp adds every direction in the file, unless ``--control-vector-layer-range`` says otherwise.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_lens.backend import ModelInfo
from persona_lens.core.errors import first_line
from persona_lens.vectors.formats.form import (
    HEADER,
    REDUCTION,
    REDUCTIONS,
    Chosen,
    Exported,
    Form,
    FormatError,
    Imported,
    Stated,
    assemble,
    file_name,
    reduction_of,
)
from persona_lens.vectors.provenance import DEFAULT_REDUCTION, OWN_REDUCTION
from persona_lens.vectors.vectors import PersonaVectors

MAX_FILE = 2**28
MAX_ENTRIES = 4096  # tensors, and values with a name
MAX_VALUES = 2**16  # read from a file; a control vector has a few hundred


@cache
def _reader() -> Any:
    """The library's reader, which by itself believes every length and count in a file."""
    import gguf

    class BoundedReader(gguf.GGUFReader):
        """Reads nothing that the file does not hold, and no more of it than a control vector has."""

        values = 0

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            self.values += 1
            if self.values > MAX_VALUES:
                raise ValueError(f"it has over {MAX_VALUES:,} values")
            claimed, left = int(count) * np.dtype(dtype).itemsize, len(self.data) - int(offset)
            if claimed > left:
                raise ValueError(f"it claims {claimed:,} bytes at byte {int(offset):,} and has {max(0, left):,} left")
            return super()._get(offset, dtype, count, override_order)

        def _build_fields(self, offs: Any, count: Any) -> Any:
            return super()._build_fields(offs, _few(count, "values"))

        def _build_tensor_info(self, offs: Any, count: Any) -> Any:
            return super()._build_tensor_info(offs, _few(count, "tensors"))

    return BoundedReader


def _few(count: Any, what: str) -> Any:
    if count > MAX_ENTRIES:
        raise ValueError(f"it claims {int(count):,} {what}, and a control vector has at most {MAX_ENTRIES:,}")
    return count


ARCHITECTURE = "controlvector"
MODEL_HINT, LAYER_COUNT = f"{ARCHITECTURE}.model_hint", f"{ARCHITECTURE}.layer_count"
PREFIX = "direction."
NO_PLACE = "layer 0 was left out: llama.cpp's control vectors begin with layer 1"


def model_type(model: ModelInfo) -> str:
    """A model's type as its configuration says it, such as ``llama``; its class where transformers does not know it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = (kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == model.architecture)
    return next(types, model.architecture)


def _write(vectors: PersonaVectors, chosen: Chosen) -> Exported:
    rows = chosen.of(vectors)
    dropped = rows.pop(0, None) is not None
    if not rows:
        raise FormatError(f"nothing is left to be written: {NO_PLACE}; choose other layers")
    notes = [NO_PLACE] if dropped else []
    if len(rows) > 1:
        notes.append(
            "llama.cpp adds all of the directions at once; --layers chooses some, or there --control-vector-layer-range"
        )
    if (tuned := vectors.tuned) is not None and tuned.layer in rows and tuned.reduction == chosen.reduction:
        span = f"--control-vector-layer-range {tuned.layer} {tuned.layer}"
        notes.append(f"as it was tuned: --control-vector-scaled FILE:{tuned.coefficient:g} {span}")
    content = _bytes(vectors, rows, chosen.reduction)
    return Exported({f"{file_name(vectors.trait)}.gguf": content}, tuple(notes))


def _bytes(vectors: PersonaVectors, rows: dict[int, Tensor], reduction: str) -> bytes:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.gguf"
        writer = gguf.GGUFWriter(file, ARCHITECTURE)
        writer.add_string(MODEL_HINT, model_type(vectors.model))
        writer.add_uint32(LAYER_COUNT, len(rows))
        writer.add_string(HEADER, vectors.header())
        writer.add_string(REDUCTION, reduction)
        for layer, row in sorted(rows.items()):
            writer.add_tensor(f"{PREFIX}{layer}", row.numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


def _read(file: Path, content: Any, stated: Stated) -> Imported:
    if file.stat().st_size > MAX_FILE:
        raise FormatError(f"{file} is {file.stat().st_size / 1e9:.1f} GB; a control vector is not so large")
    try:
        reader = _reader()(file)
        names = ("general.architecture", MODEL_HINT, LAYER_COUNT, HEADER, REDUCTION)
        fields = [reader.get_field(name) for name in names]
        architecture, hint, count, header, reduction = (field.contents() if field else None for field in fields)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader raises whatever numpy raises at the place that is damaged
        raise FormatError(f"{file} is a damaged GGUF file, or cut short: {first_line(error)}") from error
    if architecture is not None and architecture != ARCHITECTURE:
        raise FormatError(f"{file} is a GGUF file of {str(architecture)[:40]!r}, not a control vector")
    rows = {_layer(file, name): _row(file, tensor) for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if not rows:
        raise FormatError(f"{file} has no tensor direction.N: it is no control vector")
    if isinstance(count, int) and count != len(rows):
        raise FormatError(f"{file} announces {count} directions and holds {len(rows)}: it is not whole")
    notes: tuple[str, ...] = ()
    kind = model_type(stated.model) if stated.model is not None else hint
    if hint is not None and hint != kind:
        notes = (f"the file says it is of a model of type {str(hint)[:40]!r}, not {kind!r}",)
    own = header if isinstance(header, str) else None
    named = reduction if reduction in REDUCTIONS else DEFAULT_REDUCTION
    return assemble(file, FORM.name, {reduction_of(stated, named): rows}, stated, notes=notes, header=own)


def _layer(file: Path, name: str) -> int:
    text = name.removeprefix(PREFIX)
    if not text.isascii() or not text.isdecimal() or len(text) > 6:
        raise FormatError(f"{file} has a tensor {name[:40]!r}; a direction is named {PREFIX}N, N being a layer")
    if int(text) == 0:
        raise FormatError(f"{file} has a {PREFIX}0, which llama.cpp refuses: its control vectors begin with layer 1")
    return int(text)


def _row(file: Path, tensor: Any) -> Tensor:
    if tensor.tensor_type.name != "F32" or len(tensor.shape) != 1:
        raise FormatError(
            f"{tensor.name} in {file} is {tensor.tensor_type.name} {tensor.shape.tolist()}; directions are F32, of one "
            "dimension"
        )
    return torch.from_numpy(np.array(tensor.data, dtype=np.float32))


FORM = Form("gguf", "llama.cpp and repeng", ".gguf", "gguf", lambda *_: True, _read, _write)


def to_control_vector(
    vectors: PersonaVectors, layers: tuple[int, ...] | None = None, reduction: str = OWN_REDUCTION
) -> Any:
    """A ``ControlVector`` with these vectors.

    Args:
        vectors: The vectors.
        layers: Block indices, 0-based; all by default.
        reduction: Which of the vectors.

    Raises:
        FormatError: If the package is not installed.
        VectorsError: If there is no such layer or reduction.
    """
    try:
        from repeng import ControlVector
    except (ImportError, AttributeError) as error:  # repeng 0.4 names np.float_, which numpy 2 no longer has
        raise FormatError(f"the package repeng cannot be imported ({error}): pip install repeng 'numpy<2'") from error
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
        FormatError: If it belongs to another model.
    """
    if given.model_type != model_type(model):
        raise FormatError(
            f"the ControlVector is of a model of type {given.model_type!r}, and {model.model} is of type "
            f"{model_type(model)!r}: it belongs to another model"
        )
    rows = {int(layer): torch.from_numpy(np.asarray(row, dtype=np.float32)) for layer, row in given.directions.items()}
    stated = Stated(model, trait, reduction)
    return assemble(Path("the ControlVector"), "repeng", {reduction_of(stated): rows}, stated).vectors

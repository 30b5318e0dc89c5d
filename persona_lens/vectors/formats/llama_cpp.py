"""llama.cpp's control vectors: GGUF files that its ``--control-vector`` takes; repeng writes and reads them too.

What it expects: tensors ``direction.N`` with N >= 1, float32, of one dimension and equal length. ``direction.N`` is
added to the residual stream after block N, counted from 0, at every token: N is the layer here, and nothing has to be
shifted. Block 0 has no place in the format: a ``direction.0`` makes llama.cpp refuse the file, so none is ever written.
llama.cpp itself reads no metadata; other programs check ``general.architecture`` (``controlvector``),
``controlvector.model_hint`` (the model's type, such as ``llama``) and ``controlvector.layer_count`` (the number of
directions).

llama.cpp adds every direction in the file, unless ``--control-vector-layer-range`` says otherwise.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_lens.backend import ModelInfo
from persona_lens.vectors.formats.form import Chosen, ExchangeError, Exported, Form, Imported, Stated
from persona_lens.vectors.formats.rows import HEADER, REDUCTION, REDUCTIONS, assemble, file_name, reduction_of
from persona_lens.vectors.provenance import DEFAULT_REDUCTION
from persona_lens.vectors.vectors import PersonaVectors

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes, by the type of a value
STRING, ARRAY = 8, 9
MAX_FILE = 2**28
MAX_ENTRIES = 4096
MAX_VALUES = 2**18  # of all arrays together
MAX_DIMENSIONS = 4


class _Walk:
    """A place in a file, moved on only within it."""

    def __init__(self, file: Path, content: bytes) -> None:
        self.file, self.content, self.at = file, content, 4
        self.values = 0

    def skip(self, size: int) -> None:
        if size > len(self.content) - self.at:
            raise ExchangeError(
                f"{self.file} claims {size:,} bytes at byte {self.at:,} and has {len(self.content) - self.at:,} left: "
                "it is damaged or cut short"
            )
        self.at += size

    def number(self, size: int) -> int:
        start = self.at
        self.skip(size)
        return int(struct.unpack_from("<I" if size == 4 else "<Q", self.content, start)[0])

    def count(self, what: str, size: int = 8) -> int:
        found = self.number(size)
        if found > MAX_ENTRIES:
            raise ExchangeError(f"{self.file} claims {found:,} {what}; a control vector has at most {MAX_ENTRIES:,}")
        return found

    def value(self, kind: int) -> None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise ExchangeError(f"{self.file} has over {MAX_VALUES:,} values; a control vector has a few")
        if kind == STRING:
            self.skip(self.number(8))
        elif kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == ARRAY:
            inner = self.number(4)
            if inner == ARRAY:
                raise ExchangeError(f"{self.file} has arrays of arrays; a control vector has none")
            for _ in range(self.count("entries of an array")):
                self.value(inner)
        else:
            raise ExchangeError(f"{self.file} has a value of the unknown type {kind}: it is damaged")


def check_bounds(file: Path) -> None:
    """Raise unless everything that the header of a GGUF file announces is in the file.

    Raises:
        ExchangeError: Saying what is not.
    """
    if file.stat().st_size > MAX_FILE:
        raise ExchangeError(f"{file} is {file.stat().st_size / 1e9:.1f} GB; a control vector is not so large")
    walk = _Walk(file, file.read_bytes())
    version = walk.number(4)
    if version not in (2, 3):
        raise ExchangeError(f"{file} is GGUF version {version} (or of another byte order); versions 2 and 3 are read")
    tensors, values = walk.count("tensors"), walk.count("values")
    for _ in range(values):
        walk.skip(walk.number(8))
        walk.value(walk.number(4))
    for _ in range(tensors):
        walk.skip(walk.number(8))
        dimensions = walk.number(4)
        if dimensions > MAX_DIMENSIONS:
            raise ExchangeError(f"{file} has a tensor of {dimensions:,} dimensions: it is damaged")
        elements = 1
        for _ in range(dimensions):
            elements *= walk.number(8)
        walk.skip(4)
        start = walk.number(8)
        if elements + start > len(walk.content):
            raise ExchangeError(
                f"{file} announces a tensor of {elements:,} numbers at byte {start:,} of its data, which is more than "
                "the file holds: it is damaged or cut short"
            )


ARCHITECTURE = "controlvector"
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
        raise ExchangeError(f"nothing is left to be written: {NO_PLACE}; choose other layers")
    notes = [NO_PLACE] if dropped else []
    if len(rows) > 1:
        notes.append(
            "llama.cpp adds all of the directions at once; --layers chooses some, or there --control-vector-layer-range"
        )
    if vectors.tuned is not None and vectors.tuned.layer in rows and vectors.tuned.reduction == chosen.reduction:
        at, strength = vectors.tuned.layer, vectors.tuned.coefficient
        notes.append(
            f"as it was tuned: --control-vector-scaled FILE:{strength:g} --control-vector-layer-range {at} {at}"
        )
    content = _bytes(vectors, rows, chosen.reduction)
    return Exported({f"{file_name(vectors.trait)}.gguf": content}, tuple(notes))


def _bytes(vectors: PersonaVectors, rows: dict[int, Tensor], reduction: str) -> bytes:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.gguf"
        writer = gguf.GGUFWriter(file, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_type(vectors.model))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(rows))
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
    import gguf

    check_bounds(file)
    try:
        reader = gguf.GGUFReader(file)
        architecture, hint, count, header, reduction = (
            field.contents() if (field := reader.get_field(name)) is not None else None
            for name in (
                "general.architecture",
                f"{ARCHITECTURE}.model_hint",
                f"{ARCHITECTURE}.layer_count",
                HEADER,
                REDUCTION,
            )
        )
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader raises whatever numpy raises at the place that is damaged
        raise ExchangeError(f"{file} is a damaged GGUF file: {error}") from error
    if architecture is not None and architecture != ARCHITECTURE:
        raise ExchangeError(f"{file} is a GGUF file of {str(architecture)[:40]!r}, not a control vector")
    rows = {_layer(file, name): _row(file, tensor) for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if not rows:
        raise ExchangeError(f"{file} has no tensor direction.N: it is no control vector")
    if isinstance(count, int) and count != len(rows):
        raise ExchangeError(f"{file} announces {count} directions and holds {len(rows)}: it is not whole")
    if stated.model is not None and hint is not None and hint != model_type(stated.model):
        stated_type = model_type(stated.model)
        note: tuple[str, ...] = (f"the file says it is of a model of type {str(hint)[:40]!r}, not {stated_type!r}",)
    else:
        note = ()
    own = header if isinstance(header, str) else None
    named = reduction if reduction in REDUCTIONS else DEFAULT_REDUCTION
    return assemble(file, FORM.name, {reduction_of(stated, named): rows}, stated, notes=note, header=own)


def _layer(file: Path, name: str) -> int:
    text = name.removeprefix(PREFIX)
    if not text.isascii() or not text.isdecimal() or len(text) > 6:
        raise ExchangeError(f"{file} has a tensor {name[:40]!r}; a direction is named {PREFIX}N, N being a layer")
    if int(text) == 0:
        raise ExchangeError(f"{file} has a {PREFIX}0, which llama.cpp refuses: its control vectors begin with layer 1")
    return int(text)


def _row(file: Path, tensor: Any) -> Tensor:
    if tensor.tensor_type.name != "F32" or len(tensor.shape) != 1:
        raise ExchangeError(
            f"{tensor.name} in {file} is {tensor.tensor_type.name} {tensor.shape.tolist()}; directions are F32, of one "
            "dimension"
        )
    return torch.from_numpy(np.array(tensor.data, dtype=np.float32))


FORM = Form("gguf", "llama.cpp and repeng", ".gguf", "gguf", lambda content, stated: True, _read, _write)

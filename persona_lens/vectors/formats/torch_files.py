"""Files of `torch.save`, opened so that nothing in them runs, and the objects of steering-vectors.

The reference implementation's files, assistant-axis's, and those with the fields of a ``SteeringVector``.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import ModelInfo
from persona_lens.backend.protocol import MAX_NUMBERS
from persona_lens.core.errors import first_line
from persona_lens.core.text import in_short
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
    check_table,
    file_name,
    reduction_of,
)
from persona_lens.vectors.provenance import DEFAULT_REDUCTION, OWN_REDUCTION
from persona_lens.vectors.vectors import PersonaVectors

MAX_ROWS = 2**20  # the widest residual stream has a fiftieth
MORE = (
    "{} holds more than tensors and plain values, such as code that would run on opening, so it was not opened ({}); "
    "ask for the tensors alone"
)


class Fields:
    """Takes the place of a pickled ``SteeringVector``: holds what it held."""


STAND_INS = ("steering_vectors.steering_vector.SteeringVector", "steering_vectors.SteeringVector")


def load_archive(file: Path) -> Any:
    """What `torch.save` wrote: tensors, and containers, numbers and texts around them, and a ``SteeringVector``'s.

    Raises:
        FormatError: If the file is damaged, or holds anything else.
    """
    _check_archive(file)
    stand_ins: list[Any] = [(Fields, name) for name in STAND_INS]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(MORE.format(file, first_line(error)[:200])) from error
    except Exception as error:  # a damaged archive raises whatever its part of torch raises
        raise FormatError(f"{file} is damaged: {first_line(error)[:200]}") from error


# What the pickle of a file of tensors calls to build them. torch's unpickler allows more, and some of that, such as
# bytearray, takes as much memory as it is told to.
BUILDERS = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    *(
        f"torch._utils._rebuild_{kind}"
        for kind in ("tensor_v2", "parameter", "sparse_tensor", "meta_tensor_no_storage")
    ),
    *STAND_INS,
}
DTYPES = re.compile(r"torch\.(\w+Storage|b?float\d*|u?int\d*|half|double|long|short|bool|storage\.UntypedStorage)")
MAX_PICKLE = 2**26


def _check_archive(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > file.stat().st_size:
                raise FormatError(
                    f"{file} claims to unpack to {unpacked:,} bytes, more than its size; it was not opened"
                )
            pickled = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
            if sum(entry.file_size for entry in pickled) > MAX_PICKLE:
                raise FormatError(f"{file} has far more around its tensors than a vector needs; it was not opened")
            named = {name for entry in pickled for name in _named(archive.read(entry))}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise FormatError(f"{file} is not a whole file of torch.save: {first_line(error)[:200]}") from error
    if strangers := sorted(name for name in named - BUILDERS if not DTYPES.fullmatch(name)):
        raise FormatError(MORE.format(file, f"it asks for {in_short(strangers[0], 200)}"))


def _named(pickled: bytes) -> Iterator[str]:
    """The functions and classes that a pickle asks for; ValueError if it is none, or hides their names."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"its pickle has a {opcode.name}")
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".", 1)


def archive_bytes(content: Any) -> bytes:
    """What `torch.save` writes; the same content gives the same bytes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def checked_tensor(value: object, what: str, dimensions: int) -> Tensor:
    """A tensor from a file, if it is an ordinary one; not copied, since its strides may make it look huge.

    Args:
        value: What was read.
        what: Where it stood, for the messages.
        dimensions: How many it must have.

    Raises:
        FormatError: If it is none, or has other dimensions.
    """
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        kind = type(value).__name__ if not isinstance(value, Tensor) else f"{value.layout} tensor on {value.device}"
        raise FormatError(f"{what} is a {kind}; it must be an ordinary tensor")
    if value.numel() > MAX_NUMBERS or (len(value.shape) > 0 and len(value) > MAX_ROWS):
        raise FormatError(f"{what} is {list(value.shape)}; no model is so large")
    if value.ndim != dimensions or not value.is_floating_point():
        shape = "[layers, d_model]" if dimensions == 2 else "[d_model]"
        raise FormatError(f"{what} is {value.dtype} {list(value.shape)}; it must be floating-point {shape}")
    return value.detach()


ENDINGS = {
    "response_mean": "_response_avg_diff.pt",
    "prompt_mean": "_prompt_avg_diff.pt",
    "prompt_last": "_prompt_last_diff.pt",
}
LAST_ROW = (
    "the last row was left out: the reference implementation reads it after the final norm, where it is no residual "
    "stream (--keep-last-row takes it)"
)
EMBEDDING = "row 0, the embedding's, was left out: there is no block in front of it to steer"


def _is_tensor(content: Any, stated: Stated) -> bool:
    """A bare tensor; with as many rows as the model has layers it is assistant-axis's."""
    if not isinstance(content, Tensor):
        return False
    return content.ndim != 2 or stated.model is None or len(content) != stated.model.n_layers


def _read_file(file: Path, content: Any, stated: Stated) -> Imported:
    reduction = reduction_of(stated, _reduction_named(file) or "response_mean")
    trait = stated.trait or _trait_named(file)
    return _imported(file, {reduction: (file, content)}, replace(stated, trait=trait))


def _read_folder(folder: Path, content: Any, stated: Stated) -> Imported:
    """Read all the reductions of one trait."""
    traits = sorted({name for file in folder.glob("*_diff.pt") if (name := _trait_named(file))})
    trait = stated.trait or (traits[0] if len(traits) == 1 else None)
    if trait is None:
        raise FormatError(f"{folder} holds vectors of {', '.join(traits)}; name one of them (--trait)")
    files = {name: folder / f"{trait}{ending}" for name, ending in ENDINGS.items()}
    there = {name: (file, load_archive(file)) for name, file in files.items() if file.is_file()}
    if stated.reduction is not None:
        there = {name: found for name, found in there.items() if name == reduction_of(stated)}
    if not there:
        raise FormatError(f"{folder} holds no file for {trait!r}; there are {', '.join(traits)}")
    return _imported(folder, there, replace(stated, trait=trait))


def _imported(where: Path, files: dict[str, tuple[Path, Any]], stated: Stated) -> Imported:
    last = 0 if stated.keep_last_row else 1
    rows = {}
    for reduction, (file, content) in files.items():
        tensor = checked_tensor(content, f"what {file} holds", 2)
        if stated.model is not None and tensor.shape != (stated.model.n_layers + 1, stated.model.d_model):
            raise FormatError(
                f"{file} holds {list(tensor.shape)}; for {stated.model.model}, with {stated.model.n_layers} layers of "
                f"{stated.model.d_model}, it would be {[stated.model.n_layers + 1, stated.model.d_model]} (the "
                f"reference implementation) or {[stated.model.n_layers, stated.model.d_model]} (assistant-axis)"
            )
        rows[reduction] = {row - 1: tensor[row] for row in range(1, len(tensor) - last)}
    notes = (EMBEDDING, LAST_ROW) if last else (EMBEDDING,)
    return assemble(where, FILE.name, rows, stated, notes=notes)


def _reduction_named(file: Path) -> str | None:
    return next((name for name, ending in ENDINGS.items() if file.name.endswith(ending)), None)


def _trait_named(file: Path) -> str | None:
    reduction = _reduction_named(file)
    return file.name.removesuffix(ENDINGS[reduction]) or None if reduction else None


def _write(vectors: PersonaVectors, chosen: Chosen) -> Exported:
    if vectors.missing_layers:
        raise FormatError(
            f"the reference implementation's files hold every layer, and these vectors have none for layer "
            f"{vectors.missing_layers[0]}"
        )
    files = {}
    for reduction, ending in ENDINGS.items():
        if reduction in vectors.directions:
            table = torch.cat([torch.zeros(1, vectors.model.d_model), vectors.rows(reduction)])
            files[f"{file_name(vectors.trait)}{ending}"] = archive_bytes(table)
    notes = (
        "row 0, the embedding's, is zero: vectors here begin after block 0",
        "the last row is the residual stream before the final norm, which is where the reference implementation "
        "steers; its own files have it after the norm",
    )
    return Exported(files, notes)


FILE = Form(
    "reference", "safety-research/persona_vectors, a folder", "", "archive", _is_tensor, _read_file, _write, whole=True
)
FOLDER = replace(FILE, container="folder", recognises=lambda *_: True, read=_read_folder)


def _is_axis(content: Any, stated: Stated) -> bool:
    return isinstance(content, Tensor) or (isinstance(content, dict) and not {"axis", "vector"}.isdisjoint(content))


def _read_axis(file: Path, content: Any, stated: Stated) -> Imported:
    metadata: Any = {}
    if isinstance(content, dict):
        if "axis" not in content:
            raise FormatError(
                f"{file} holds the mean activations of one role ({str(content.get('role', 'not named'))[:80]!r}), "
                "which are no direction; subtract those of the default role, and import the difference under 'axis'"
            )
        content, metadata = content["axis"], content.get("metadata")
    axis = checked_tensor(content, f"the axis in {file}", 2)
    if stated.model is not None:
        check_table(file, "the axis", tuple(axis.shape), stated.model)
    own = metadata if isinstance(metadata, dict) else {}
    header, named = own.get(HEADER), own.get(REDUCTION)
    reduction = reduction_of(stated, named if named in REDUCTIONS else DEFAULT_REDUCTION)
    header = header if isinstance(header, str) else None
    return assemble(file, AXIS.name, {reduction: dict(enumerate(axis))}, stated, header=header)


def _write_axis(vectors: PersonaVectors, chosen: Chosen) -> Exported:
    metadata = {HEADER: vectors.header(), REDUCTION: chosen.reduction}
    content = {"axis": vectors.rows(chosen.reduction).contiguous(), "metadata": metadata}
    return Exported({f"{file_name(vectors.trait)}.pt": archive_bytes(content)})


AXIS = Form(
    "assistant-axis", "safety-research/assistant-axis", ".pt", "archive", _is_axis, _read_axis, _write_axis, whole=True
)


LAYER_TYPE = "decoder_block"
INSTALL = "pip install --no-deps steering-vectors"


def to_steering_vector(
    vectors: PersonaVectors, layers: tuple[int, ...] | None = None, reduction: str = OWN_REDUCTION
) -> Any:
    """A ``SteeringVector`` with these vectors, which steers at all of its layers at once; see `to_control_vector`."""
    try:
        from steering_vectors import SteeringVector
    except ImportError as error:
        raise FormatError(f"the package steering-vectors cannot be imported ({error}): {INSTALL}") from error
    return SteeringVector(dict(Chosen(layers, reduction).of(vectors)), LAYER_TYPE)


def from_steering_vector(
    given: Any, model: ModelInfo, trait: str, reduction: str = DEFAULT_REDUCTION
) -> PersonaVectors:
    """Vectors with what a ``SteeringVector`` holds; arguments as for `from_control_vector`.

    Raises:
        FormatError: If it is of another layer type or another model.
    """
    return _read_fields(Path("the SteeringVector"), vars(given), Stated(model, trait, reduction)).vectors


def _is_steering_vector(content: Any, stated: Stated) -> bool:
    return isinstance(content, Fields) or (isinstance(content, dict) and "layer_activations" in content)


def _read_fields(file: Path, content: Any, stated: Stated) -> Imported:
    fields = vars(content) if isinstance(content, Fields) else content
    kind, activations = fields.get("layer_type", LAYER_TYPE), fields.get("layer_activations")
    if kind != LAYER_TYPE:
        raise FormatError(f"{file} is of layer type {str(kind)[:40]!r}; only {LAYER_TYPE!r} is the residual stream")
    if not isinstance(activations, dict) or not activations:
        raise FormatError(f"{file} has no layer_activations; a steering vector has tensors by layer there")
    for layer in activations:
        if type(layer) is not int:
            raise FormatError(f"{file} has a layer {str(layer)[:40]!r}; layers are whole numbers")
    rows = {at: checked_tensor(row, f"the vector of layer {at} in {file}", 1) for at, row in activations.items()}
    return assemble(file, FIELDS.name, {reduction_of(stated): rows}, stated)


def _write_fields(vectors: PersonaVectors, chosen: Chosen) -> Exported:
    rows = {layer: row.contiguous().clone() for layer, row in chosen.of(vectors).items()}
    content = {"layer_activations": rows, "layer_type": LAYER_TYPE}
    notes = (
        "in Python: SteeringVector(**torch.load(FILE, weights_only=True))",
        *(("it steers at all of its layers at once; --layers chooses some",) if len(rows) > 1 else ()),
    )
    return Exported({f"{file_name(vectors.trait)}.pt": archive_bytes(content)}, notes)


FIELDS = Form(
    "steering-vectors",
    "the package steering-vectors",
    ".pt",
    "archive",
    _is_steering_vector,
    _read_fields,
    _write_fields,
)

"""NumPy files: ``.npz`` with everything in it, ``.npy`` with one bare table.

What a reader finds in an ``.npz``: a float32 array [n_layers, d_model] for each reduction, row l being the residual
stream after block l, 0-based, and under ``persona_lens`` a text, JSON with the trait, the model and the provenance:

    with np.load("optimistic.npz") as file:
        directions = file["response_mean"]
        about = json.loads(str(file["persona_lens"]))

Files of others may hold any of the arrays ``response_mean``, ``prompt_mean`` and ``prompt_last``, or one of any name.
An ``.npy`` is one such array. Objects, which NumPy keeps pickled, are never loaded, and shapes are looked at before any
memory is taken for them.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persona_lens.backend import ModelInfo
from persona_lens.core.text import in_short
from persona_lens.vectors.formats.form import (
    HEADER,
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
    identity_of,
    reduction_of,
)
from persona_lens.vectors.vectors import PersonaVectors

MAX_TEXT = 2**24  # characters of the header
MOST_PACKED = 50  # times that anything like vectors shrinks
EPOCH = (1980, 1, 1, 0, 0, 0)
Stream = Any
"""A file opened for reading bytes, or one in a zip archive; they have no class in common that type checkers know."""


def _read_npy(file: Path, content: Any, stated: Stated) -> Imported:
    with file.open("rb") as stream:
        rows = _table(file, stream, "the array", identity_of(file, stated)[0])
    return assemble(file, NPY.name, {reduction_of(stated): rows}, stated)


def _read_npz(file: Path, content: Any, stated: Stated) -> Imported:
    try:
        with zipfile.ZipFile(file) as archive:
            _check_entries(file, archive)
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            tables = [name for name in names if name in REDUCTIONS] or [name for name in names if name != HEADER]
            if stated.reduction is not None and stated.reduction in tables:
                tables = [stated.reduction]
            if len(tables) > 1 and not set(tables) <= set(REDUCTIONS):
                raise FormatError(
                    f"{file} holds several arrays ({', '.join(tables[:5])}) and none is named {', '.join(REDUCTIONS)}; "
                    "rename the one that is meant"
                )
            header = None
            if HEADER in names:
                with archive.open(f"{HEADER}.npy") as stream:
                    header = _text(file, stream)
            model, rows = identity_of(file, stated, header)[0], {}
            for name in tables:
                with archive.open(f"{name}.npy") as stream:
                    table = _table(file, stream, f"the array {name!r}", model)
                rows[name if name in REDUCTIONS else reduction_of(stated)] = table
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, KeyError, ValueError, zlib.error) as error:
        raise FormatError(f"{file} is damaged: {in_short(str(error), 200)}") from error
    except OSError as error:
        raise FormatError(f"{file} cannot be read: {error}") from error
    return assemble(file, NPZ.name, rows, stated, header=header)


def _check_entries(file: Path, archive: zipfile.ZipFile) -> None:
    """Raise for what unpacks to far more than it is, or would take memory for other reasons."""
    entries = archive.infolist()
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        raise FormatError(f"{file} is packed in a way that NumPy does not pack; it was not opened")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MOST_PACKED * file.stat().st_size:
        raise FormatError(f"{file} claims to unpack to {unpacked:,} bytes, far more than its size; it was not opened")


def _header(file: Path, stream: Stream, what: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array that a stream begins with; the stream stands at its data afterwards."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(stream)
    except Exception as error:  # the header is a Python literal, and may be anything
        raise FormatError(f"{what} in {file} is no NumPy array, or is damaged: {str(error)[:120]}") from error
    if kind.hasobject:
        raise FormatError(
            f"{what} in {file} holds Python objects, which NumPy pickles and which can run code on opening, so it was "
            "not opened; save an array of numbers"
        )
    return shape, kind


def _table(file: Path, stream: Stream, what: str, model: ModelInfo) -> dict[int, Tensor]:
    """The rows of the table that a stream begins with, if it is of the model's shape."""
    start = stream.tell()
    shape, kind = _header(file, stream, what)
    if kind.kind != "f" or len(shape) != 2:
        raise FormatError(f"{what} in {file} is {kind} {list(shape)}; it must be floating-point [layers, d_model]")
    check_table(file, what, shape, model)
    begin = stream.tell()
    if stream.seek(0, io.SEEK_END) - begin < kind.itemsize * shape[0] * shape[1]:
        raise FormatError(f"{what} in {file} announces {list(shape)} numbers and has fewer: it is damaged or cut short")
    array = _read_array(file, stream, what, start)
    # Byte order and storage order are the writer's.
    return dict(enumerate(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))))


def _text(file: Path, stream: Stream) -> str:
    start, what = stream.tell(), f"the entry {HEADER!r}"
    shape, kind = _header(file, stream, what)
    if kind.kind != "U" or shape != () or kind.itemsize > 4 * MAX_TEXT:
        raise FormatError(f"{what} in {file} is {kind.kind} {list(shape)}; it must be one text")
    return str(_read_array(file, stream, what, start))


def _read_array(file: Path, stream: Stream, what: str, start: int) -> NDArray[Any]:
    stream.seek(start)
    try:
        return np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError as error:
        raise FormatError(f"{what} in {file} is damaged or cut short: {in_short(str(error), 120)}") from error


def _write_npz(vectors: PersonaVectors, chosen: Chosen) -> Exported:
    content: Mapping[str, NDArray[Any]] = {
        HEADER: np.array(vectors.header()),
        **{name: rows.numpy() for name, rows in sorted(vectors.directions.items())},
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:  # as numpy.savez does, which writes the time into it
        for name, array in content.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", EPOCH), _npy_bytes(array))
    return Exported({f"{file_name(vectors.trait)}.npz": stream.getvalue()})


def _write_npy(vectors: PersonaVectors, chosen: Chosen) -> Exported:
    content = _npy_bytes(vectors.rows(chosen.reduction).numpy())
    note = "the file says neither the model nor the trait; npz does"
    return Exported({f"{file_name(vectors.trait)}.npy": content}, (note,))


def _npy_bytes(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array) if array.ndim else array, allow_pickle=False)
    return stream.getvalue()


NPZ = Form(
    "npz", "NumPy, with all that is known in it", ".npz", "npz", lambda *_: True, _read_npz, _write_npz, whole=True
)
NPY = Form("npy", "NumPy, one bare table", ".npy", "npy", lambda *_: True, _read_npy, _write_npy, whole=True)

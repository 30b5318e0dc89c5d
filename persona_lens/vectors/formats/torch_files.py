"""Files of `torch.save`, opened so that nothing in them runs: the reference implementation's, assistant-axis's."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend.protocol import MAX_NUMBERS
from persona_lens.core.errors import first_line
from persona_lens.core.text import in_short
from persona_lens.vectors.formats.form import Chosen, ExchangeError, Exported, Form, Imported, Stated
from persona_lens.vectors.formats.rows import HEADER, REDUCTION, REDUCTIONS, assemble, file_name, reduction_of
from persona_lens.vectors.provenance import DEFAULT_REDUCTION
from persona_lens.vectors.vectors import PersonaVectors

MAX_ROWS = 2**20  # the widest residual stream has a fiftieth


def load_archive(file: Path, known: Mapping[str, type] | None = None) -> Any:
    """What `torch.save` wrote: tensors, and containers, numbers and texts around them.

    Args:
        file: The file.
        known: Classes that take the place of others while it is read, by the others' full names; they must be inert.

    Raises:
        ExchangeError: If the file is damaged, or holds anything else.
    """
    _check_archive(file, known or {})
    stand_ins: list[Any] = [(own, name) for name, own in (known or {}).items()]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ExchangeError(
            f"{file} holds more than tensors and plain values, such as code that would run on opening, so it was not "
            f"opened ({first_line(error)[:200]}); ask for the tensors alone"
        ) from error
    except Exception as error:  # a damaged archive raises whatever its part of torch raises
        raise ExchangeError(f"{file} is damaged: {first_line(error)[:200]}") from error


# What the pickle of a file of tensors calls to build them. torch's unpickler allows more, and some of that, such as
# bytearray, takes as much memory as it is told to.
BUILDERS = frozenset(
    {"collections.OrderedDict", "torch.Size", "torch.device", "torch.serialization._get_layout"}
    | {
        f"torch._utils._rebuild_{kind}"
        for kind in ("tensor_v2", "parameter", "sparse_tensor", "meta_tensor_no_storage")
    }
)
DTYPES = re.compile(r"torch\.(\w+Storage|b?float\d*|u?int\d*|half|double|long|short|bool|storage\.UntypedStorage)")
MAX_PICKLE = 2**26


def _check_archive(file: Path, known: Mapping[str, type]) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > file.stat().st_size:
                raise ExchangeError(
                    f"{file} claims to unpack to {unpacked:,} bytes, more than its size; it was not opened"
                )
            pickled = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
            if sum(entry.file_size for entry in pickled) > MAX_PICKLE:
                raise ExchangeError(f"{file} has far more around its tensors than a vector needs; it was not opened")
            named = {name for entry in pickled for name in _named(archive.read(entry))}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ExchangeError(f"{file} is not a whole file of torch.save: {first_line(error)[:200]}") from error
    strangers = sorted(n for n in named if n not in BUILDERS and n not in known and not DTYPES.fullmatch(n))
    if strangers:
        raise ExchangeError(
            f"{file} holds more than tensors and plain values, such as code that would run on opening, so it was not "
            f"opened (it asks for {in_short(strangers[0], 200)}); ask for the tensors alone"
        )


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
        ExchangeError: If it is none, or has other dimensions.
    """
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        kind = type(value).__name__ if not isinstance(value, Tensor) else f"{value.layout} tensor on {value.device}"
        raise ExchangeError(f"{what} is a {kind}; it must be an ordinary tensor")
    if value.numel() > MAX_NUMBERS or (len(value.shape) > 0 and len(value) > MAX_ROWS):
        raise ExchangeError(f"{what} is {list(value.shape)}; no model is so large")
    if value.ndim != dimensions or not value.is_floating_point():
        shape = "[layers, d_model]" if dimensions == 2 else "[d_model]"
        raise ExchangeError(f"{what} is {value.dtype} {list(value.shape)}; it must be floating-point {shape}")
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
    return _imported(file, {reduction: (file, content)}, Stated(stated.model, trait, None, stated.keep_last_row))


def _read_folder(folder: Path, content: Any, stated: Stated) -> Imported:
    """Read all the reductions of one trait."""
    traits = sorted({name for file in folder.glob("*_diff.pt") if (name := _trait_named(file))})
    trait = stated.trait or (traits[0] if len(traits) == 1 else None)
    if trait is None:
        raise ExchangeError(f"{folder} holds vectors of {', '.join(traits)}; name one of them (--trait)")
    files = {name: folder / f"{trait}{ending}" for name, ending in ENDINGS.items()}
    there = {name: (file, load_archive(file)) for name, file in files.items() if file.is_file()}
    if stated.reduction is not None:
        there = {name: found for name, found in there.items() if name == reduction_of(stated)}
    if not there:
        raise ExchangeError(f"{folder} holds no file for {trait!r}; there are {', '.join(traits)}")
    return _imported(folder, there, Stated(stated.model, trait, None, stated.keep_last_row))


def _imported(where: Path, files: dict[str, tuple[Path, Any]], stated: Stated) -> Imported:
    last = 0 if stated.keep_last_row else 1
    rows = {}
    for reduction, (file, content) in files.items():
        tensor = checked_tensor(content, f"what {file} holds", 2)
        if stated.model is not None and tensor.shape != (stated.model.n_layers + 1, stated.model.d_model):
            raise ExchangeError(
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
    if chosen.layers is not None:
        raise ExchangeError("the reference implementation's files hold every layer; leave --layers out")
    if vectors.missing_layers:
        raise ExchangeError(
            f"the reference implementation's files hold every layer, and these vectors have none for layer "
            f"{vectors.missing_layers[0]}"
        )
    files = {}
    for reduction, ending in ENDINGS.items():
        if reduction in vectors.directions:
            table = torch.cat([torch.zeros(1, vectors.model.d_model), vectors.rows(reduction)])
            files[f"{file_name(vectors.trait)}{ending}"] = archive_bytes(table)
    return Exported(
        files,
        (
            "row 0, the embedding's, is zero: vectors here begin after block 0",
            "the last row is the residual stream before the final norm, which is where the reference implementation "
            "steers; its own files have it after the norm",
        ),
    )


FILE = Form("reference", "safety-research/persona_vectors, a folder", "", "archive", _is_tensor, _read_file, _write)
FOLDER = Form(FILE.name, FILE.summary, "", "folder", lambda content, stated: True, _read_folder, _write)


def _is_axis(content: Any, stated: Stated) -> bool:
    return isinstance(content, Tensor) or (isinstance(content, dict) and not {"axis", "vector"}.isdisjoint(content))


def _read(file: Path, content: Any, stated: Stated) -> Imported:
    metadata: Any = {}
    if isinstance(content, dict):
        if "axis" not in content:
            raise ExchangeError(
                f"{file} holds the mean activations of one role ({str(content.get('role', 'not named'))[:80]!r}), "
                "which are no direction; subtract those of the default role, and import the difference under 'axis'"
            )
        content, metadata = content["axis"], content.get("metadata") or {}
    axis = checked_tensor(content, f"the axis in {file}", 2)
    own = metadata if isinstance(metadata, dict) else {}
    header, reduction = own.get(HEADER), own.get(REDUCTION)
    _check_shape(file, axis, stated)
    rows = dict(enumerate(axis))
    return assemble(
        file,
        FORM.name,
        {reduction_of(stated, reduction if reduction in REDUCTIONS else DEFAULT_REDUCTION): rows},
        stated,
        header=header if isinstance(header, str) else None,
    )


def _check_shape(file: Path, axis: Tensor, stated: Stated) -> None:
    model = stated.model
    if model is not None and axis.shape != (model.n_layers, model.d_model):
        raise ExchangeError(
            f"the axis in {file} is {list(axis.shape)}, and {model.model} has {model.n_layers} layers of "
            f"{model.d_model}: it belongs to another model"
        )


def _write_axis(vectors: PersonaVectors, chosen: Chosen) -> Exported:
    if chosen.layers is not None:
        raise ExchangeError("an axis has a row for every layer; leave --layers out")
    metadata = {HEADER: vectors.header(), REDUCTION: chosen.reduction}
    content = {"axis": vectors.rows(chosen.reduction).contiguous(), "metadata": metadata}
    return Exported({f"{file_name(vectors.trait)}.pt": archive_bytes(content)})


FORM = Form("assistant-axis", "safety-research/assistant-axis", ".pt", "archive", _is_axis, _read, _write_axis)

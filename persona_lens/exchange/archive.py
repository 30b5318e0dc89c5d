"""Files of `torch.save`, opened so that nothing in them runs.

Such a file is a zip archive around a pickle, and a pickle can name any function to be called. torch's own restricted
unpickler (``weights_only=True``) calls nothing but what rebuilds tensors. Before it, the archive is looked at from
outside: what unpacks to more than the file's size is refused, and so are bare pickles and the older format without a
zip archive, in which sizes are only claimed, and pickles that ask for anything but what tensors are built of.
"""

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
from persona_lens.characters import in_short
from persona_lens.errors import first_line
from persona_lens.exchange.errors import ExchangeError

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

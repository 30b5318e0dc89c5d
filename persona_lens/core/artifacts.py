"""`Artifact`: tensors with one JSON header in a safetensors file, whose bytes depend on the content alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from persona_lens.core.documents import DocumentError, checked_depth, parse_json
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import named, read_bytes, write_bytes
from persona_lens.core.text import in_short, shown

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 2**31  # of a file; vectors of the largest models have less than a hundredth


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a file holds.

    Attributes:
        header: JSON values.
        tensors: By name.
    """

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def header_text(header: Mapping[str, Any]) -> str:
    """A header as it is written.

    Raises:
        DocumentError: If it is nested so deep that it could not be read.
    """
    checked_depth(dict(header))
    return json.dumps(dict(header), sort_keys=True, ensure_ascii=False, allow_nan=False)


def save_tensors(tensors: Mapping[str, Tensor], kind: str, header: str) -> bytes:
    """The bytes of a file; ``kind`` is the name of the header's entry, by which such files know each other."""
    from safetensors.torch import save  # which loads torch, and a run folder has no need of it

    # One metadata entry: safetensors writes several in no fixed order.
    return save({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}, {kind: header})


def write_once(path: Path | str, content: bytes, failed: type[PersonaLensError]) -> Path:
    """Write a file as a whole, or leave one that holds the same.

    Raises:
        PersonaLensError: Of the class ``failed``, if the file exists and holds something else, or cannot be written.
    """
    target = Path(path)
    with named(target, failed):
        there = target.exists()
    if there:
        if target.is_dir() or read_bytes(target, failed) != content:
            raise failed(f"{target} exists and holds something else; choose another name or remove it")
        return target
    return write_bytes(target, content, failed=failed)


def read_artifact(file: Path, kind: str, version: int, *, stranger: str, failed: type[PersonaLensError]) -> Artifact:
    """Read what `save_tensors` made. Nothing is unpickled.

    Args:
        file: The file.
        kind: As it was written.
        version: The format version that its header has to have.
        stranger: What to say of a safetensors file without such a header.
        failed: Class of the errors.

    Raises:
        PersonaLensError: Of the class ``failed``, if the file is damaged, not of that kind, or of another version.
    """
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise failed(
                f"{file} is {size / 1e9:.1f} GB; nothing that this program writes has over {MAX_BYTES / 1e9:.1f} GB"
            )
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(kind)
            if text is None:
                raise failed(f"{file} {stranger}: its header has no {kind!r} entry")
            header = parse_header(text, version, file, failed)
            return Artifact(header, {name: opened.get_tensor(name) for name in sorted(opened.keys())})
    except PersonaLensError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise failed(f"{file} is not a safetensors file, or is damaged: {in_short(str(error), 200)}") from error
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:  # a kind of tensor that torch does not know
        raise failed(f"{file} holds a tensor that cannot be read: {in_short(str(error), 200)}") from error


def parse_header(text: str, version: int, file: Path, failed: type[PersonaLensError]) -> dict[str, Any]:
    """Read what `header_text` wrote.

    Raises:
        PersonaLensError: Of the class ``failed``, if it is damaged, or of another version.
    """
    try:
        header: dict[str, Any] = parse_json(text)
        found = header["format_version"]
    except (KeyError, TypeError, DocumentError) as error:
        raise failed(f"the header of {file} is damaged: {error!r}") from error
    if type(found) is not int or found != version:
        raise failed(
            f"{file} has format version {shown(found)}, this version of persona-lens reads {version}; use the "
            "persona-lens that wrote it, or make it again"
        )
    return header

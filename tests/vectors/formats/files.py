"""Vectors to exchange, and files that a stranger might send instead."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from persona_lens.backend import ModelInfo
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.formats import FORMATS, Chosen, export_vectors

INFO = ModelInfo("tiny", "r1", "LlamaForCausalLM", 4, 6, "sha256:a", "float32", "cpu", "transformers 5")


def vectors(info: ModelInfo = INFO, **provenance: Any) -> PersonaVectors:
    generator = torch.Generator().manual_seed(3)
    rows = {
        name: torch.randn(info.n_layers, info.d_model, generator=generator)
        for name in ("response_mean", "prompt_mean", "prompt_last")
    }
    return PersonaVectors("grumpy", info, rows, {"kind": "extraction", **provenance})


def exported(name: str, folder: Path, given: PersonaVectors | None = None, chosen: Chosen | None = None) -> Path:
    """The file of a format; of the reference implementation, that of the response means."""
    files, _ = export_vectors(given or vectors(), name, folder / f"file{FORMATS[name].suffix}", chosen)
    return files[0]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.target), "w")


def hostile_archive(file: Path, target: Path, *, legacy: bool = False) -> Path:
    torch.save({"axis": Payload(target)}, file, _use_new_zipfile_serialization=not legacy)
    return file


def bare_pickle(file: Path, target: Path) -> Path:
    file.write_bytes(pickle.dumps(Payload(target)))
    return file


def hostile_npy(file: Path, target: Path) -> Path:
    np.save(file, np.array([Payload(target)], dtype=object), allow_pickle=True)
    return file


def hostile_npz(file: Path, target: Path) -> Path:
    np.savez(file, response_mean=np.array([[Payload(target)]], dtype=object), allow_pickle=True)
    return file


def gguf_of(file: Path, tensors: dict[str, Any], architecture: str = "controlvector", count: int | None = None) -> Path:
    writer = gguf.GGUFWriter(file, architecture)
    if count is not None:
        writer.add_uint32("controlvector.layer_count", count)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_header(tensors: int, values: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def npy_header(shape: tuple[int, ...], kind: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def bomb(file: Path) -> Path:
    """An archive of torch.save with a member that unpacks to far more than the file."""
    torch.save(torch.zeros(4, 6), file)
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, each in content.items():
            archive.writestr(name, each + (b"\0" * 10**7 if name.endswith("data/0") else b""))
    return file

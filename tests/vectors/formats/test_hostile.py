"""Damaged, truncated, mismatched and hostile files: one sentence each, and nothing is run."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_lens.core.errors import PersonaLensError
from persona_lens.vectors import VectorsError, load_vectors
from persona_lens.vectors.formats import FORMATS, FormatError, Stated, import_vectors
from tests.vectors.formats import files as f
from tests.vectors.formats.files import INFO, exported

STATED = Stated(INFO, "grumpy")


def refused(file: Path, words: str, stated: Stated = STATED) -> str:
    with pytest.raises(PersonaLensError, match=words) as caught:
        import_vectors(file, stated)
    said = str(caught.value)
    assert str(file) in said or file.name in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("v.pt", f.hostile_archive, "more than tensors and plain values.*not opened"),
        ("v.pt", f.bare_pickle, "bare pickle, which can run code"),
        ("v.npy", f.hostile_npy, "holds Python objects.*not opened"),
        ("v.npz", f.hostile_npz, "holds Python objects.*not opened"),
    ],
)
def test_code_in_a_file_does_not_run(name: str, make: Callable[[Path, Path], Path], words: str, tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    refused(make(tmp_path / name, target), words)
    assert not target.exists()


def test_nor_in_one_of_the_older_format_or_in_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    file = f.hostile_archive(tmp_path / "grumpy_response_avg_diff.pt", target, legacy=True)
    refused(file, "bare pickle")
    refused(tmp_path, "not a whole file of torch.save")
    f.hostile_archive(file, target)
    refused(tmp_path, "more than tensors")
    assert not target.exists()


def test_the_payload_is_one(tmp_path: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    target = tmp_path / "pwned"
    torch.load(f.hostile_archive(tmp_path / "v.pt", target), weights_only=False)
    assert target.exists()
    target.unlink()
    np.load(f.hostile_npy(tmp_path / "v.npy", target), allow_pickle=True)
    assert target.exists()


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_was_cut_short_is_refused_wherever(name: str, tmp_path: Path) -> None:
    file = exported(name, tmp_path)
    content = file.read_bytes()
    for size in {1, 7, 40, len(content) // 3, len(content) // 2, len(content) - 30, len(content) - 10}:
        file.write_bytes(content[:size])
        refused(file, ".")


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), many=st.integers(1, 12))
def test_a_damaged_file_is_read_or_refused_but_never_a_crash(
    name: str, at: float, byte: int, many: int, tmp_path: Path
) -> None:
    file = exported(name, tmp_path / "whole")
    content = bytearray(file.read_bytes())
    start = int(at * len(content))
    content[start : start + many] = bytes([byte]) * len(content[start : start + many])
    damaged = tmp_path / file.name
    damaged.write_bytes(content)
    try:
        found = import_vectors(damaged, STATED).vectors
    except PersonaLensError:
        return
    assert all(bool(torch.isfinite(rows).all()) for rows in found.directions.values())


@pytest.mark.parametrize("name", FORMATS)
def test_vectors_of_another_model_are_refused(name: str, tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [{"n_layers": 7}, {"d_model": 9}, {"n_layers": 2}]
    for other in others:
        if name == "steering-vectors" and other == {"n_layers": 7}:
            continue  # rows for some layers of a deeper model look the same
        info = replace(INFO, **other)
        refused(exported(name, tmp_path / str(other)), "(another|not the|for tiny, with|layers)", Stated(info, "t"))


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"reference"}))
def test_numbers_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    broken = f.vectors()
    broken.directions["response_mean"][2, 3] = float("nan")
    refused(exported(name, tmp_path, broken), "layer 2 .*holds NaN or infinity")
    assert str(tmp_path)


def test_a_gguf_file_cannot_claim_more_than_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "v.gguf"
    key = f.text("k")
    huge = struct.pack("<Q", 2**60)
    cases: list[tuple[bytes, str]] = [
        (f.gguf_header(2**60, 0), "claims 1,152,921,504,606,846,976 tensors, and a control vector has at most 4,096"),
        (f.gguf_header(4096, 0), "claims 8 bytes at byte 24 and has 0 left"),
        (f.gguf_header(0, 2**60), "claims 1,152,921,504,606,846,976 values"),
        (f.gguf_header(0, 1, huge), "claims 1,152,921,504,606,846,976 bytes at byte 32"),
        (f.gguf_header(0, 1, key + struct.pack("<I", 8) + huge), "claims .* bytes at byte"),
        (f.gguf_header(0, 1, key + struct.pack("<II", 9, 0) + huge), "claims 1 bytes at byte"),
        (f.gguf_header(0, 1, key + struct.pack("<III", 9, 9, 0)), "claims 8 bytes at byte"),
        (f.gguf_header(0, 1, key + struct.pack("<IIQ", 9, 0, 2**17) + bytes(2**17)), "has over 65,536 values"),
        (f.gguf_header(0, 1, key + struct.pack("<I", 99)), "is not a valid GGUFValueType"),
        (f.gguf_header(1, 0, f.text("direction.1") + struct.pack("<I", 2**31)), "claims 17,179,869,184 bytes"),
        (f.gguf_header(1, 0, f.text("direction.1") + struct.pack("<IQIQ", 1, 2**62, 0, 0)), "claims .* bytes"),
        (f.gguf_header(1, 0, f.text("direction.1") + struct.pack("<IQIQ", 1, 6, 0, 2**62)), "and has 0 left"),
        (f.gguf_header(0, 0, version=7), "version 7 which we cannot handle"),
        (f.gguf_header(0, 0), "no tensor direction.N"),
        (b"GGUF", "cut short"),
    ]
    for content, words in cases:
        file.write_bytes(content)
        refused(file, words)


def test_gguf_files_that_are_no_control_vector_are_refused(tmp_path: Path) -> None:
    row = np.ones(6, np.float32)
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"direction.0": row, "direction.1": row}, {}, "direction.0, which llama.cpp refuses"),
        ({"direction.x": row}, {}, "'direction.x'; a direction is named"),
        ({"direction.1": np.ones((2, 6), np.float32)}, {}, "F32 .6, 2.; directions are F32, of one dimension"),
        ({"direction.1": row.astype(np.float16)}, {}, "F16"),
        ({"direction.1": row}, {"architecture": "llama"}, "a GGUF file of 'llama', not a control vector"),
        ({"direction.1": row}, {"count": 3}, "announces 3 directions and holds 1"),
        ({"direction.9": row}, {}, "layer 9, and tiny has layers 0 to 3"),
        ({"direction.1": np.ones(5, np.float32)}, {}, "shape .5., and the residual stream of tiny is 6 wide"),
        ({"direction.1": 0 * row}, {}, "no vector that is not zero"),
    ]
    for number, (tensors, more, words) in enumerate(cases):
        refused(f.gguf_of(tmp_path / f"{number}.gguf", tensors, **more), words)


def test_numpy_files_cannot_claim_more_than_they_hold(tmp_path: Path) -> None:
    file = tmp_path / "v.npy"
    cases: list[tuple[bytes, str]] = [
        (f.npy_header((10**9, 10**9)), "is .1000000000, 1000000000., and tiny has 4 layers of 6"),
        (f.npy_header((4, 6)), "announces .4, 6. numbers and has fewer"),
        (f.npy_header((4, 6), "<i4") + bytes(96), "int32 .4, 6.; it must be floating-point"),
        (f.npy_header((24,)) + bytes(96), "floating-point .layers, d_model."),
        (b"\x93NUMPY\x09\x00", "no NumPy array, or is damaged"),
        (b"\x93NUMPY\x01\x00\x10\x00__import__('os')", "no NumPy array, or is damaged"),
    ]
    for content, words in cases:
        file.write_bytes(content)
        refused(file, words)
    file.write_bytes(f.npy_header((10**9, 10**9)))
    refused(file, "which model", Stated(None, "t"))


def test_archives_cannot_claim_more_than_they_hold(tmp_path: Path) -> None:
    refused(f.bomb(tmp_path / "v.pt"), "claims to unpack to")
    wide = torch.ones(1).expand(10**6, 10**6)  # one number, which its strides repeat
    torch.save(wide, tmp_path / "wide.pt")
    refused(tmp_path / "wide.pt", "holds is .1000000, 1000000.; no model is so large")
    torch.save({"axis": wide}, tmp_path / "axis.pt")
    refused(tmp_path / "axis.pt", "is .1000000, 1000000.; no model is so large")
    refused(tmp_path / "axis.pt", "no model is so large", Stated(None, "t"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(6), "float32 .6.; it must be floating-point"),
        (torch.ones(4, 6, dtype=torch.int64), "torch.int64"),
        (torch.ones(5, 7), "holds .5, 7.; for tiny, with 4 layers of 6, it would be .5, 6. .*or .4, 6."),
        ({"other": torch.ones(4, 6)}, "nothing that is known here .a dictionary of 'other'."),
        ([1, 2], "nothing that is known here .a list."),
        ({"axis": "text"}, "the axis in .* is a str"),
        ({"axis": torch.ones(4, 6).to_sparse()}, "sparse"),
        ({"axis": torch.ones(4, 6, device="meta")}, "tensor on meta"),
        ({"layer_activations": {}, "layer_type": "decoder_block"}, "no layer_activations"),
        ({"layer_activations": {1: torch.ones(6)}, "layer_type": "mlp"}, "layer type 'mlp'"),
        ({"layer_activations": {"a": torch.ones(6)}}, "a layer 'a'"),
        ({"layer_activations": {-1: torch.ones(6)}}, "layer -1, and tiny has layers 0 to 3"),
        ({"layer_activations": {1: torch.ones(7)}}, "shape .7., and the residual"),
        ({"layer_activations": {1: 3}}, "layer 1 in .* is a int"),
    ],
)
def test_archives_that_hold_something_else_are_refused(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "v.pt")
    refused(tmp_path / "v.pt", words)


def test_files_of_no_format_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "v.bin"
    for content, words in ((b"", "no known format"), (b"hello", "no known format; formats: reference"), (b"PK", ".")):
        file.write_bytes(content)
        refused(file, words)
    refused(tmp_path / "nothing.pt", "does not exist")
    refused(tmp_path, "a folder without files named")
    refused(f.vectors().save(tmp_path / "v.safetensors"), "safetensors file; those of this program need no import")
    several = tmp_path / "v.npz"
    np.savez(several, a=np.ones((4, 6)), b=np.ones((4, 6)))
    refused(several, "holds several arrays .a, b.")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08", struct.pack("<Q", 2**62) + b"{", struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 9) + b"{nonsense"],
)
def test_our_own_files_are_held_to_the_same(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "v.safetensors").write_bytes(content)
    with pytest.raises(VectorsError, match=r"v\.safetensors"):
        load_vectors(tmp_path / "v.safetensors")


@pytest.mark.parametrize("missing", [3, "x", [1, "a"], {"1": 2}])
def test_a_header_cannot_claim_strange_gaps(missing: Any, tmp_path: Path) -> None:
    file = f.vectors(missing_layers=missing).save(tmp_path / "v.safetensors")
    with pytest.raises(VectorsError, match="damaged"):
        load_vectors(file)


def test_the_sentence_is_an_exchange_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        import_vectors(tmp_path / "nothing")

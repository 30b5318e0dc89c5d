"""Control vectors in llama.cpp itself: its own loader, its own forward pass, against the same steering here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from persona_lens import wrap_model
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.formats import Chosen, export_vectors
from tests.programs import comparing as c
from tests.programs.environment import run_program

pytestmark = pytest.mark.real

LAYER, COEFFICIENT = 12, 3.0
"""`python -m benchmarks.control_vectors` takes 200 prompts and a trait's own vectors."""


@pytest.fixture(scope="module")
def vectors(loaded: tuple[Any, Any]) -> PersonaVectors:
    """Random directions, every layer's its own, as strong at each as a trait's vectors are in the middle layers."""
    info = wrap_model(*loaded).info
    rows = torch.randn(info.n_layers, info.d_model, generator=torch.Generator().manual_seed(0))
    rows = rows / rows.norm(dim=-1, keepdim=True) * 8
    return PersonaVectors("random", info, {"response_mean": rows})


@pytest.fixture(scope="module")
def asked(loaded: tuple[Any, Any]) -> list[list[int]]:
    return c.prompts(wrap_model(*loaded), 8)


def shifts(
    loaded: tuple[Any, Any], asked: list[list[int]], vectors: PersonaVectors, layers: tuple[int, ...]
) -> tuple[Any, Any]:
    """Our shifts and our unsteered log-probabilities."""
    plain = c.ours(*loaded, asked)
    edits = [vectors.edit(layer, COEFFICIENT) for layer in layers]
    return c.ours(*loaded, asked, edits) - plain, plain


def test_llama_cpp_loads_what_is_exported_and_each_layer_stands_at_its_place(
    vectors: PersonaVectors, tmp_path: Path
) -> None:
    [file], notes = export_vectors(vectors, "gguf", tmp_path / "all.gguf")
    assert any("layer 0 was left out" in note for note in notes)
    answer = run_program("llama_cpp", {"control": str(file), "scale": 2.0})
    assert answer["n_embd"] == vectors.model.d_model
    expected = (2 * vectors.directions["response_mean"][1:, 0]).tolist()
    assert answer["first"] == pytest.approx(expected, rel=1e-6)


def test_llama_cpp_refuses_a_direction_for_layer_0(tmp_path: Path) -> None:
    """Which is why none is ever written."""
    writer = gguf.GGUFWriter(tmp_path / "zero.gguf", "controlvector")
    for layer in range(3):
        writer.add_tensor(f"direction.{layer}", np.ones(576, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run_program("llama_cpp", {"control": str(tmp_path / "zero.gguf")})["n_embd"] == -1


@pytest.mark.slow
def test_it_shifts_the_next_token_as_our_steering_does(
    vectors: PersonaVectors,
    loaded: tuple[Any, Any],
    asked: list[list[int]],
    whole: Path,
    quantised: Path,
    tmp_path: Path,
) -> None:
    ours, plain = shifts(loaded, asked, vectors, (LAYER,))
    neighbours = {layer: shifts(loaded, asked, vectors, (layer,))[0] for layer in (LAYER - 1, LAYER + 1)}
    [file], _ = export_vectors(vectors, "gguf", tmp_path / "one.gguf", Chosen((LAYER,)))
    task = {"control": str(file), "scale": COEFFICIENT}
    theirs = c.theirs(tmp_path, whole, asked, **task) - c.theirs(tmp_path, whole, asked)
    same = c.compare_shifts(ours, theirs, plain)
    assert same.everywhere > 0.999
    assert same.lowest > 0.99
    assert same.slope == pytest.approx(1, abs=0.02)
    for other in neighbours.values():
        assert c.compare_shifts(other, theirs, plain).everywhere < 0.9, "the vector stands at its own layer"
    rounded = c.theirs(tmp_path, quantised, asked, **task) - c.theirs(tmp_path, quantised, asked)
    assert c.compare_shifts(ours, rounded, plain).everywhere > 0.95

"""A baked model in llama.cpp, converted by its own converter, beside the same steering by hooks here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens import wrap_model
from persona_lens.steering import Steering
from persona_lens.steering.baking import bake
from persona_lens.steering.baking.gguf import Converter
from persona_lens.vectors import PersonaVectors
from tests.programs import comparing as c
from tests.programs.environment import environment

pytestmark = pytest.mark.real

WRITTEN = "optimistic@12:+3, impolite@20:-2, impolite@0:+0.5"


@pytest.mark.slow
def test_llama_cpp_runs_what_was_baked(loaded: tuple[Any, Any], whole: Path, tmp_path: Path) -> None:
    """Layer 0 too, which control vectors cannot reach there."""
    backend, generator = wrap_model(*loaded), torch.Generator().manual_seed(0)
    info = backend.info
    vectors = []
    for name in ("optimistic", "impolite"):
        rows = torch.randn(info.n_layers, info.d_model, generator=generator)
        vectors.append(PersonaVectors(name, info, {"response_mean": 8 * rows / rows.norm(dim=-1, keepdim=True)}))
    found = Converter.find(environment() / "converter")
    baked = bake("smollm2-135m", WRITTEN, tmp_path / "baked", vectors=vectors, gguf=found, device="cpu")
    asked = c.prompts(backend, 8)
    plain = c.ours(*loaded, asked)
    ours = c.ours(*loaded, asked, Steering.parse(WRITTEN, vectors).edits()) - plain
    steered = c.theirs(tmp_path, baked.folder / "model.gguf", asked)
    theirs = steered - c.theirs(tmp_path, whole, asked)
    same = c.compare_shifts(ours, theirs, plain)
    assert same.everywhere > 0.999
    assert same.lowest > 0.99
    assert same.slope == pytest.approx(1, abs=0.02)
    fewer = c.ours(*loaded, asked, Steering.parse(WRITTEN.rpartition(",")[0], vectors).edits()) - plain
    assert c.compare_shifts(fewer, theirs, plain).everywhere < 0.999, "all of it is in the file"

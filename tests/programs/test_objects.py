"""Our files in steering-vectors and repeng, and theirs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persona_lens import wrap_model
from persona_lens.models import resolve
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.formats import Chosen, Stated, export_vectors, import_vectors
from tests.programs import comparing as c
from tests.programs.environment import run_program

pytestmark = pytest.mark.real

LAYER, COEFFICIENT = 14, 2.0


def test_both_steer_as_we_do_and_give_the_vector_back(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    backend = wrap_model(*loaded)
    rows = torch.randn(30, 576, generator=torch.Generator().manual_seed(1)) / 3
    vectors = PersonaVectors("random", backend.info, {"response_mean": rows})
    chosen = Chosen((LAYER,))
    [steering], _ = export_vectors(vectors, "steering-vectors", tmp_path / "steering.pt", chosen)
    [control], _ = export_vectors(vectors, "gguf", tmp_path / "control.gguf", chosen)
    [ids] = c.prompts(backend, 1)
    answer = run_program(
        "objects",
        {
            "steering_vector": str(steering),
            "control": str(control),
            "model": resolve("smollm2-135m").location,
            "rope_theta": loaded[0].config.rope_parameters["rope_theta"],
            "layer": LAYER,
            "scale": COEFFICIENT,
            "ids": ids,
            "out": str(tmp_path),
        },
    )
    assert answer == {"layers": {"steering_vectors": [LAYER], "repeng": [LAYER]}, "model_type": "llama"}
    with np.load(tmp_path / "logprobs.npz", allow_pickle=False) as found:
        plain = c.ours(*loaded, [ids])[0]
        steered = c.ours(*loaded, [ids], [vectors.edit(LAYER, COEFFICIENT)])[0]
        assert np.abs(steered - plain).max() > 0.5
        for program in ("steering_vectors", "repeng"):
            np.testing.assert_allclose(found[program], steered, atol=2e-4, err_msg=program)
        np.testing.assert_allclose(found["plain"], plain, atol=2e-4)
    for name in ("pickled.pt", "repeng.gguf"):
        back = import_vectors(tmp_path / name, Stated(backend.info, "random")).vectors
        torch.testing.assert_close(back.vector(LAYER), rows[LAYER], rtol=0, atol=0)
        assert len(back.missing_layers) == 29

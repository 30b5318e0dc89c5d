"""``vectors lens`` and ``vectors attribute`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import backend_of
from tests.shell import Shell
from tests.tiny import D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

TINY = ("--dtype", "float32", "--device", "cpu")


SHELL = Shell()
run, refused = SHELL.ok, SHELL.refused


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model's folder, and vectors of it."""
    folder = tmp_path_factory.mktemp("made")
    module = tiny_model()
    module.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(0))
    provenance = {"trait": load_trait("optimistic").model_dump(mode="json")}
    info = backend_of("transformers", module).info
    PersonaVectors("optimistic", info, {"response_mean": rows}, provenance).save(folder / "vectors.safetensors")
    return str(folder / "model"), str(folder / "vectors.safetensors")


def test_the_lens_shows_tokens_layer_by_layer(made: tuple[str, str]) -> None:
    command = ("vectors", "lens", *made, "--layers", "0-1", "--top", "3", *TINY)
    found = json.loads(run(*command, "--json"))
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    assert all(len(layer[side]) == 3 for layer in found["layers"] for side in ("promoted", "suppressed"))
    shown = run(*command)
    assert "What the response_mean vectors of optimistic do to logits" in shown
    assert f"{found['layers'][1]['promoted'][0]['shift']:+.2f}" in shown


def test_an_attribution_adds_up(made: tuple[str, str]) -> None:
    command = ("vectors", "attribute", *made, "--layer", "1", "--prompt", "Will it rain?", "--heads", *TINY)
    found = json.loads(run(*command, "--json"))
    total = sum(part["values"][-1] for part in found["parts"])
    assert total == pytest.approx(found["projection"][-1], rel=1e-4)
    shown = run(*command)
    assert f"after layer 1: {found['projection'][-1]:+.3f}" in shown
    assert "all 5 parts sum to it" in shown
    longer = json.loads(run(*command, "--response", " Yes", "--json"))
    assert len(longer["ids"]) == len(found["ids"]) + 4


def test_what_cannot_be_done_is_one_sentence(made: tuple[str, str], tmp_path: Path) -> None:
    remote = refused("vectors", "lens", *made, "--remote", "--backend", "nnsight")
    assert "the weights of a model on a server cannot be read, so there is no lens" in remote
    prompt = ("--prompt", "x", *TINY)
    assert "no attribution" in refused("vectors", "attribute", *made, "--layer", "1", "--remote", *prompt)
    assert "no layer was tuned" in refused("vectors", "attribute", *made, *prompt)
    assert "layer 9 does not exist" in refused("vectors", "attribute", *made, "--layer", "9", *prompt)
    assert "SAELens" in refused("dissect", *made, "--sae", str(_empty_sae(tmp_path)), *TINY)
    assert "there is no folder" in refused("dissect", *made, "--sae", "nowhere", *TINY)


def _empty_sae(folder: Path) -> Path:
    for name in ("cfg.json", "sae_weights.safetensors"):
        (folder / name).write_bytes(b"")
    return folder

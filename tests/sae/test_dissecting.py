"""SAELens trains an autoencoder on what a backend reads, and the command line dissects a vector with it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.train_sae import quality, train
from persona_lens import load_vectors
from persona_lens.analysis.dissection.features import load_features
from persona_lens.core.errors import PersonaLensError
from tests.shell import Shell
from tests.tiny import saved_model

SHORT = ("--dtype", "float32", "--device", "cpu", "--max-new-tokens", "8")


SHELL = Shell()
invoke, run = SHELL.run, SHELL.done


def test_what_saelens_trains_explains_what_it_was_trained_on(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=1)
    data = torch.relu(torch.randn(20000, 40, generator=generator) - 1.5) * 10 @ truth + 5
    options = argparse.Namespace(seed=0, features=64, k=4, steps=300, batch=256, lr=3e-3)
    sae = train(data, "tiny", "blocks.1.hook_resid_post", options)
    found = quality(sae, data[:2000])
    assert found["explained_variance"] > 0.5
    assert found["active_per_token"] <= 4
    sae.save_inference_model(tmp_path)
    features = load_features(tmp_path)
    assert features.encode is not None
    with torch.no_grad():
        torch.testing.assert_close(features.encode(data[:5]), sae.encode(data[:5]), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A model's folder, a run folder of vectors, and an autoencoder one of whose features is the vector."""
    from tests.sae.conftest import saved

    folder = tmp_path_factory.mktemp("made")
    saved_model(folder / "model")
    model, out = str(folder / "model"), str(folder / "run")
    run("extract", model, "optimistic", "--out", out, "--questions", "4", "--unpaired", *SHORT)
    sae = saved("TopK", folder / "sae", model_name="model")
    with torch.no_grad():
        sae.W_dec[9] = load_vectors(out)[1]
    sae.save_model(folder / "sae")
    return model, out, str(folder / "sae")


def command(made: tuple[str, str, str], *more: str) -> tuple[str, ...]:
    few = ("--show", "4", "--pursuit", "8", "--steered", "2", "--random-features", "2", "--questions", "2")
    return ("dissect", *made[:2], "--sae", made[2], *few, "--coefficient", "2", *SHORT, *more)


def test_the_command_line_dissects_and_goes_on_where_it_was(made: tuple[str, str, str], tmp_path: Path) -> None:
    out = tmp_path / "dissection"
    corpus = Path(made[1]) / "rollouts.jsonl"
    full = command(made, "--corpus", str(corpus), "--max-texts", "6", "--out", str(out), "--json")
    summary: dict[str, Any] = json.loads(run(*full).stdout)
    assert summary["ranking"]["top"][0]["feature"] == 9
    assert summary["ranking"]["top"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert set(summary["steering"]["effects"]) >= {"vector", "feature_9"}
    assert summary["corpus"]["texts"] == 6
    assert "<!DOCTYPE html>" in (out / "report.html").read_text()
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}
    assert json.loads(run(*full).stdout) == summary
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == files


def test_it_shows_tables_and_what_a_dry_run_would_ask(made: tuple[str, str, str], tmp_path: Path) -> None:
    shown = run(*command(made, "--out", str(tmp_path / "run"))).stdout
    assert "Features most like the vector of optimistic at layer 1" in " ".join(shown.split())
    assert "each steered alone at +2" in " ".join(shown.split())
    planned = json.loads(run(*command(made, "--out", str(tmp_path / "dry"), "--dry-run", "--json")).stdout)
    assert planned["work"][0]["rows"] == 2 * (1 + 1 + 2 + 2)
    assert not (tmp_path / "dry").exists()


def test_an_autoencoder_of_another_model_needs_to_be_allowed(made: tuple[str, str, str], tmp_path: Path) -> None:
    from tests.sae.conftest import saved

    saved("TopK", tmp_path / "other", model_name="gpt2")
    swapped = (made[0], made[1], str(tmp_path / "other"))
    result = invoke(*command(swapped, "--out", str(tmp_path / "run")))
    assert isinstance(result.exception, PersonaLensError)
    assert "trained on gpt2" in str(result.exception)
    run(*command(swapped, "--out", str(tmp_path / "run"), "--allow-other-model"))

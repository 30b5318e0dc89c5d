"""The commands: `vectors export`, `import`, `push`, `pull`, `layers`, `pca`, `agree` and `halves`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.vectors import PersonaVectors, load_vectors
from tests.shell import Shell
from tests.tiny import saved_model
from tests.vectors.formats.files import INFO, vectors

SHELL = Shell("vectors", columns=80)
run, refused = SHELL.run, SHELL.refused


def told(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return vectors().save(tmp_path / "grumpy.safetensors")


def test_export_and_import(file: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "v.gguf", tmp_path / "back.safetensors"
    made = told("export", file, "--to", "gguf", "--layers", "1-2", "--out", out)
    assert made["files"] == [str(out)]
    found = told("import", out, "--out", back)
    assert (found["file"], found["layers"]) == (str(back), [1, 2])
    assert torch.equal(load_vectors(back)[2], vectors()[2])
    assert "exists and holds something else" in refused("export", file, "--to", "gguf", "--layer", "3", "--out", out)
    assert "leave --layers out" in refused("export", file, "--to", "npz", "--layer", "3")
    assert "no format 'x'" in refused("export", file, "--to", "x")
    result = run("export", file, "--to", "reference", "--out", tmp_path / "folder")
    assert "note: row 0" in result.stderr
    assert len(result.stdout.split()) == 3


def test_import_names_the_model_by_other_vectors(file: Path, tmp_path: Path) -> None:
    told("export", file, "--to", "npy", "--out", tmp_path / "v.npy")
    taken = ("import", tmp_path / "v.npy", "--out", tmp_path / "back.safetensors")
    assert "--model" in refused(*taken)
    assert "--trait" in refused(*taken, "--like", file)
    assert "give one of them" in refused(*taken, "--like", file, "--model", "x")
    told(*taken, "--like", file, "--trait", "cross", "--reduction", "prompt_mean")
    found = load_vectors(tmp_path / "back.safetensors")
    assert (found.trait, list(found.directions), found.model) == ("cross", ["prompt_mean"], INFO)
    shown = run("show", tmp_path / "back.safetensors").output
    assert "imported; not known: how the vectors were made" in " ".join(shown.split())
    assert "exists and holds something else" in refused(*taken, "--like", file, "--trait", "other")
    assert "does not exist" in refused("import", tmp_path / "no.npy", "--out", tmp_path / "x.safetensors")


def test_import_opens_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    saved_model(folder)
    torch.save(torch.arange(4.0)[:, None] * torch.ones(32), tmp_path / "kind_response_avg_diff.pt")
    out = tmp_path / "kind.safetensors"
    told("import", tmp_path / "kind_response_avg_diff.pt", "--model", folder, "--out", out, "--dtype", "float32")
    found = load_vectors(out)
    assert (found.model.n_layers, found.model.d_model, found.missing_layers) == (3, 32, (2,))
    assert found.model.weights is not None
    assert found.rows()[:, 0].tolist() == [1, 2, 0]


def test_push_and_pull(file: Path, tmp_path: Path) -> None:
    repo, out = f"{tmp_path}/repo", tmp_path / "pulled.safetensors"
    assert run("push", file, repo, "--licence", "mit").output.strip() == repo
    assert run("pull", repo, "--out", out).exit_code == 0
    assert out.read_bytes() == file.read_bytes()
    assert "neither a folder nor a hub id" in refused("push", file, "nowhere", "--licence", "mit")
    assert run("push", file, repo).exit_code == 2, "a licence has to be named"


def test_geometry(file: Path, tmp_path: Path) -> None:
    others = [
        PersonaVectors(name, INFO, {"response_mean": vectors().random_like(seed).rows()}).save(tmp_path / name)
        for seed, name in enumerate(("kind", "calm"))
    ]
    matrix = told("layers", file, "--layers", "0,2")
    assert matrix["layers"] == [0, 2]
    assert matrix["cosines"][0][0] == pytest.approx(1)
    assert matrix["cosines"][0][1] == matrix["cosines"][1][0]
    assert "+1.000" in run("layers", file).output
    found = told("pca", file, *others, "--layer", "1")
    assert found["traits"] == ["grumpy", "kind", "calm"]
    assert len(found["coordinates"]) == 3
    assert sum(found["explained"]) == pytest.approx(1, abs=1e-5)
    assert "share of the variance" in run("pca", file, *others, "--layer", "1", "--raw", "--uncentred").output
    assert "--components must be at least 1" in refused("pca", file, *others, "--layer", "1", "--components", "0")
    same = told("agree", file, file, "--layers", "1,3")
    assert same["layers"] == [1, 3]
    assert same["cosines"] == pytest.approx([1, 1])
    other = PersonaVectors("grumpy", INFO.__class__(**{**INFO.__dict__, "weights": "sha256:z"}), vectors().directions)
    other.save(tmp_path / "other")
    assert "--allow-other-model" in refused("agree", file, tmp_path / "other")
    result = run("agree", file, tmp_path / "other", "--allow-other-model")
    assert "note: different models: weights" in result.stderr
    assert "+1.000" in result.output
    assert "is missing" in refused("halves", _folder(tmp_path, file))


def _folder(tmp_path: Path, file: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "vectors.safetensors").write_bytes(file.read_bytes())
    return folder

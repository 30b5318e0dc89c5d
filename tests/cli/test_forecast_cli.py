"""`vectors forecast`, and where else its figures stand: `vectors show`, the summary and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.reports.result import Result
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from persona_lens.vectors import load_vectors
from tests.backends.fixtures import tiny_backend
from tests.planted import PlantedBackend
from tests.shell import Shell
from tests.tiny import N_LAYERS, saved_model

TRAIT = load_trait("optimistic")
UNKNOWN = ("access", "rise")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three: whose model is out of reach, whose model is here, and as it was before there were diagnostics."""
    folder = tmp_path_factory.mktemp("runs")
    settings = ExtractionSettings(questions=4, paired=False, rollouts=RolloutSettings(max_new_tokens=16, batch_size=8))
    extract(PlantedBackend(TRAIT, noise=3.0), TRAIT, folder / "far", settings=settings)
    extract(tiny_backend("transformers"), TRAIT, folder / "here", settings=settings)
    found = extract(PlantedBackend(TRAIT, noise=3.0), TRAIT, folder / "before", settings=settings).vectors
    known = {name: value for name, value in found.provenance.items() if name != "diagnostics"}
    (folder / "before" / "vectors.safetensors").write_bytes(replace(found, provenance=known).to_bytes())
    return folder


SHELL = Shell("vectors")
ok, refused = SHELL.ok, SHELL.refused


def test_a_row_a_layer(runs: Path) -> None:
    shown = ok("forecast", runs / "here")
    assert "What may foretell steering along optimistic" in shown
    found: Any = load_vectors(runs / "here").diagnostics
    for row in found.layers:
        (line,) = (line for line in shown.splitlines() if line.startswith(f"│ {row.layer} "))
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        by_chance = row.accessibility <= row.accessibility_null
        assert cells[-1] == (f"({row.accessibility:.2f})" if by_chance else f"{row.accessibility:.2f}")


def test_json_has_every_figure(runs: Path) -> None:
    said = json.loads(ok("forecast", runs / "far", "--layers", "1-2", "--json"))
    found: Any = load_vectors(runs / "far").diagnostics
    assert [row["layer"] for row in said["layers"]] == [1, 2]
    assert said["layers"][0] == found.layers[1].to_json()


def test_what_is_not_known_has_no_column(runs: Path) -> None:
    shown = ok("forecast", runs / "far")
    assert "relative length" in shown
    assert not any(name in shown for name in UNKNOWN)
    assert "relative length" not in ok("forecast", runs / "before")


def test_with_a_model_what_it_reads_is_measured(runs: Path, tmp_path: Path) -> None:
    saved_model(tmp_path / "tiny")
    said = json.loads(ok("forecast", runs / "here", "--model", tmp_path / "tiny", "--dtype", "float32", "--json"))
    found: Any = load_vectors(runs / "here").diagnostics
    for row, known in zip(said["layers"], found.layers, strict=True):
        assert row["accessibility"] == pytest.approx(known.accessibility, rel=1e-2)
    assert "belong to another model" in refused("forecast", runs / "far", "--model", tmp_path / "tiny")


def test_bad_input_is_one_sentence(runs: Path, tmp_path: Path) -> None:
    assert "no reduction 'mean'" in refused("forecast", runs / "here", "--reduction", "mean")
    assert "layer 7 does not exist" in refused("forecast", runs / "here", "--layers", "7")
    assert "does not exist" in refused("forecast", tmp_path / "nothing")
    alone = load_vectors(runs / "before").save(tmp_path / "alone.safetensors")
    assert "give the run folder of a finished extraction" in refused("forecast", alone)


def test_show_tells_them_where_vectors_carry_them(runs: Path) -> None:
    assert "What may foretell steering along optimistic" in ok("show", runs / "here")
    assert "What may foretell steering" not in ok("show", runs / "before")
    said = json.loads(ok("show", runs / "here", "--json"))
    assert len(said["diagnostics"]["layers"]) == N_LAYERS
    assert json.loads(ok("show", runs / "before", "--json"))["diagnostics"] is None


def test_the_report_draws_and_lists_them(runs: Path, tmp_path: Path) -> None:
    found = Result.load(runs / "here")
    assert "diagnostics" in found.figures
    page = found.report()
    assert 'id="figure-diagnostics"' in page
    assert "What may foretell steering, by layer" in page
    assert "{&#39;layer&#39;: 0, &#39;consistency&#39;" not in page
    for name in ("diagnostics", "separation"):
        assert found.plot(figure=name).axes
    file = runs / "before" / "summary.json"
    summary = json.loads(file.read_text())
    del summary["diagnostics"]
    file.write_text(json.dumps(summary))
    before = Result.load(runs / "before")
    assert "diagnostics" not in before.figures
    assert "What may foretell steering" not in before.report()

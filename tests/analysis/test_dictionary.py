"""Dictionaries: where they sit, what they fit, their links; and SAELens where it cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.dissection import features
from persona_lens.analysis.dissection.features import layer_of_hook, load_features
from persona_lens.core.plugins import install_command
from persona_lens.vectors import PersonaVectors
from tests.analysis.dictionaries import LAYER, dictionary, directions
from tests.backends.fixtures import tiny_backend
from tests.tiny import D_MODEL, N_LAYERS


def vectors() -> PersonaVectors:
    info = tiny_backend("transformers").info
    return PersonaVectors("planted", info, {"response_mean": torch.ones(N_LAYERS, D_MODEL)})


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.19.hook_resid_post", 19),
        ("blocks.20.hook_resid_pre", 19),
        ("blocks.7.hook_out", 7),
        ("blocks.8.hook_in", 7),
        ("model.layers.19", 19),
        ("transformer.h.3.output", 3),
        ("layers.0", 0),
    ],
)
def test_a_place_in_the_stream_is_the_layer_after_whose_block_it_stands(hook: str, layer: int) -> None:
    assert layer_of_hook(hook) == layer


@pytest.mark.parametrize(
    "hook",
    ["blocks.3.hook_mlp_out", "blocks.3.attn.hook_z", "blocks.0.hook_resid_pre", "hook_embed", "", "model.layers.x"],
)
def test_other_places_are_refused(hook: str) -> None:
    with pytest.raises(AnalysisError, match="not the residual stream after a block"):
        layer_of_hook(hook)


def test_a_dictionary_must_fit_the_vectors_in_width_layer_and_model() -> None:
    own = vectors()
    name = own.model.model
    dictionary().check(own)
    dictionary(model=f"somebody/{name.upper()}").check(own)
    with pytest.raises(AnalysisError, match=f"directions of width 16, but the residual stream of {name} has {D_MODEL}"):
        dictionary(directions(5, 16)).check(own)
    with pytest.raises(AnalysisError, match=r"which is layer 9; .* has layers 0 to 2"):
        dictionary(layer=9, hook="blocks.9.hook_resid_post").check(own)
    other = dictionary(model="gpt2")
    with pytest.raises(AnalysisError, match=r"trained on gpt2, .*\(--allow-other-model\)"):
        other.check(own)
    other.check(own, allow_other_model=True)


def test_unit_directions_rows_and_their_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_lens.analysis.dissection.features.CHUNK_VALUES", 4 * D_MODEL)
    rows = directions(20)
    rows[5] = 0
    features = dictionary(rows)
    assert features.unit(3).norm() == pytest.approx(1)
    wanted = torch.tensor([17, 2, 9])
    torch.testing.assert_close(features.rows(wanted), rows[wanted])
    with pytest.raises(AnalysisError, match="feature 20 does not exist: stand-in has features 0 to 19"):
        features.unit(20)
    with pytest.raises(AnalysisError, match="direction of feature 5 of stand-in is zero"):
        features.unit(5)


def test_links_lead_to_the_dashboard_and_nowhere_else() -> None:
    assert dictionary(dashboard="gemma-2-2b/20-gemmascope-res-16k").link(7) == (
        "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/7"
    )
    assert dictionary().link(7) is None
    for hostile in ('a/b"onclick=', "a/b/../../c", "//elsewhere.com/x", "a", "a/b?c", "javascript:x/y"):
        assert dictionary(dashboard=hostile).link(7) is None


def test_a_description_tells_dictionaries_apart() -> None:
    first, second = dictionary(), dictionary(directions(seed=1))
    assert first.describe() == dictionary().describe()
    assert first.describe()["directions"] != second.describe()["directions"]
    assert first.describe()["layer"] == LAYER


def loading(monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str | None], where: str | Path) -> str:
    """What is said where these versions are installed."""
    monkeypatch.setattr(features, "installed_version", versions.__getitem__)
    features._library.cache_clear()
    with pytest.raises(AnalysisError) as caught:
        load_features(where)
    features._library.cache_clear()
    return str(caught.value)


def folder_of(tmp_path: Path) -> Path:
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_without_saelens_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    absent = {"sae-lens": None, "transformer-lens": "4.3.0"}
    for where in (folder, "gemma-scope-2b-pt-res/layer_20"):
        said = loading(monkeypatch, absent, where)
        assert said.endswith(f"is not installed: {install_command('sae')}")
    newer = {"sae-lens": "6.54.0", "transformer-lens": "4.3.0"}
    said = loading(monkeypatch, newer, folder)
    assert "needs a TransformerLens below 4, and 4.3.0 is installed" in said
    assert said.endswith(f": {install_command('sae')}")


def test_a_place_without_an_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match=r"holds no cfg.json; give a folder that SAELens saved"):
        load_features(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(AnalysisError, match=r"holds no sae_weights.safetensors"):
        load_features(tmp_path)
    for missing in ("nothing", "./nothing/here", "/nothing/here"):
        with pytest.raises(AnalysisError, match="there is no folder"):
            load_features(missing)

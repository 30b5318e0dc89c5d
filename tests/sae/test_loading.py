"""Autoencoders of SAELens as dictionaries: every kind, and what is wrong with a folder said in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.dissection.features import FileDecoder, load_features
from tests.sae.conftest import FEATURES, saved
from tests.tiny import D_MODEL


@pytest.mark.parametrize("kind", ["Standard", "TopK", "JumpReLU", "Gated"])
def test_a_folder_gives_saelens_own_directions_and_activations(kind: str, tmp_path: Path) -> None:
    sae = saved(kind, tmp_path / "sae", model_name="tiny", neuronpedia_id="tiny/1-res")
    found = load_features(tmp_path / "sae")
    assert (found.name, found.hook, found.layer, found.model) == ("sae", "blocks.1.hook_resid_post", 1, "tiny")
    assert isinstance(found.decoder, FileDecoder)
    torch.testing.assert_close(found.decoder.rows(0, FEATURES), sae.W_dec.detach())
    h = torch.randn(9, D_MODEL)
    assert found.encode is not None
    with torch.no_grad():
        torch.testing.assert_close(found.encode(h), sae.encode(h))
    assert found.link(3) == "https://www.neuronpedia.org/tiny/1-res/3"


def test_the_encoder_is_loaded_only_once_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sae_lens

    saved("TopK", tmp_path)
    loads: list[Any] = []
    own = sae_lens.SAE.load_from_disk

    def load_from_disk(*given: Any, **more: Any) -> Any:
        loads.append(given)
        return own(*given, **more)

    monkeypatch.setattr(sae_lens.SAE, "load_from_disk", load_from_disk)
    found = load_features(tmp_path)
    found.decoder.rows(0, 5)
    assert loads == []
    assert found.encode is not None
    for _ in range(2):
        found.encode(torch.randn(2, D_MODEL))
    assert len(loads) == 1


def test_a_release_is_downloaded_through_saelens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sae_lens

    sae = saved("TopK", tmp_path, hook="blocks.19.hook_resid_post", model_name="Qwen/Qwen2.5-7B-Instruct")
    asked: list[tuple[str, str]] = []

    def from_pretrained(release: str, sae_id: str, **_: Any) -> Any:
        asked.append((release, sae_id))
        return sae

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", from_pretrained)
    name = "qwen2.5-7b-instruct-andyrdt/resid_post_layer_19_trainer_1"
    found = load_features(name)
    assert (found.name, found.layer) == (name, 19)
    torch.testing.assert_close(found.decoder.rows(3, 7), sae.W_dec[3:7].detach())
    load_features("somebody/saes/layer_3/width_16k")
    load_features("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
    assert asked == [
        ("qwen2.5-7b-instruct-andyrdt", "resid_post_layer_19_trainer_1"),
        ("somebody/saes", "layer_3/width_16k"),
        ("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"),
    ]

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("no network\nand much more")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", fails)
    with pytest.raises(AnalysisError, match=f"SAELens cannot load {name}: OSError: no network$"):
        load_features(name)


def test_the_papers_own_autoencoder_is_where_the_paper_says() -> None:
    """Paper layer 20 is the stream after block 19 here, and in its release."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release = get_pretrained_saes_directory()["qwen2.5-7b-instruct-andyrdt"]
    assert release.model == "Qwen/Qwen2.5-7B-Instruct"
    assert "resid_post_layer_19_trainer_1" in release.saes_map


def test_a_name_that_is_not_there_brings_the_nearest() -> None:
    with pytest.raises(AnalysisError, match=r"has no 'resid_post_layer_19'; it has \d+, such as resid_post_layer_19"):
        load_features("qwen2.5-7b-instruct-andyrdt/resid_post_layer_19")
    with pytest.raises(AnalysisError, match=r"no release 'gemma-scope-2b-res'; did you mean .*gemma-scope-2b-pt-res"):
        load_features("gemma-scope-2b-res/x")


def change(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changed}))


def test_damaged_and_mismatched_folders_are_one_sentence(tmp_path: Path) -> None:
    saved("TopK", tmp_path)
    good = (tmp_path / "cfg.json").read_text()
    for content in ("{", "[]", "{}", json.dumps({**json.loads(good), "architecture": "other"}), "\0"):
        (tmp_path / "cfg.json").write_text(content)
        with pytest.raises(AnalysisError, match=r"SAELens cannot read .*cfg.json: "):
            load_features(tmp_path)
    (tmp_path / "cfg.json").write_text(good)
    change(tmp_path, d_sae=7)
    with pytest.raises(AnalysisError, match=r"has a decoder \[48, 32\], but cfg.json says \[7, 32\]"):
        load_features(tmp_path)
    (tmp_path / "cfg.json").write_text(good)
    weights = tmp_path / "sae_weights.safetensors"
    whole = weights.read_bytes()
    tensors = load(whole)
    weights.unlink()  # a file that is mapped into memory must not be cut
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AnalysisError, match="is damaged"):
        load_features(tmp_path)
    weights.unlink()
    weights.write_bytes(b"\x80\x04cposix\nsystem\n")  # a pickle
    with pytest.raises(AnalysisError, match="is not a safetensors file"):
        load_features(tmp_path)
    weights.unlink()
    save_file({name: tensor for name, tensor in tensors.items() if name != "W_enc"}, weights)
    found = load_features(tmp_path)
    assert found.encode is not None
    with pytest.raises(AnalysisError, match="SAELens cannot load"):
        found.encode(torch.randn(2, D_MODEL))


def test_what_sits_elsewhere_is_refused(tmp_path: Path) -> None:
    saved("TopK", tmp_path / "mlp", hook="blocks.1.hook_mlp_out")
    with pytest.raises(AnalysisError, match=r"'blocks.1.hook_mlp_out', which is not the residual stream"):
        load_features(tmp_path / "mlp")
    saved("TopK", tmp_path / "nowhere")
    change(tmp_path / "nowhere", metadata={"sae_lens_version": "6.54.0"})
    with pytest.raises(AnalysisError, match="does not say where in the model it sits"):
        load_features(tmp_path / "nowhere")


def test_a_transcoder_is_refused(tmp_path: Path) -> None:
    from sae_lens import Transcoder, TranscoderConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post", model_name="tiny")
    configuration = TranscoderConfig(
        d_in=D_MODEL, d_sae=FEATURES, d_out=D_MODEL, apply_b_dec_to_input=False, metadata=metadata
    )
    Transcoder(configuration).save_model(tmp_path)
    with pytest.raises(AnalysisError, match="is a transcoder, which writes elsewhere than it reads"):
        load_features(tmp_path)

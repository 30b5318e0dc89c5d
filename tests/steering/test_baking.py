"""Baked models: what they compute, loaded by plain transformers, beside the same steering by hooks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf as gguf_files
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from persona_lens import models
from persona_lens.backend import wrap_model
from persona_lens.core.errors import PersonaLensError
from persona_lens.models import resolve
from persona_lens.steering import Steering
from persona_lens.steering.baking import Baked, BakingError, architectures, bake, check, gguf, run, weights
from persona_lens.steering.baking.gguf import Converter
from persona_lens.vectors import PersonaVectors
from tests.cli.test_cli import ok, parsed, refused
from tests.tiny import D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

TEXT = torch.tensor([[1, 70, 71, 72, 90, 40, 41, 42, 60, 2, 1, 99, 100, 30]])
ADDED = "optimistic@all:increments(+1.5), evil@1:-2, optimistic@1:+0.5"
OWN: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": D_MODEL, "ffn_dim": 64, "max_position_embeddings": 512},
    "phi": {"intermediate_size": 64},
    "olmo2": {"intermediate_size": 64},
}
SAVED_AS = {
    "llama": "LlamaForCausalLM",
    "mistral": "LlamaForCausalLM",
    "qwen2": "LlamaForCausalLM",
    "qwen3": "HYV3ForCausalLM",
    "phi3": "LlamaForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3_text/window": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "opt": "OPTForCausalLM",
    "phi": "PhiForCausalLM",
}


BY_BLOCKS = ("gemma2", "gemma3_text", "gemma3_text/window", "olmo2")


def random_model(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny model whose biases and gains are no zeros and ones."""
    if name in OWN:
        sizes = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
        ids = {"vocab_size": len(tiny_tokenizer()), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
        loader: Any = AutoModelForCausalLM
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **sizes, **ids, **{**OWN[name], **changes})
        model: Any = loader.from_config(config, dtype=torch.float32).eval()
    else:
        model = tiny_model(name)
        if name == "mistral":
            model.config.sliding_window = None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif name in OWN:
                parameter.mul_(4)
    made: PreTrainedModel = model
    return made


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def vectors_of(model: PreTrainedModel) -> list[PersonaVectors]:
    info, generator = wrap_model(model, tiny_tokenizer()).info, torch.Generator().manual_seed(5)
    rows = (torch.randn(N_LAYERS, D_MODEL, generator=generator) for _ in range(2))
    return [
        PersonaVectors(name, info, {"response_mean": each})
        for name, each in zip(("optimistic", "evil"), rows, strict=True)
    ]


@cache
def llama() -> PreTrainedModel:
    return random_model("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(llama(), tmp_path_factory.mktemp("model") / "llama")


def plainly(folder: Path) -> Any:
    """The model in a folder, as anybody loads it."""
    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(folder, use_safetensors=True).eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TEXT.to(model.device), use_cache=False).logits[0].float()
    return found


def apart(mine: Tensor, theirs: Tensor) -> float:
    return float(((mine - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max())


def greedy(model: Any) -> list[int]:
    return list(model.generate(TEXT, do_sample=False, max_new_tokens=12)[0, TEXT.shape[1] :])


# Additions


@pytest.mark.parametrize("name", SAVED_AS)
def test_additions_are_the_same_function_loaded_by_plain_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    vectors = vectors_of(model)
    baked = bake(saved(model, tmp_path / "model"), ADDED, tmp_path / "baked", vectors=vectors, device="cpu")
    found = plainly(baked.folder)
    assert type(found).__name__ == SAVED_AS[name] == baked.record["saved_as"]
    more = found.config.num_hidden_layers - N_LAYERS
    assert more == (N_LAYERS if name in BY_BLOCKS else 0)
    assert bool(baked.record["note"]) == (type(model).__name__ != SAVED_AS[name] or more > 0)
    edits = Steering.parse(ADDED, vectors).edits()
    plain = logits_of(model)
    with wrap_model(model, tiny_tokenizer()).editing(edits):
        steered, tokens = logits_of(model), greedy(model)
    assert apart(steered, plain) > 0.1
    assert apart(logits_of(found), steered) < 1e-4
    assert greedy(found) == tokens


def test_the_folder_has_the_tokenizer_its_chat_template_a_record_and_a_card(folder: str, tmp_path: Path) -> None:
    vectors = vectors_of(llama())
    baked = bake(folder, "optimistic@1:+2", tmp_path / "baked", vectors=vectors, check=True, device="cpu")
    assert baked.check is not None
    assert baked.check.passed
    assert baked.check.same == baked.check.prompts == check.PROMPTS
    assert baked.check.difference < 1e-5 < 0.01 < baked.check.shift
    tokenizer = AutoTokenizer.from_pretrained(baked.folder)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    record = json.loads((baked.folder / "persona-lens.json").read_text())
    assert record == baked.record
    assert record["steering"]["vectors"] == {"optimistic": vectors[0].content_hash}
    assert record["model"]["weights"] == vectors[0].model.weights
    assert record["model"]["revision"] == resolve(folder).identity
    [bias] = record["biases"]
    assert bias["length"] == pytest.approx(2 * float(vectors[0].vector(1).norm()), rel=1e-6)
    card = (baked.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for said in ("optimistic@1:+2", vectors[0].content_hash, f"| 1 | {bias['length']:.3g} |", "passed"):
        assert said in card
    assert len({each.stat().st_mode for each in baked.folder.iterdir()}) == 1, "who can read one can read all"
    assert not list(baked.folder.glob("*.part"))
    assert not (tmp_path / "baked.part").exists()


def test_tied_embeddings_stay_tied_under_additions(tmp_path: Path) -> None:
    model = random_model("gpt2")
    baked = bake(saved(model, tmp_path / "model"), "evil@0:+1", tmp_path / "b", vectors=vectors_of(model), device="cpu")
    found = plainly(baked.folder)
    assert found.lm_head.weight is found.transformer.wte.weight


def test_a_head_of_its_own_stays_one_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = random_model("llama")
    source = saved(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    loaded = plainly(tmp_path / "model")
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight, "transformers goes by the weights too"
    asked: dict[str, Any] = {"vectors": vectors_of(loaded), "check": True, "device": "cpu"}
    baked = bake(source, "evil@1:+2", tmp_path / "baked", **asked)
    assert baked.check is not None
    assert baked.check.passed
    torch.testing.assert_close(plainly(baked.folder).lm_head.weight, loaded.lm_head.weight)


def test_settings_of_generation_stay_as_they_are(tmp_path: Path) -> None:
    """Transformers reads some that it refuses to write, and published models have them."""
    model = random_model("llama")
    source = saved(model, tmp_path / "model")
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    baked = bake(source, "evil@1:+2", tmp_path / "baked", vectors=vectors_of(model), check=True, device="cpu")
    found = json.loads((baked.folder / "generation_config.json").read_text())
    assert {name: found.get(name, False) for name in settings} == settings
    assert plainly(baked.folder).generation_config.eos_token_id == [2, 5]


def test_a_class_whose_biases_are_switched_off_has_them_switched_on(tmp_path: Path) -> None:
    model = random_model("opt", enable_bias=False)
    source, asked = saved(model, tmp_path / "m"), {"vectors": vectors_of(model), "check": True, "device": "cpu"}
    found = bake(source, ADDED, tmp_path / "baked", **asked).check  # type: ignore[arg-type]
    assert found is not None
    assert found.passed


def test_a_model_without_a_chat_template_is_checked_on_plain_questions(tmp_path: Path) -> None:
    model, tokenizer = random_model("gpt2"), tiny_tokenizer()
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    vectors = vectors_of(model)
    found = bake(str(tmp_path / "m"), "evil@1:+2", tmp_path / "baked", vectors=vectors, check=True, device="cpu").check
    assert found is not None
    assert found.passed
    assert found.prompts == check.PROMPTS


def test_a_model_without_room_for_the_check_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("opt", max_position_embeddings=40)
    monkeypatch.setattr(run, "write", lambda *_: pytest.fail("written"))
    with pytest.raises(BakingError, match=r"takes 40 tokens, too few .* bake without --check"):
        bake(saved(model, tmp_path / "m"), ADDED, tmp_path / "b", vectors=vectors_of(model), check=True, device="cpu")


def test_a_block_that_only_adds_stands_behind_its_layer_and_looks_back_as_little_as_it_can(tmp_path: Path) -> None:
    model = random_model("gemma3_text/window")
    vectors = vectors_of(model)
    baked = bake(
        saved(model, tmp_path / "model"), "evil@1:+2", tmp_path / "b", vectors=vectors, check=True, device="cpu"
    )
    found = plainly(baked.folder)
    assert found.config.layer_types == ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    with torch.no_grad():
        states = found(TEXT, output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        states[3] - states[2], 2 * vectors[1].vector(1).expand_as(states[2]), atol=1e-4, rtol=1e-4
    )
    assert baked.check is not None
    assert baked.check.passed
    assert baked.record["biases"][0]["name"] == "model.layers.2.post_feedforward_layernorm.weight"
    assert "More blocks than the Gemma3ForCausalLM" in (baked.folder / "README.md").read_text()


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_nothing_is_taken_out_everywhere_of_what_is_normed_on_the_way(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    with pytest.raises(BakingError, match="no projection keeps a direction out of it"):
        bake(saved(model, tmp_path / "m"), None, tmp_path / "b", vectors=vectors_of(model), everywhere=["evil@1"])


def test_a_block_that_squares_a_residual_is_not_for_float16(tmp_path: Path) -> None:
    """The check computes in float32, where nothing overflows that does so in use."""
    model: Any = random_model("olmo2")
    source = saved(model.half(), tmp_path / "m")
    asked: dict[str, Any] = {"vectors": vectors_of(model), "device": "cpu"}
    with pytest.raises(BakingError, match=r"squares of what .* are beyond float16; bake with --dtype float32"):
        bake(source, "evil@1:+2", tmp_path / "b", **asked)
    assert bake(source, "evil@1:+2", tmp_path / "b", dtype="float32", check=True, **asked).record["check"]["passed"]


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_a_block_that_only_adds_is_exact_whatever_the_length_of_residuals(scale: float, tmp_path: Path) -> None:
    """Its norm has an eps, beside which the square of a short residual would be little, and squares may be large."""
    model: Any = random_model("olmo2")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(scale)
        for block in model.model.layers:  # so that residuals stay as they are
            for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
                norm.weight.mul_(scale)
    vectors = [replace(each, directions={"response_mean": scale * each.rows()}) for each in vectors_of(model)]
    source = saved(model, tmp_path / "m")
    made = bake(source, ADDED, tmp_path / "b", vectors=vectors, check=True, device="cpu").check
    assert made is not None
    assert made.tells
    assert made.difference < 1e-5


def test_a_block_that_only_adds_needs_a_wide_mlp(tmp_path: Path) -> None:
    model = random_model("olmo2", intermediate_size=2 * D_MODEL - 1)
    with pytest.raises(BakingError, match="no room for a block that writes a constant"):
        bake(saved(model, tmp_path / "m"), "evil@1:+2", tmp_path / "b", vectors=vectors_of(model), device="cpu")


def test_other_norms_on_the_way_are_refused(tmp_path: Path) -> None:
    model: Any = random_model("llama")
    model.model.layers[0].post_feedforward_layernorm = torch.nn.Identity()
    with pytest.raises(BakingError, match="norms what its blocks write on the way"):
        architectures.architecture_of(model)


def test_a_class_that_reads_images_is_refused_as_such(tmp_path: Path) -> None:
    class Gemma3ForConditionalGeneration(type(random_model("gemma3_text"))):  # type: ignore[misc]
        """Its text is an ordinary Gemma 3's."""

    model: Any = random_model("gemma3_text")
    model.__class__ = Gemma3ForConditionalGeneration
    with pytest.raises(BakingError, match="models that read text alone, and a Gemma3ForConditionalGeneration reads"):
        architectures.architecture_of(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_precision_is_kept_and_what_it_costs_is_said(dtype: str, tmp_path: Path) -> None:
    model: Any = random_model("gpt_neox").to(getattr(torch, dtype))
    vectors = vectors_of(model)
    source = saved(model, tmp_path / "model")
    baked = bake(source, "optimistic@1:+2", tmp_path / "baked", vectors=vectors, check=True, device="cpu")
    assert str(plainly(baked.folder).dtype) == f"torch.{dtype}" == f"torch.{baked.record['dtype']}"
    [bias] = baked.record["biases"]
    [before, after] = (m.gpt_neox.layers[1].mlp.dense_4h_to_h.bias.double() for m in (model, plainly(baked.folder)))
    wanted = 2 * vectors[0].vector(1).double()
    lost = float((after - before - wanted).detach().norm() / wanted.norm())
    assert bias["rounding"] == pytest.approx(lost, rel=1e-6)
    assert lost > 1e-5
    assert baked.check is not None
    assert baked.check.passed
    asked: dict[str, Any] = {"vectors": vectors, "check": True, "device": "cpu"}
    faint = bake(source, "optimistic@1:+0.001", tmp_path / "faint", **asked).check
    assert faint is not None
    assert not faint.passed, "rounding the bias that it joins is more than what is added"
    whole = bake(source, "optimistic@1:+0.001", tmp_path / "whole", **asked, dtype="float32")
    assert whole.record["biases"][0]["rounding"] < 1e-4
    assert whole.record["check"]["passed"]


def test_a_check_says_what_rounding_the_model_itself_does(tmp_path: Path) -> None:
    """Of what the steering does in a precision that is not the stored one, that is no part."""
    model: Any = random_model("gpt_neox")
    vectors, source = vectors_of(model), saved(model, tmp_path / "model")
    asked: dict[str, Any] = {"vectors": vectors, "check": True, "device": "cpu"}
    baked = bake(source, "optimistic@1:+2", tmp_path / "half", **asked, dtype="bfloat16")
    assert baked.check is not None
    assert baked.check.passed
    rounded: Any = random_model("gpt_neox").bfloat16()
    prompts = check.prompts_of(vectors, wrap_model(model, tiny_tokenizer()))
    rough, whole = (check.observe(each, tiny_tokenizer(), prompts) for each in (rounded.float(), model))
    assert baked.check.cast == rough.apart(whole) > baked.check.difference
    assert "changes the unsteered model by" in " ".join((baked.folder / "README.md").read_text().split())
    same = bake(source, "optimistic@1:+2", tmp_path / "same", **asked).check
    assert same is not None
    assert same.cast is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_an_addition_beyond_the_precision_is_refused(name: str, tmp_path: Path) -> None:
    model: Any = random_model(name)
    source = saved(model.half(), tmp_path / "model")
    with pytest.raises(BakingError, match="beyond float16; bake with --dtype float32"):
        bake(source, "evil@0:+1000000", tmp_path / "baked", vectors=vectors_of(model), device="cpu")
    assert not (tmp_path / "baked").exists()


# Everywhere


@contextmanager
def nothing_writes(model: Any, direction: Tensor, writers: Callable[[Any], list[Any]]) -> Iterator[None]:
    unit = direction / direction.norm()
    removes = [
        module.register_forward_hook(lambda _, __, out: out - (out @ unit).unsqueeze(-1) * unit)
        for module in writers(model)
    ]
    yield
    for each in removes:
        each.remove()


def llama_writers(model: Any) -> list[Any]:
    inner = model.model
    return [inner.embed_tokens, *(part for b in inner.layers for part in (b.self_attn.o_proj, b.mlp.down_proj))]


def gpt2_writers(model: Any) -> list[Any]:
    inner = model.transformer
    return [inner.wte, inner.wpe, *(part for b in inner.h for part in (b.attn.c_proj, b.mlp.c_proj))]


def neox_writers(model: Any) -> list[Any]:
    inner = model.gpt_neox
    return [inner.embed_in, *(part for b in inner.layers for part in (b.attention.dense, b.mlp.dense_4h_to_h))]


WRITERS = {
    "llama": llama_writers,
    "mistral": llama_writers,
    "qwen2": llama_writers,
    "qwen3": llama_writers,
    "phi3": llama_writers,
    "gpt_neox": neox_writers,
    "gpt2": gpt2_writers,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_direction_is_written_by_nothing_any_more(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    vectors = vectors_of(model)
    source = saved(model, tmp_path / "model")
    baked = bake(source, None, tmp_path / "baked", vectors=vectors, everywhere=["evil@1"], check=True, device="cpu")
    found, direction = plainly(baked.folder), vectors[1].vector(1)
    assert type(found) is type(model)
    plain = logits_of(model)
    with nothing_writes(model, direction, WRITERS[name]):
        hooked, tokens = logits_of(model), greedy(model)
    assert apart(hooked, plain) > 0.01
    assert apart(logits_of(found), hooked) < 1e-4
    assert greedy(found) == tokens
    assert not found.config.tie_word_embeddings
    assert baked.record["left"] < 1e-5
    assert baked.check is not None
    assert baked.check.passed
    assert baked.check.edits is not None
    assert baked.check.edits > 1e-3, "edits between blocks are another function"
    assert baked.check.edits_with_sinks is not None
    assert baked.check.edits_with_sinks > 1e-3


def test_additions_lose_what_is_taken_out_everywhere_and_several_directions_go_together(
    folder: str, tmp_path: Path
) -> None:
    """The stream holds nothing of their span, whatever their angle, and in whatever order they are given."""
    vectors = vectors_of(llama())
    orders = (["evil@1", "optimistic@0"], ["optimistic@0", "evil@1"])
    models = [
        plainly(
            bake(folder, "optimistic@2:+3", tmp_path / str(n), vectors=vectors, everywhere=each, device="cpu").folder
        )
        for n, each in enumerate(orders)
    ]
    assert apart(logits_of(models[0]), logits_of(models[1])) < 1e-5
    with torch.no_grad():
        states = models[0](TEXT, output_hidden_states=True).hidden_states[:-1]
    span = torch.stack([vectors[1].vector(1), vectors[0].vector(0)])
    states = (*states, models[0].model.layers[2].mlp.down_proj.bias.detach()[None, None])
    for h in states:
        assert float((h[0] @ span.T).abs().max() / (h.norm() * span.norm())) < 1e-6


def test_an_addition_along_what_is_taken_out_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(BakingError, match="nothing would be left"):
        bake(folder, "evil@1:+1", tmp_path / "b", vectors=vectors_of(llama()), everywhere=["evil@1"], device="cpu")


# What is refused

REFUSED = {
    "evil@all:ablate": "the MLP reads what attention has just written; .* --everywhere evil@0",
    "evil@1:ablate(0.5)": "ablation between blocks is in no weights",
    "evil@1:cap(3)": "what cap does depends on the residual",
    "evil@1:floor(-1)": "what floor does depends on the residual",
    "evil@1:affine(0)": "what affine does depends on the residual",
    "evil@1:+30%": "per cent depends on the residual",
    "evil@1:+1 on response": "weights treat all tokens alike",
    "evil@1:+1 on prompt[-3:]": "weights treat all tokens alike",
    "evil@1:+1 if evil@0>3": "a condition depends on the residual",
    "evil@1:+1 schedule(0:1 20:0)": "do not know which tokens come first",
}


@pytest.mark.parametrize("written", REFUSED)
def test_what_no_weights_do_is_refused(written: str, tmp_path: Path) -> None:
    with pytest.raises(BakingError, match=REFUSED[written]):  # before any model is looked for
        bake("./nowhere", written, tmp_path / "baked", vectors=vectors_of(llama()))


@pytest.mark.parametrize("direction", ["evil@all", "evil@0-1", "evil@1 on prompt", "evil@1:ablate", "evil@"])
def test_a_direction_is_one_layers(direction: str, tmp_path: Path) -> None:
    with pytest.raises(BakingError, match="--everywhere takes one direction"):
        bake("./nowhere", None, tmp_path / "baked", vectors=vectors_of(llama()), everywhere=[direction])


def test_nothing_to_bake_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BakingError, match="nothing to bake"):
        bake("./nowhere", None, tmp_path / "baked")
    for zero in ("evil@1:+0", "evil@1:+2, evil@1:-2"):
        with pytest.raises(BakingError, match=r"evil@1:.* adds nothing that could be baked; give a steering such as"):
            bake("./nowhere", zero, tmp_path / "baked", vectors=vectors_of(llama()))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen2_moe", "and this is a Qwen2MoeForCausalLM"),
        ("mistral/window", "attention over a sliding window"),
    ],
)
def test_models_without_a_place_for_it_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    model = random_model(name)
    with pytest.raises(BakingError, match=reason):
        bake(saved(model, tmp_path / "m"), ADDED, tmp_path / "baked", vectors=vectors_of(model), device="cpu")
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("phi3", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("qwen2", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}),
    ],
)
def test_rotary_positions_that_llama_does_not_have_are_refused(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    with pytest.raises(BakingError, match="stretched or partial"):
        bake(saved(model, tmp_path / "m"), ADDED, tmp_path / "baked", vectors=vectors_of(model), device="cpu")


def test_a_norm_behind_the_sum_is_refused(tmp_path: Path) -> None:
    model = random_model("opt", do_layer_norm_before=False)
    with pytest.raises(BakingError, match="OPTForCausalLM norms"):
        bake(saved(model, tmp_path / "m"), ADDED, tmp_path / "baked", vectors=vectors_of(model), device="cpu")


def test_an_embedding_of_another_width_is_refused(tmp_path: Path) -> None:
    """Of what it writes only a projection reaches the stream."""
    model = random_model("opt", word_embed_proj_dim=16)
    vectors, source = vectors_of(model), saved(model, tmp_path / "m")
    with pytest.raises(BakingError, match="carried over to the residual stream by another projection"):
        bake(source, None, tmp_path / "baked", vectors=vectors, everywhere=["evil@1"], device="cpu")
    assert bake(source, ADDED, tmp_path / "baked", vectors=vectors, check=True, device="cpu").record["check"]["passed"]


def test_a_quantised_model_is_refused() -> None:
    model: Any = random_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(BakingError, match="is quantised; bake into the model"):
        architectures.architecture_of(model)


def test_code_of_the_models_own_is_refused() -> None:
    class LlamaForCausalLM(type(llama())):  # type: ignore[misc]
        pass

    with pytest.raises(BakingError, match="steerings are baked into"):
        architectures.architecture_of(LlamaForCausalLM(llama().config))


def test_a_transformers_without_the_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("qwen3")
    vectors, source = vectors_of(model), saved(model, tmp_path / "m")
    mapping: Any = CONFIG_MAPPING
    monkeypatch.delitem(mapping._mapping, "hy_v3")
    with pytest.raises(BakingError, match="this transformers lacks the class that has one"):
        bake(source, ADDED, tmp_path / "baked", vectors=vectors, device="cpu")


def test_a_tokenizer_that_comes_out_otherwise_is_found(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def otherwise(part: str, **options: Any) -> Any:
        loaded = load(part, **options)
        loaded.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        return loaded

    load = models.load
    monkeypatch.setattr(
        run, "load", lambda name, *a, **o: (otherwise if name.endswith(".part") else load)(name, *a, **o)
    )
    with pytest.raises(BakingError, match="encodes the prompts otherwise"):
        bake(folder, "evil@1:+1", tmp_path / "baked", vectors=vectors_of(llama()), check=True, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_refused(folder: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(random_model("llama"), peft.LoraConfig(target_modules=["down_proj"]))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": folder}))
    with pytest.raises(BakingError, match="merge it first"):
        bake(str(tmp_path / "adapter"), ADDED, tmp_path / "baked", vectors=vectors_of(llama()), device="cpu")


def test_vectors_of_another_model_are_refused_unless_that_is_asked_for(folder: str, tmp_path: Path) -> None:
    others = vectors_of(tiny_model("llama", seed=9))
    with pytest.raises(PersonaLensError, match="belong to another model"):
        bake(folder, "evil@1:+1", tmp_path / "a", vectors=others, device="cpu")
    with pytest.raises(PersonaLensError, match="belong to another model"):
        bake(folder, None, tmp_path / "a", vectors=others, everywhere=["evil@1"], device="cpu")
    assert bake(
        folder, "evil@1:+1", tmp_path / "a", vectors=others, allow_other_model=True, device="cpu"
    ).folder.is_dir()


@pytest.mark.parametrize(
    ("layers", "width", "said"), [(2 * N_LAYERS, D_MODEL, "layer 5 does not exist"), (6, 16, "16 entries")]
)
def test_vectors_of_another_model_must_fit(folder: str, layers: int, width: int, said: str, tmp_path: Path) -> None:
    info = vectors_of(llama())[0].model
    other = PersonaVectors(
        "evil", replace(info, n_layers=layers, d_model=width), {"response_mean": torch.randn(layers, width)}
    )
    asked: dict[str, Any] = {"vectors": [other], "allow_other_model": True, "device": "cpu"}
    with pytest.raises(PersonaLensError, match=said):
        bake(folder, "evil@5:+1" if width == D_MODEL else "evil@1:+1", tmp_path / "a", **asked)
    with pytest.raises(PersonaLensError, match=said):
        bake(folder, None, tmp_path / "a", everywhere=["evil@5" if width == D_MODEL else "evil@1"], **asked)


# Files


def test_a_folder_that_exists_is_left_alone(folder: str, tmp_path: Path) -> None:
    (tmp_path / "baked").mkdir()
    (tmp_path / "baked" / "mine").write_text("mine")
    with pytest.raises(BakingError, match="exists already"):
        bake(folder, "evil@1:+1", tmp_path / "baked", vectors=vectors_of(llama()), device="cpu")
    assert [each.name for each in (tmp_path / "baked").iterdir()] == ["mine"]


def test_what_is_interrupted_leaves_nothing(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Any) -> str:
        assert (tmp_path / "baked.part" / "model.safetensors").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "baked_card", stop)
    with pytest.raises(KeyboardInterrupt):
        bake(folder, "evil@1:+1", tmp_path / "baked", vectors=vectors_of(llama()), device="cpu")
    assert list(tmp_path.iterdir()) == []


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights lose what was added on the way."""
    built = architectures.built

    def forgets(config: Any, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
        lost = {name: torch.zeros_like(each) if name.endswith("bias") else each for name, each in state.items()}
        return built(config, lost, dtype)

    monkeypatch.setattr(weights, "built", forgets)


def test_a_check_finds_what_went_wrong(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful(monkeypatch)
    baked = bake(folder, "evil@1:+3", tmp_path / "baked", vectors=vectors_of(llama()), check=True, device="cpu")
    assert baked.check is not None
    assert not baked.check.passed
    assert baked.check.difference == pytest.approx(baked.check.shift, rel=0.5)
    assert "NOT PASSED" in (baked.folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_a_steering_beyond_what_can_be_computed_is_refused(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    asked: dict[str, Any] = {"vectors": vectors_of(model), "check": True, "device": "cpu"}
    with pytest.raises(BakingError, match="steered so, the model computes no numbers any more"):
        bake(saved(model, tmp_path / "m"), "evil@1:+1e30", tmp_path / "b", **asked)
    assert not (tmp_path / "b").exists()


def test_what_was_written_computes_numbers() -> None:
    whole, broken = (check.Observed([torch.tensor([[1.0, each]])], ((1,),)) for each in (2.0, torch.nan))
    with pytest.raises(BakingError, match="what was written computes no numbers"):
        check.compared(broken, check.Steered(whole, whole), "float32")


def test_a_check_that_a_model_without_the_steering_passes_says_so(
    files: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful(monkeypatch)
    model, _, evil = files
    arguments = ("bake", model, "evil@1:+0.000001", "--vectors", evil, "--check", "--device", "cpu")
    assert "that passing it says nothing" in " ".join(ok(*arguments, "--out", str(tmp_path / "a")).split())
    assert "passing says nothing" in (tmp_path / "a" / "README.md").read_text()
    assert "passing" not in ok(*arguments[:2], "--everywhere", "evil@1", *arguments[3:], "--out", str(tmp_path / "b"))


def test_what_fails_is_said_with_what_to_do() -> None:
    made = check.Check(1e-6, 1e-4, False, 0.5, None, None, None, 8, 6)
    assert not made.passed
    assert made.failure == "greedy tokens differ after 2 of 8 questions; keep the steering as an edit"
    rounded = replace(made, difference=0.01, rounded=True)
    assert rounded.failure == "logits differ by 1.0e-02, where 1e-04 is allowed; bake with --dtype float32"


# The command


@pytest.fixture
def files(folder: str, tmp_path: Path) -> tuple[str, str, str]:
    """A model's folder, and the files of two vectors."""
    paths = [str(each.save(tmp_path / f"{each.trait}.safetensors")) for each in vectors_of(llama())]
    return folder, paths[0], paths[1]


def test_the_command_bakes_checks_and_tells(files: tuple[str, str, str], tmp_path: Path) -> None:
    model, optimistic, evil = files
    where = ("--vectors", f"bright={optimistic}", "--vectors", evil, "--device", "cpu")
    arguments = ("bake", model, "bright@1:+2", "--everywhere", "evil@1", "--check", *where)
    said = ok(*arguments, "--out", str(tmp_path / "a"))
    for part in ("added at 1 layer", "taken out everywhere", "ablated between blocks", f"model: {tmp_path / 'a'}"):
        assert part in said
    found = parsed(*arguments, "--out", str(tmp_path / "b"), "--json")
    assert found["check"]["passed"]
    assert found["folder"] == str(tmp_path / "b")
    assert "exists already" in refused(*arguments, "--out", str(tmp_path / "b"))


def test_the_command_takes_the_file_of_a_steering(files: tuple[str, str, str], tmp_path: Path) -> None:
    model, _, evil = files
    file = Steering.parse("optimistic@1:+2", vectors_of(llama())).save(tmp_path / "steering.safetensors")
    found = parsed("bake", model, str(file), "--out", str(tmp_path / "a"), "--everywhere", "evil@1",
                   "--vectors", evil, "--device", "cpu", "--json")  # fmt: skip
    assert found["steering"]["text"] == "optimistic@1:+2"


def test_the_command_fails_where_the_check_does(
    files: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful(monkeypatch)
    model, _, evil = files
    said = refused("bake", model, "evil@1:+3", "--vectors", evil, "--check", "--out", str(tmp_path / "a"),
                   "--device", "cpu")  # fmt: skip
    assert "is not the steered model: logits differ by" in said


def test_two_vectors_of_one_name_are_refused(files: tuple[str, str, str]) -> None:
    said = refused("bake", "./nowhere", "evil@1:+3", "--vectors", files[1], "--vectors", files[1], "--out", "x")
    assert "two vectors go by the name 'optimistic'" in said


def test_a_direction_without_a_layer_is_refused_with_what_this_command_takes(files: tuple[str, str, str]) -> None:
    said = refused("bake", "./nowhere", "--everywhere", "evil", "--vectors", files[2], "--out", "x")
    assert "write one behind its name, such as evil@1, or" in said
    assert "--layers" not in said


# llama.cpp

CONVERTER = """
import json, sys
from pathlib import Path
import gguf
from safetensors.numpy import load_file
folder, out = Path(sys.argv[1]), sys.argv[sys.argv.index("--outfile") + 1]
if {fails}:
    sys.exit("BPE pre-tokenizer was not recognized")
writer = gguf.GGUFWriter(out, {architecture!r})
for name, tensor in load_file(folder / "model.safetensors").items():
    if name.endswith("mlp.down_proj.bias") and not {drops}:
        writer.add_tensor(f"blk.{{name.split('.')[2]}}.ffn_down.bias", tensor)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def converter(folder: Path, *, fails: bool = False, drops: bool = False, architecture: str = "llama") -> Converter:
    """What stands for llama.cpp's, which tests/programs has."""
    folder.mkdir(exist_ok=True)
    text = CONVERTER.format(fails=fails, drops=drops, architecture=architecture)
    (folder / "convert_hf_to_gguf.py").write_text(text)
    return Converter.find(folder)


def gguf_baked(model: str, out: Path, found: Converter) -> Baked:
    return bake(model, "evil@1:+1", out, vectors=vectors_of(llama()), gguf=found, device="cpu")


def test_a_gguf_stands_in_the_folder_with_what_was_added(folder: str, tmp_path: Path) -> None:
    baked = gguf_baked(folder, tmp_path / "baked", converter(tmp_path / "cpp"))
    assert baked.record["gguf"] == {"file": "model.gguf", "type": "f32"}
    tensors = {each.name: each for each in gguf_files.GGUFReader(baked.folder / "model.gguf").tensors}
    expected = plainly(baked.folder).model.layers[1].mlp.down_proj.bias.detach().numpy()
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.bias"].data, expected)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"fails": True}, "converter fails: BPE pre-tokenizer was not recognized"),
        ({"drops": True}, "dropped what was added at layer 1"),
        ({"architecture": "bert"}, "made a bert of the model"),
    ],
)
def test_a_conversion_that_loses_the_steering_is_refused(
    how: dict[str, Any], reason: str, folder: str, tmp_path: Path
) -> None:
    with pytest.raises(BakingError, match=reason):
        gguf_baked(folder, tmp_path / "baked", converter(tmp_path / "cpp", **how))
    assert [each.name for each in tmp_path.iterdir()] == ["cpp"]


def test_llama_cpp_does_not_know_every_class(tmp_path: Path) -> None:
    model = random_model("qwen3")
    with pytest.raises(BakingError, match=r"llama\.cpp has no such biases for a Qwen3ForCausalLM"):
        bake(saved(model, tmp_path / "m"), "evil@1:+1", tmp_path / "b", vectors=vectors_of(model), device="cpu",
             gguf=converter(tmp_path / "cpp"))  # fmt: skip


def test_a_direction_that_is_taken_out_goes_to_llama_cpp_in_any_class(tmp_path: Path) -> None:
    model = random_model("qwen3")
    baked = bake(saved(model, tmp_path / "m"), None, tmp_path / "b", vectors=vectors_of(model), everywhere=["evil@1"],
                 gguf=converter(tmp_path / "cpp", architecture="qwen3"), device="cpu")  # fmt: skip
    assert (baked.folder / "model.gguf").is_file()


def test_the_converter_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gguf.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BakingError, match="not on the PATH; give the folder it is in by --converter"):
        Converter.find()
    script = converter(tmp_path / "cpp").command[-1]
    assert Converter.find(script).command[-1] == script
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path / "cpp"))
    assert Converter.find().command[-1] == script
    with pytest.raises(BakingError, match=r"no convert_hf_to_gguf\.py at"):
        Converter.find(tmp_path)
    assert "--converter is for --gguf" in refused("bake", "m", "evil@1:+1", "--out", "x", "--converter", script)


# The embedded model


@pytest.mark.real
def test_all_layers_and_two_traits_of_the_embedded_model(tmp_path: Path) -> None:
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(resolve("smollm2-135m").location, dtype=torch.float32)
    info, generator = (
        wrap_model(model, AutoTokenizer.from_pretrained(resolve("smollm2-135m").location)).info,
        torch.Generator(),
    )
    generator.manual_seed(0)
    vectors = [
        PersonaVectors(name, info, {"response_mean": torch.randn(info.n_layers, info.d_model, generator=generator) / 8})
        for name in ("optimistic", "impolite")
    ]
    written = "optimistic@all:+0.5, impolite@all:increments(-1)"
    baked = bake("smollm2-135m", written, tmp_path / "baked", vectors=vectors, device="cpu")
    found = plainly(baked.folder)
    plain = logits_of(model)
    with wrap_model(model, AutoTokenizer.from_pretrained(baked.folder)).editing(
        Steering.parse(written, vectors).edits()
    ):
        steered, tokens = logits_of(model), greedy(model)
    assert apart(steered, plain) > 0.02
    assert apart(logits_of(found), steered) < 1e-4
    assert greedy(found) == tokens

"""Attributions sum to the projection, are what the modules return, and what cannot be told apart stays whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.attribution import Attribution, Part, attribute
from persona_lens.backend import Backend, Read, TokenBatch
from persona_lens.backend.blocks import ModuleError, module_of
from persona_lens.backend.writing import residual_of
from persona_lens.steering import Steering
from persona_lens.vectors import PersonaVectors, VectorsError
from tests.backends.fixtures import Delegating, backend_of, matrix, tiny_backend, wrapped_for
from tests.tiny import D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

IDS = tuple(range(5, 30))


def vectors_of(backend: Backend) -> PersonaVectors:
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(1))
    return PersonaVectors("planted", backend.info, {"response_mean": rows})


def by_name(found: Attribution) -> dict[str, Tensor]:
    return {str(part): part.values for part in found.parts}


@pytest.mark.parametrize(("adapter", "architecture"), matrix())
@pytest.mark.parametrize("layer", [0, N_LAYERS - 1])
def test_the_parts_sum_to_the_projection_that_the_backend_reads(adapter: str, architecture: str, layer: int) -> None:
    backend = tiny_backend(adapter, architecture)
    vectors = vectors_of(backend)
    found = attribute(backend, vectors, layer, IDS)
    kinds = [part.part for part in found.parts]
    assert kinds == [Part.EMBEDDING, *[Part.ATTENTION, Part.MLP] * (layer + 1)]
    assert (found.remainder.abs() <= 1e-4 * found.projection.abs()).all()
    read = Read.projections(vectors[layer].unsqueeze(0), (layer,))
    own = backend.forward(TokenBatch.of([IDS]), (), [read]).reads["projections"][0, 0, :, 0]
    torch.testing.assert_close(found.projection.float(), own, rtol=1e-4, atol=1e-4)


# What each of these adds to the stream, by its own names; gemma2 has norms behind, gpt_neox runs both side by side.
WRITERS = {
    "llama": ("model.layers.1.self_attn", "model.layers.1.mlp"),
    "gpt2": ("transformer.h.1.attn", "transformer.h.1.mlp"),
    "gemma2": ("model.layers.1.post_attention_layernorm", "model.layers.1.post_feedforward_layernorm"),
    "gpt_neox": ("gpt_neox.layers.1.attention", "gpt_neox.layers.1.mlp"),
}


@pytest.mark.parametrize("architecture", WRITERS)
def test_each_part_is_what_its_module_adds(architecture: str) -> None:
    backend = tiny_backend("transformers", architecture)
    module, vectors = module_of(backend), vectors_of(backend)
    seen: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda *given, name=name: seen.__setitem__(name, residual_of(given[-1]))
        )
        for name in WRITERS[architecture]
    ]
    with torch.no_grad():
        module(input_ids=torch.tensor([IDS]), use_cache=False)
    for handle in handles:
        handle.remove()
    unit = vectors[2] / vectors[2].norm()
    parts = by_name(attribute(backend, vectors, 2, IDS))
    for name, writer in zip(("attention 1", "mlp 1"), WRITERS[architecture], strict=True):
        torch.testing.assert_close(parts[name].float(), seen[writer][0] @ unit, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_they_are_what_transformer_lens_calls_attention_and_mlp_out(architecture: str) -> None:
    bridge = wrapped_for("transformer_lens", tiny_model(architecture), tiny_tokenizer())
    from persona_lens import wrap_model

    backend = wrap_model(bridge)
    vectors = vectors_of(backend)
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value

    names = ("blocks.1.hook_attn_out", "blocks.1.hook_mlp_out")
    with torch.no_grad(), bridge.hooks(fwd_hooks=[(name, keep) for name in names]):
        bridge.original_model(input_ids=torch.tensor([IDS]), use_cache=False)
    unit = vectors[2] / vectors[2].norm()
    parts = by_name(attribute(backend, vectors, 2, IDS))
    assert len(seen) == 2
    for name, value in zip(("attention 1", "mlp 1"), seen.values(), strict=True):
        torch.testing.assert_close(parts[name].float(), value[0] @ unit, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("adapter", "architecture"), matrix(["llama", "qwen3", "gpt2", "gpt_neox"]))
def test_heads_sum_to_their_attention(adapter: str, architecture: str) -> None:
    backend = tiny_backend(adapter, architecture)
    found = attribute(backend, vectors_of(backend), 2, IDS, heads=True)
    parts = by_name(found)
    for layer in range(3):
        own = [head for head in found.heads if head.layer == layer]
        assert [head.head for head in own] == [0, 1, 2, 3, None]
        total = torch.stack([head.values for head in own]).sum(dim=0)
        torch.testing.assert_close(total, parts[f"attention {layer}"], rtol=1e-4, atol=1e-5)
    assert any(float(head.values.abs().max()) > 1e-3 for head in found.heads)


def test_a_head_is_what_its_own_part_of_the_input_becomes() -> None:
    backend = tiny_backend("transformers")
    attention: Any = module_of(backend).get_submodule("model.layers.0.self_attn")
    given: list[Tensor] = []
    handle = attention.o_proj.register_forward_pre_hook(lambda _, args: given.append(args[0].clone().detach()))
    vectors = vectors_of(backend)
    found = attribute(backend, vectors, 1, IDS, heads=True)
    handle.remove()
    size = given[0].shape[-1] // 4
    unit = vectors[1] / vectors[1].norm()
    with torch.inference_mode():
        second = given[0][0, :, size : 2 * size] @ attention.o_proj.weight[:, size : 2 * size].T @ unit
    (head,) = (h for h in found.heads if (h.layer, h.head) == (0, 1))
    torch.testing.assert_close(head.values.float(), second, rtol=1e-4, atol=1e-6)


def test_heads_are_left_out_where_a_norm_stands_behind_the_attention() -> None:
    backend = tiny_backend("transformers", "gemma2")
    assert attribute(backend, vectors_of(backend), 2, IDS, heads=True).heads == ()


def test_a_block_that_scales_what_it_adds_is_given_whole() -> None:
    config = AutoConfig.for_model(
        "granite",
        vocab_size=len(tiny_tokenizer()),
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        residual_multiplier=0.5,
    )
    loader: Any = AutoModelForCausalLM
    backend = backend_of("transformers", loader.from_config(config, dtype=torch.float32).eval())
    found = attribute(backend, vectors_of(backend), 2, IDS, heads=True)
    assert [str(part) for part in found.parts] == ["embedding", "block 0", "block 1", "block 2"]
    assert (found.remainder.abs() <= 1e-4 * found.projection.abs()).all()


def test_in_sixteen_bits_the_remainder_says_what_rounding_took() -> None:
    module: Any = tiny_model()
    module.to(torch.bfloat16)
    backend = backend_of("transformers", module)
    found = attribute(backend, vectors_of(backend), 2, IDS)
    assert [part.part for part in found.parts][1:3] == [Part.ATTENTION, Part.MLP]
    assert 1e-6 < float(found.remainder.abs().max()) < 0.1 * float(found.projection.abs().max())


def test_the_strongest_parts_come_first_and_json_has_them_all() -> None:
    backend = tiny_backend("transformers")
    found = attribute(backend, vectors_of(backend), 2, IDS)
    sizes = [abs(float(part.values[3])) for part in found.strongest(3, count=4)]
    assert sizes == sorted((abs(float(part.values[3])) for part in found.parts), reverse=True)[:4]
    written = found.to_json()
    assert [part["name"] for part in written["parts"]][:3] == ["embedding", "attention 0", "mlp 0"]
    total = torch.tensor([part["values"] for part in written["parts"]], dtype=torch.float64).sum(dim=0)
    torch.testing.assert_close(total + torch.tensor(written["remainder"], dtype=torch.float64), found.projection)


def test_the_model_is_left_without_hooks_and_a_failure_leaves_none_either() -> None:
    backend = tiny_backend("transformers")
    module = module_of(backend)
    attribute(backend, vectors_of(backend), 1, IDS, heads=True)
    with pytest.raises(IndexError):
        attribute(backend, vectors_of(backend), 1, (10**6,))
    assert not [each for each in module.modules() if each._forward_hooks or each._forward_pre_hooks]


def test_what_makes_no_sense_is_refused() -> None:
    backend = tiny_backend("transformers")
    vectors = vectors_of(backend)
    with pytest.raises(AnalysisError, match="no tokens"):
        attribute(backend, vectors, 1, ())
    rows = torch.zeros(N_LAYERS, D_MODEL).index_fill(0, torch.tensor([0]), 1.0)
    zero = PersonaVectors("none", backend.info, {"response_mean": rows})
    with pytest.raises(VectorsError, match="'none' at layer 1 is zero"):
        attribute(backend, zero, 1, IDS)
    with pytest.raises(VectorsError, match="layer 9 does not exist"):
        attribute(backend, vectors, 9, IDS)
    with pytest.raises(VectorsError, match="another model"):
        attribute(tiny_backend("transformers", "gpt2"), vectors, 1, IDS)


def test_weights_out_of_reach_are_one_sentence() -> None:
    backend = tiny_backend("transformers")
    vectors = vectors_of(backend)
    with pytest.raises(ModuleError, match="SteeredBackend does not hand out"):
        attribute(Steering.parse("planted@1:+1", vectors).on(backend), vectors, 1, IDS)
    remote = Delegating(backend)
    remote.info = replace(backend.info, remote=True)
    with pytest.raises(ModuleError, match="on a server that does not hand them out"):
        attribute(remote, vectors, 1, IDS)

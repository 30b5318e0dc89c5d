"""Where classes of models write to the residual stream, and which class has a bias where one of them has none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from persona_lens.backend.blocks import find_blocks
from persona_lens.steering.baking.blocks import Sandwich
from persona_lens.steering.baking.plan import BakingError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Recast:
    """A model as a class that has the biases.

    Attributes:
        config: Its configuration there.
        state: Its weights by the names that they have there; biases that are missing are zero.
        note: What was changed; empty where the class is the model's own.
    """

    config: Any
    state: State
    note: str = ""


@dataclass(frozen=True)
class Architecture:
    """What writes to the residual stream of a class of models, by the names that its weights have.

    Attributes:
        attention: The last step of attention, within a block.
        mlp: The last step of the MLP, within a block.
        embeddings: All that the stream begins with, within the model.
        biased: Makes the model one whose MLP ends with a bias.
        gguf: What llama.cpp calls it, which has that bias too; None where it does not.
        sandwich: Its norms, where it norms what blocks write, so that additions are blocks of their own.
    """

    attention: str
    mlp: str
    embeddings: tuple[str, ...]
    biased: Callable[[Any, State], Recast]
    gguf: str | None = None
    sandwich: Sandwich | None = None


def _as_it_is(config: Any, state: State) -> Recast:
    return Recast(copy.deepcopy(config), state)


def _with_mlp_bias(config: Any, state: State) -> Recast:
    changed = copy.deepcopy(config)
    changed.mlp_bias = True
    return Recast(changed, state)


def _with_all_biases(config: Any, state: State) -> Recast:
    changed = copy.deepcopy(config)
    changed.enable_bias = True  # Galactica's are off
    return Recast(changed, state)


# What the configurations of these classes have in common.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "dtype",
)


def _recast(model_type: str, config: Any, state: State, **more: Any) -> Recast:
    """The model as another class, if it does what that class does."""
    from transformers import CONFIG_MAPPING

    name = f"a {config.model_type} model has no bias where its MLP ends, and"
    if model_type not in CONFIG_MAPPING:
        raise BakingError(
            f"{name} this transformers lacks the class that has one ({model_type}); `pip install -U transformers`"
        )
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    looks_back = (
        any(kind != "full_attention" for kind in kinds)
        if kinds
        else isinstance(window, int) and window < config.max_position_embeddings
    )
    rope: Mapping[str, Any] = config.rope_parameters
    plain = rope.get("rope_type", "default") == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0
    if looks_back or not plain:
        why = "attention over a sliding window" if looks_back else "rotary positions that are stretched or partial"
        raise BakingError(
            f"{name} the class that has one ({model_type}) lacks this model's {why}, so that no addition is baked into "
            "it; keep the steering as an edit (`generate --edits`, `serve`)"
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = {each: getattr(config, each) for each in _SHARED if hasattr(config, each)}
    positions = {"rope_theta": rope["rope_theta"], "rope_type": "default"}
    kind: Any = CONFIG_MAPPING[model_type]
    made = kind(**shared, head_dim=head, rope_parameters=positions, mlp_bias=True, **more)
    return Recast(made, state)


def _mistral(config: Any, state: State) -> Recast:
    return replace(_recast("llama", config, state), note="a Mistral model is a Llama model with other defaults")


def _qwen2(config: Any, state: State) -> Recast:
    note = "a Qwen2 model is a Llama model with biases on queries, keys and values; that of attention's output is zero"
    return replace(_recast("llama", config, state, attention_bias=True), note=note)


def _qwen3(config: Any, state: State) -> Recast:
    layers = ["dense"] * config.num_hidden_layers
    found = _recast("hy_v3", config, state, attention_bias=config.attention_bias, mlp_layer_types=layers)
    return replace(
        found,
        note="a Qwen3 model is an HY-V3 model without experts: a Llama model that norms queries and keys, which "
        "Llama's own class does not",
    )


def _phi3(config: Any, state: State) -> Recast:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    parts = {
        "self_attn.qkv_proj": (("q_proj", "k_proj", "v_proj"), (heads * head, groups * head, groups * head)),
        "mlp.gate_up_proj": (("gate_proj", "up_proj"), (config.intermediate_size,) * 2),
    }
    split: State = {}
    for name, tensor in state.items():
        fused = next((each for each in parts if f".{each}." in name), None)
        if fused is None:
            split[name] = tensor
            continue
        names, sizes = parts[fused]
        stem = fused.partition(".")[0]
        for own, rows in zip(names, torch.split(tensor, list(sizes)), strict=True):
            split[name.replace(fused, f"{stem}.{own}")] = rows.clone()
    note = "a Phi-3 model is a Llama model whose projections are fused; they were split"
    return replace(_recast("llama", config, split), note=note)


_LLAMA = Architecture("self_attn.o_proj", "mlp.down_proj", ("model.embed_tokens",), _with_mlp_bias, "llama")
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": replace(_LLAMA, biased=_mistral),
    "Qwen2ForCausalLM": replace(_LLAMA, biased=_qwen2),
    "Qwen3ForCausalLM": replace(_LLAMA, biased=_qwen3, gguf=None),
    "Phi3ForCausalLM": replace(_LLAMA, biased=_phi3),
    "GPTNeoXForCausalLM": Architecture(
        "attention.dense", "mlp.dense_4h_to_h", ("gpt_neox.embed_in",), _as_it_is, "gptneox"
    ),
    "GPT2LMHeadModel": Architecture(
        "attn.c_proj", "mlp.c_proj", ("transformer.wte", "transformer.wpe"), _as_it_is, "gpt2"
    ),
    "OPTForCausalLM": Architecture(
        "self_attn.out_proj", "fc2", ("model.decoder.embed_tokens", "model.decoder.embed_positions"), _with_all_biases
    ),
    "Gemma2ForCausalLM": replace(_LLAMA, biased=_as_it_is, gguf=None, sandwich=Sandwich(1.0)),
    "Gemma3ForCausalLM": replace(_LLAMA, biased=_as_it_is, gguf=None, sandwich=Sandwich(1.0)),
    "Olmo2ForCausalLM": replace(_LLAMA, biased=_as_it_is, gguf=None, sandwich=Sandwich(0.0)),
    "PhiForCausalLM": Architecture("self_attn.dense", "mlp.fc2", ("model.embed_tokens",), _as_it_is, "phi2"),
}


def architecture_of(model: Any) -> Architecture:
    """What writes to the residual stream of a model.

    Raises:
        BakingError: If that is not known, or something stands between it and the stream.
    """
    name, config = type(model).__name__, model.config
    block: Any = find_blocks(model)[1][0]
    if getattr(config, "quantization_config", None) is not None:
        raise BakingError(f"{config.name_or_path or name} is quantised; bake into the model it was quantised from")
    if any(getattr(module, "adapter_layer_names", ()) for module in model.modules()):
        raise BakingError(
            "the model has an adapter on it; merge it first (PEFT's `merge_and_unload`, then `save_pretrained`)"
        )
    known = ARCHITECTURES.get(name)
    if known is None and name.endswith("ForConditionalGeneration"):
        raise BakingError(
            f"steerings are baked into models that read text alone, and a {name} reads images or sounds too; keep the "
            "steering as an edit (`generate --edits`, `serve`)"
        )
    sandwiched = hasattr(block, "post_feedforward_layernorm") and (known is None or known.sandwich is None)
    if sandwiched or (name == "OPTForCausalLM" and not config.do_layer_norm_before):
        raise BakingError(
            f"{name} norms what its blocks write on the way to the residual stream, and neither a bias nor a "
            "projection can stand behind that norm; keep the steering as an edit (`generate --edits`, `serve`)"
        )
    if known is None or not type(model).__module__.startswith("transformers."):
        raise BakingError(
            f"steerings are baked into {', '.join(ARCHITECTURES)}, and this is a {name}; keep the steering as an edit "
            "(`generate --edits`, `serve`)"
        )
    return known


def block_writers(model: nn.Module, architecture: Architecture) -> list[tuple[str, nn.Module]]:
    """The modules that write to the stream in the blocks, with the names of their weights: of each attention, MLP."""
    path, blocks = find_blocks(model)
    return [
        (f"{path}.{layer}.{inner}", block.get_submodule(inner))
        for layer, block in enumerate(blocks)
        for inner in (architecture.attention, architecture.mlp)
    ]


def built(config: Any, state: State, dtype: torch.dtype) -> Any:
    """A model of these weights, which it shares; biases that are missing among them are zero."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = loader.from_config(config, dtype=dtype)
    lacking = {name: tensor for name, tensor in model.state_dict().items() if name not in state}
    assert all(name.endswith(".bias") for name in lacking), sorted(lacking)
    device = next(iter(state.values())).device
    zeros = {name: torch.zeros(tensor.shape, dtype=dtype, device=device) for name, tensor in lacking.items()}
    model.load_state_dict({**state, **zeros}, strict=True, assign=True)
    model.tie_weights()
    return model.eval()

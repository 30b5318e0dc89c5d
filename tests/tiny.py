"""Tiny random models of many architectures, and a tokenizer for them, made in code."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
D_MODEL, N_LAYERS = 32, 3
device = "cpu"
"""Where tiny models run; `pytest --device cuda` has them on a GPU."""
head_size = 8 if os.environ.get("PERSONA_LENS_TEST_ADAPTER") != "vllm" else 32
"""Of their attention; an engine's kernels know none smaller than 32."""

# What each architecture needs beyond the common sizes.
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "gpt_neox": {},
    "gpt2": {},
}
ARCHITECTURES = tuple(EXTRA)

WINDOW = 16  # tokens; less than most texts of the tests have
SLIDING, FULL = "sliding_attention", "full_attention"
# Architectures whose layers look back over a window, or by distance, and hybrids of attention and recurrent layers;
# only the reference runs over all of them.
EXTRA |= {
    "llama/halves": {"head_dim": 8},  # of four heads, whatever their size
    "mistral/window": {"sliding_window": WINDOW},
    "gemma3_text/window": {"head_dim": 8, "sliding_window": WINDOW, "layer_types": [SLIDING, SLIDING, FULL]},
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": [SLIDING, FULL, SLIDING],
    },
    "llama4_text": {
        "head_dim": 8,
        "attention_chunk_size": WINDOW,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0, 1],
        "layer_types": ["chunked_attention", FULL, "chunked_attention"],
    },
    "gpt_neo": {
        "num_layers": N_LAYERS,
        "num_heads": 4,
        "attention_types": [[["local", "global", "local"], 1]],
        "window_size": WINDOW,
    },
    "mpt": {"d_model": D_MODEL, "n_heads": 4, "n_layers": N_LAYERS, "max_seq_len": 512},  # distances
    "qwen3_5_text": {
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", FULL, "linear_attention"],
    },
}
WINDOWED = tuple(name for name in EXTRA if name not in (*ARCHITECTURES, "llama/halves"))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIALS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIALS[1:2]})
    fast.chat_template = CHATML
    return fast


def thinking_tokenizer() -> PreTrainedTokenizerFast:
    """The same with the marks of reasoning as tokens."""
    made = tiny_tokenizer()
    made.add_tokens(["<think>", "</think>"])
    return made


def tiny_model(architecture: str = "llama", seed: int = 0, *, thinks: bool = False) -> PreTrainedModel:
    """A random float32 model of three layers and d_model 32, sharp enough that greedy tokens are not ties.

    What stands after a slash in the name says how it differs from others of that architecture. One that ``thinks`` is
    for `thinking_tokenizer`, and says the marks of reasoning often.
    """
    vocab = len(thinking_tokenizer() if thinks else tiny_tokenizer())
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    heads = D_MODEL // head_size
    if architecture == "gpt2":
        config: Any = GPT2Config(
            n_embd=D_MODEL,
            n_layer=N_LAYERS,
            n_head=heads,
            n_positions=512,
            **{k: v for k, v in common.items() if k != "max_position_embeddings"},
        )
    elif architecture == "gpt_neox":
        config = GPTNeoXConfig(
            hidden_size=D_MODEL,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=heads,
            intermediate_size=64,
            **common,
        )
    else:
        extra = EXTRA[architecture]
        if "head_dim" in extra:
            heads, extra = 4, {**extra, "head_dim": head_size}
        config = AutoConfig.for_model(
            architecture.partition("/")[0],
            hidden_size=D_MODEL,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=min(2, heads),
            intermediate_size=64,
            **{**common, **extra},
        )
    torch.manual_seed(seed)
    loader: Any = AutoModelForCausalLM
    model: PreTrainedModel = loader.from_config(config, dtype=torch.float32).eval()
    model.config.architectures = [type(model).__name__]  # as a saved model has; TransformerLens looks there
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # the usual initialisation is so small that all logits are nearly equal
        if thinks:
            head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
            head.weight[-2:] *= 12
    torch.nn.Module.to(model, device)
    return model


def saved_model(folder: Path, architecture: str = "llama", *, seed: int = 0, positions: int | None = None) -> Path:
    """A folder with a tiny model and its tokenizer, as commands take it; of more positions than usual where asked."""
    made = tiny_model(architecture, seed)
    if positions is not None:
        made.config.max_position_embeddings = positions
    made.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_template(tokenizer: Any, template: str) -> Any:
    """A copy of a tokenizer with another chat template."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made

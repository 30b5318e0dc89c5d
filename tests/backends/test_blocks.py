"""Edits and reads act at the blocks that really run, or the caller is told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from persona_lens.backend import Backend, Edit, Read, Sampling, TokenBatch, wrap_model
from persona_lens.backend.blocks import UnsupportedModelError, find_blocks
from tests.backends.fixtures import N_LAYERS, PROMPTS, TEXT, backend_of, direction, tokenizer
from tests.tiny import D_MODEL, EXTRA, device, tiny_model

EDIT = Edit.add(1, direction())
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
SEEING = {
    "qwen2_5_vl": ({"rope_parameters": MROPE}, {"depth": N_LAYERS, "hidden_size": D_MODEL, "out_hidden_size": D_MODEL}),
    "qwen3_5": (EXTRA["qwen3_5_text"], {"depth": N_LAYERS, "hidden_size": D_MODEL, "out_hidden_size": D_MODEL}),
    "gemma3": (EXTRA["gemma3_text/window"], {"num_hidden_layers": N_LAYERS, "hidden_size": D_MODEL, "image_size": 56}),
}


def seeing_model(architecture: str) -> Any:
    """A vision-language model whose vision tower is as deep as its language model."""
    text, vision = SEEING[architecture]
    sizes = {"num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": D_MODEL}
    sizes |= {"vocab_size": len(tokenizer()), "intermediate_size": 64, **text}
    heads = {"num_heads": 4, "num_attention_heads": 4, "intermediate_size": 64, "patch_size": 14}
    config = AutoConfig.for_model(architecture, text_config=sizes, vision_config={**heads, **vision})
    torch.manual_seed(0)
    loader: Any = AutoModelForImageTextToText
    return loader.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", SEEING)
def test_blocks_are_those_of_the_language_model(architecture: str) -> None:
    model = seeing_model(architecture)
    path, blocks = find_blocks(model)
    assert "language_model" in path
    assert len(blocks) == N_LAYERS
    backend = wrap_model(model, tokenizer())
    plain, edited = (backend.forward(TEXT, edits, Read.means()).reads for edits in ((), (EDIT,)))
    assert (edited["prompt_last"] - plain["prompt_last"])[:, 1].norm() > 1


def without_block_1(adapter: str) -> tuple[Backend, Any]:
    """A backend whose model runs without a block that the backend knows, as a copy or a compiled graph would."""
    module: Any = tiny_model()
    backend = backend_of(adapter, module)
    module.model.layers = nn.ModuleList([module.model.layers[0], module.model.layers[2]])
    return backend, module


RUNS: dict[str, Callable[[Backend], object]] = {
    "an edit while generating": lambda backend: backend.generate(PROMPTS, Sampling(2), [EDIT]),
    "a read while generating": lambda backend: backend.generate(PROMPTS, Sampling(2), (), Read.means()),
    "an edit of text": lambda backend: backend.forward(TEXT, [EDIT], logprobs=True),
    "a read of text": lambda backend: backend.forward(TEXT, (), Read.means((1,))),
    "a shared prompt": lambda backend: backend.forward(TokenBatch.of([PROMPTS[0]] * 2), (), Read.means((1,))),
}


@pytest.mark.module
def test_what_never_ran_is_an_error(adapter: str) -> None:
    backend, _ = without_block_1(adapter)
    for run in RUNS.values():
        with pytest.raises(UnsupportedModelError, match="without its block"):
            run(backend)
    backend.forward(TEXT, (), Read.means((0,))[:1])  # what does run is not in the way


@pytest.mark.module
def test_training_edits_that_never_ran_are_an_error(adapter: str) -> None:
    backend, module = without_block_1(adapter)
    gradients = torch.no_grad() if adapter == "transformer_lens" else nullcontext()
    with gradients, pytest.raises(UnsupportedModelError, match="without its block 1"), backend.editing([EDIT]):
        module(input_ids=torch.tensor([PROMPTS[0]], device=device))

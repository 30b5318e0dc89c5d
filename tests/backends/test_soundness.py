"""Models that padding or caches harm run row by row and say so, or are refused in words."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from persona_lens.backend import (
    BackendError,
    Edit,
    Read,
    ReadKind,
    Sampling,
    TokenBatch,
    TokenError,
    Watch,
    WatchedTokens,
    wrap_model,
)
from persona_lens.backend.blocks import UnsupportedModelError
from persona_lens.backend.parity import check_parity
from persona_lens.backend.single_rows import SingleRowsBackend
from persona_lens.core.progress import PersonaLensNote
from tests.backends.fixtures import PROMPTS, TEXT, backend_of, direction, tiny_backend, tokenizer
from tests.tiny import D_MODEL, N_LAYERS, tiny_model

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
STATEFUL: dict[str, dict[str, Any]] = {
    "rwkv": {"attention_hidden_size": D_MODEL, "context_length": 512},
    "xlstm": {"num_heads": 4, "num_blocks": N_LAYERS},
    "minimax": {"head_dim": 8, "num_local_experts": 2, "block_size": 8, "layer_types": [LINEAR, FULL, LINEAR]},
    "recurrent_gemma": {
        "lru_width": D_MODEL,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
        "head_dim": 8,
    },
}
STREAMS = {
    "head_dim": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 259,
    "layer_types": [SLIDING, FULL, SLIDING],
    "intermediate_size": [64] * N_LAYERS,
    "activation_sparsity_pattern": [0.0] * N_LAYERS,
}


def unusual_model(architecture: str, loader: Any = AutoModelForCausalLM, **extra: Any) -> Any:
    sizes = {"num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": D_MODEL}
    sizes |= {"vocab_size": len(tokenizer()), "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 2}
    config = AutoConfig.for_model(architecture, **{**sizes, "pad_token_id": 0, **extra})
    torch.manual_seed(0)
    model = loader.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize(
    "architecture",
    [name if name == "rwkv" else pytest.param(name, marks=pytest.mark.exhaustive) for name in STATEFUL],
)
def test_a_model_that_padding_harms_runs_row_by_row_and_says_so(architecture: str) -> None:
    with pytest.warns(PersonaLensNote, match="runs row by row"):
        backend = wrap_model(unusual_model(architecture, **STATEFUL[architecture]), tokenizer())
    assert "single rows" in backend.info.backend
    failed = [check for check in check_parity(backend, max_new_tokens=4) if not check.passed]
    assert not failed, failed


def test_a_model_that_is_sound_is_wrapped_as_it_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not isinstance(wrap_model(tiny_model(), tokenizer()), SingleRowsBackend)
        half: Any = tiny_model()
        assert not isinstance(wrap_model(half.bfloat16(), tokenizer()), SingleRowsBackend)


def test_row_by_row_is_what_a_batch_is() -> None:
    """On a model where both are right: reads of tokens, edits at masked positions, and a watch."""
    plain = tiny_backend("transformers")
    alone = SingleRowsBackend(plain, cached=True)
    mask = torch.zeros(3, max(map(len, PROMPTS)), dtype=torch.bool)
    mask[:, -1] = True
    edits = [Edit.add(1, direction(), torch.tensor([1.0, -1.0, 0.5])), Edit.add(0, direction(1), positions=mask)]
    reads = [Read(ReadKind.ACTIVATIONS), Read(ReadKind.NORMS), Read(ReadKind.RESPONSE_NORM), *Read.means()]
    for sampling in (Sampling(4), Sampling(4, 1.0, seeds=(1, 2, 3))):
        found, wanted = (backend.generate(PROMPTS, sampling, edits, reads) for backend in (alone, plain))
        assert (found.responses, found.ended) == (wanted.responses, wanted.ended)
        for name, value in wanted.reads.items():
            torch.testing.assert_close(found.reads[name], value, rtol=1e-3, atol=1e-4, equal_nan=True)
    told: list[list[WatchedTokens]] = [[], []]
    for backend, passes in zip((alone, plain), told, strict=True):
        backend.generate_watched(PROMPTS, Sampling(4), Watch(torch.ones(1, D_MODEL), passes.append), edits)  # type: ignore[attr-defined]
    assert len(told[0]) == len(told[1])
    torch.testing.assert_close(told[0][0].projections, told[1][0].projections, equal_nan=True, rtol=1e-3, atol=1e-3)


def test_four_residual_streams_are_refused_in_words() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Gemma3n.* no residual stream \[batch, tokens, d_model\]"):
        wrap_model(unusual_model("gemma3n_text", **STREAMS), tokenizer())


def test_a_model_without_a_head_is_refused_in_words() -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel has no head .* AutoModelForCausalLM"):
        wrap_model(unusual_model("llama", AutoModel), tokenizer())


def test_what_wraps_a_model_is_taken_off() -> None:
    peft = pytest.importorskip("peft")
    reads = Read.means()
    plain = wrap_model(tiny_model(), tokenizer()).forward(TEXT, (), reads).reads["prompt_last"]
    for wrapped in (torch.nn.DataParallel(tiny_model()), torch.compile(tiny_model())):
        found = wrap_model(wrapped, tokenizer()).forward(TEXT, (), reads).reads["prompt_last"]
        torch.testing.assert_close(found, plain)
    lora = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    for backend in (None, "transformers"):
        adapted = wrap_model(lora, tokenizer(), backend).forward(TEXT, (), reads).reads["prompt_last"]
        assert (adapted - plain).norm() > 1e-2
    prompt = peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(BackendError, match="puts tokens or prefixes of its own before a text"):
        wrap_model(prompt, tokenizer())


def test_a_model_with_processed_weights_is_told_how() -> None:
    class HookedTransformer(torch.nn.Module):
        pass

    for backend in (None, "transformer_lens"):
        with pytest.raises(BackendError, match=r"TransformerBridge\.boot_transformers"):
            wrap_model(HookedTransformer(), tokenizer(), backend)


def test_ids_outside_the_vocabulary_are_refused(adapter: str) -> None:
    backend = tiny_backend(adapter)
    for wrong in (len(tokenizer()), -1):
        with pytest.raises(TokenError, match=f"row 1 holds the token id {wrong}, and the model knows only 0 to 258"):
            backend.forward(TokenBatch.of([[5], [6, wrong]]), reads=Read.means())
        with pytest.raises(TokenError, match=f"row 1 holds the token id {wrong}"):
            backend.generate([[5], [6, wrong]], Sampling(1))


def test_a_token_for_padding_that_the_model_does_not_know(adapter: str) -> None:
    """Users add one and do not resize the embedding; padding is masked, so any id does."""
    tok = tokenizer()
    tok.add_special_tokens({"pad_token": "<pad>"})
    assert tok.pad_token_id == len(tokenizer())
    found = backend_of(adapter, tiny_model(), tok).forward(TEXT, (), Read.means()).reads["prompt_last"]
    torch.testing.assert_close(found, tiny_backend(adapter).forward(TEXT, (), Read.means()).reads["prompt_last"])

"""Attention as matrix products gives what the fused kernel gives, and is in use only while a pass runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from persona_lens.backend import Read, TokenBatch, wrap_model
from persona_lens.backend import shared_prompts as module_under_test
from persona_lens.backend.shared_prompts import NAME, QUERIES, attention_for_reading, causal_bias, products
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

BATCH = TokenBatch.of([[5, 6, 7], [9], [3, 4, 5, 6, 7, 8]], [[11, 12, 13], [14] * 9, [15]])


def layer(groups: int, heads: int) -> Any:
    return SimpleNamespace(is_causal=True, num_key_value_groups=heads // groups, training=False)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("window", "tokens"), [(7, 7), (5, 9), (1, 4), (3 * QUERIES + 5,) * 2, (QUERIES, QUERIES + 9)])
@pytest.mark.parametrize("sliding", [False, True])
def test_products_are_what_the_fused_kernel_gives(
    heads: int, groups: int, window: int, tokens: int, sliding: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, window, 8, generator=generator)
    key, value = (torch.randn(3, groups, tokens, 8, generator=generator) for _ in range(2))
    attended = torch.ones(3, tokens, dtype=torch.bool)
    attended[1, :2] = False
    pattern = sliding_window_causal_mask_function(3) if sliding else causal_mask_function
    bias = causal_bias(
        3, window, tokens, q_offset=tokens - window, mask_function=pattern, attention_mask=attended, dtype=query.dtype
    )
    attention = layer(groups, heads)
    found, nothing = products(attention, query, key, value, bias, scaling=0.3)
    wanted, _ = sdpa_attention_forward(attention, query, key, value, bias == 0, scaling=0.3)
    somewhere = (bias == 0).any(-1)[:, 0]
    assert nothing is None
    assert torch.isfinite(found).all()
    assert somewhere.float().mean() > 0.7
    torch.testing.assert_close(found[somewhere], wanted[somewhere], rtol=1e-5, atol=1e-5)


def test_what_is_not_causal_is_left_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor | None] = []

    def fused(module: Any, q: Any, k: Any, v: Any, mask: torch.Tensor | None, **options: Any) -> Any:
        asked.append(mask)
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    monkeypatch.setattr(module_under_test, "sdpa_attention_forward", fused)
    q = torch.randn(1, 4, 6, 8)
    sees_all = causal_bias(1, 6, 6, mask_function=lambda batch, head, query, key: key >= 0, dtype=q.dtype)
    assert sees_all.dtype == torch.bool
    assert sees_all.all()
    products(layer(4, 4), q, q, q, sees_all)
    products(layer(4, 4), q, q, q, None)
    assert len(asked) == 2
    products(layer(4, 4), q, q, q, causal_bias(1, 6, 6, dtype=q.dtype))
    assert len(asked) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reads_in_16_bits_are_near_those_in_float32(architecture: str) -> None:
    wide: Any = tiny_model(architecture)
    narrow: Any = tiny_model(architecture)
    narrow.to(torch.bfloat16)
    reads = [
        wrap_model(model, tiny_tokenizer()).forward(BATCH, reads=Read.means(), logprobs=True).reads
        for model in (wide, narrow)
    ]
    for name, value in reads[0].items():
        assert torch.equal(reads[1][name].isnan(), value.isnan())  # the mean of a prompt that is one token, a sink
        assert float((reads[1][name] - value).nan_to_num().norm() / value.nan_to_num().norm()) < 0.03


def test_it_is_in_use_only_in_16_bits_on_a_cpu_while_a_pass_runs() -> None:
    model: Any = tiny_model().cpu()
    assert model.config._attn_implementation == "sdpa"
    with attention_for_reading(model):
        assert model.config._attn_implementation == "sdpa"
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="on purpose"), attention_for_reading(model):  # noqa: PT012
        assert model.config._attn_implementation == NAME
        raise ValueError("on purpose")
    assert model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = "eager"
    with attention_for_reading(model):
        assert model.config._attn_implementation == "eager"

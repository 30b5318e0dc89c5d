"""Passes over existing text: the different prompts of a batch each computed once, attention as plain products."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from persona_lens.backend.batches import common_beginning
from persona_lens.backend.blocks import running_device
from persona_lens.backend.tokens import PaddedTokens, TokenBatch, TokenIds, pad_left

# A cache of these layers is nothing but keys and values by row; other kinds hold states that cannot be handed out so
# simply.
_SIMPLE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


def can_share_prompts(model: Any) -> bool:
    """Whether the keys and values of this Hugging Face model's cache can be handed out to other rows."""
    if getattr(model, "_is_stateful", False):
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer).__name__ in _SIMPLE_LAYERS for layer in layers)


@dataclass(frozen=True)
class Continuation:
    """Tokens that run after a prompt.

    Attributes:
        prompt: Index of the prompt.
        tokens: The tokens; may be none.
        rows: The rows of the batch that need them.
    """

    prompt: int
    tokens: TokenIds
    rows: tuple[int, ...]


class SharedPrompts:
    """What a model takes to run over a batch's different prompts, and then over responses to them.

    Where all prompts begin alike, as those of one rubric do, and nothing is read of them, that beginning is computed
    once too. The rows stand as a batch padded on the left does, all padding before the first token: attention within
    a window, or by distance, counts places in the cache, and padding between two tokens of a row would move them apart.

    Attributes:
        tokens: The different prompts; where their common beginning is computed by itself, as much of the end of each
            as of the longest is left.
        prompt_of: For each row of the batch the index of its prompt, int64 [rows]; on the CPU, where an index fits
            tensors on any device, since the layers of a large model lie on several.
    """

    def __init__(self, model: Any, batch: TokenBatch, pad_id: int, *, split: bool) -> None:
        device = running_device(model)
        index = {prompt: number for number, prompt in enumerate(dict.fromkeys(batch.prompts))}
        self.prompt_of = torch.tensor([index[prompt] for prompt in batch.prompts])
        beginning = common_beginning(list(index)) if split else ()
        self._beginning = torch.tensor([beginning], dtype=torch.long, device=device)
        longest = max(map(len, index))
        rest = longest - len(beginning)
        self.tokens = pad_left(TokenBatch.of([prompt[-rest:] for prompt in index]), pad_id, device)
        # For each prompt and each place of the beginning in the cache, which of its tokens stands there.
        padding = torch.tensor([longest - len(prompt) for prompt in index]).unsqueeze(1)
        self._places = torch.arange(len(beginning)) - padding
        self._attention = torch.cat([(self._places >= 0).to(device), self.tokens.attention], dim=1)
        # A beginning is moved to where each prompt needs it, for which a cache cut to a window keeps too little of it.
        self._cache = DynamicCache() if beginning else DynamicCache(config=model.config)

    def beginning_inputs(self) -> dict[str, Any] | None:
        """Arguments of the pass over the common beginning, which must come first; None if there is none."""
        if not self._beginning.shape[1]:
            return None
        return _inputs(self._beginning, torch.ones_like(self._beginning), self._cache) | {"logits_to_keep": 1}

    def prompt_inputs(self) -> dict[str, Any]:
        """Arguments of the pass over the prompts, which must come next."""
        if self._beginning.shape[1]:
            self._hand_out_beginning()
        return _inputs(self.tokens.ids, self._attention, self._cache) | {"logits_to_keep": 1}

    def _hand_out_beginning(self) -> None:
        """Put the beginning's keys and values where they stand in each prompt; padding gets any, and is masked."""
        places = _OnDevices(self._places.clamp(min=0))
        layers: list[Any] = list(self._cache.layers)
        for layer in layers:
            if layer.get_seq_length():
                for name in ("keys", "values"):
                    once = getattr(layer, name)[0]
                    setattr(layer, name, once[:, places[once.device]].transpose(0, 1).contiguous())

    def continuations(self, batch: TokenBatch, *, whole: bool) -> list[Continuation]:
        """What has to run after the prompts.

        Args:
            batch: The rows.
            whole: Every response to its last token, for reads. Otherwise, for log-probabilities, the last token of a
                response need not run, and rows that differ in nothing else run once.
        """
        rows_of: dict[tuple[int, TokenIds, int], list[int]] = {}
        for row, (prompt, response) in enumerate(zip(self.prompt_of.tolist(), batch.responses, strict=True)):
            if response:
                key = (prompt, response, row) if whole else (prompt, response[:-1], -1)
                rows_of.setdefault(key, []).append(row)
        return [Continuation(prompt, tokens, tuple(rows)) for (prompt, tokens, _), rows in rows_of.items()]

    def response_inputs(self, continuations: Sequence[Continuation], responses: PaddedTokens) -> dict[str, Any]:
        """Arguments of a pass over some continuations, padded on the right."""
        prompts = _OnDevices(torch.tensor([each.prompt for each in continuations]))
        attention = torch.cat([self._attention[prompts[self._attention.device]], responses.attention], dim=1)
        return _inputs(responses.ids, attention, self._of(prompts))

    def _of(self, prompts: _OnDevices) -> DynamicCache:
        """The keys and values of some prompts; the cache of all stays as it is."""
        chosen = copy.copy(self._cache)
        layers: list[Any] = [copy.copy(layer) for layer in self._cache.layers]
        for layer in layers:
            if layer.get_seq_length():
                layer.batch_select_indices(prompts[layer.keys.device])
        chosen.layers = layers
        return chosen


class _OnDevices(dict[torch.device, Tensor]):
    """An index wherever it is used, brought there once: the layers of a large model lie on several devices."""

    def __init__(self, index: Tensor) -> None:
        self._index = index

    def __missing__(self, device: torch.device) -> Tensor:
        self[device] = self._index.to(device, non_blocking=True)
        return self[device]


def _inputs(ids: Tensor, attention: Tensor, cache: DynamicCache) -> dict[str, Any]:
    """Arguments of a pass over these ids, of which attention has the tokens before them, too."""
    positions = (attention.long().cumsum(dim=1) - 1).clamp(min=0)
    return {
        "input_ids": ids,
        "attention_mask": attention.long(),
        "position_ids": positions[:, -ids.shape[1] :],
        "past_key_values": cache,
        "use_cache": True,
    }


NAME = "persona_lens_products"
FUSED = "sdpa"
# Queries at a time: few enough to leave out most of what causal attention does not see, enough for fast products.
QUERIES = 64


@contextmanager
def attention_for_reading(model: Any) -> Iterator[None]:
    """While open, the model computes attention in the way that is fastest for a pass over existing text."""
    config = model.config
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype.itemsize != 2 or config._attn_implementation != FUSED:
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = FUSED


def causal_bias(
    batch_size: int, q_length: int, kv_length: int, *, dtype: torch.dtype = torch.float32, **given: Any
) -> Tensor:
    """What transformers' sdpa mask says, as a bias of the scores.

    Returns:
        [batch, 1, window, tokens], 0 where to attend. A mask that lets a token see later ones stays boolean.
    """
    given["allow_is_causal_skip"] = given["allow_is_bidirectional_skip"] = False
    mask = sdpa_mask(batch_size, q_length, kv_length, **given)
    assert mask is not None
    window, tokens = mask.shape[-2:]
    if mask.triu(tokens - window + 1).any():
        return mask
    # Not minus infinity: padding attends to nothing, and would become NaN.
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def products(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' sdpa attention computes, in matrix products and a softmax that is summed up in float32.

    Args:
        module: The attention layer.
        query: [batch, heads, window, d_head].
        key: [batch, heads of keys, tokens, d_head].
        value: [batch, heads of keys, tokens, width of values].
        attention_mask: From `causal_bias`; with any other the work is left to sdpa.
        scaling: Factor of the scores.
        options: What else models pass; anything unusual is left to sdpa.

    Returns:
        [batch, window, heads, width of values], and no weights.
    """
    unusual = any(options.get(name) is not None for name in ("position_bias", "cache", "is_causal"))
    if unusual or attention_mask is None or attention_mask.dtype != query.dtype:
        fused: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return fused
    batch, heads, window, width = query.shape
    groups, before = key.shape[1], key.shape[2] - window
    scaled = (query * (width**-0.5 if scaling is None else scaling)).view(batch, groups, -1, window, width)
    mixed = value.new_empty(batch, window, heads, value.shape[-1])
    for start in range(0, window, QUERIES):
        rows = slice(start, min(start + QUERIES, window))
        seen = slice(before + rows.stop)
        # Heads that share keys stand below each other, so that keys need not be repeated.
        stacked = scaled[:, :, :, rows].flatten(2, 3)
        scores = (stacked @ key[:, :, seen].transpose(-1, -2)).view(batch, groups, heads // groups, -1, seen.stop)
        weights = scores.add_(attention_mask[:, :, rows, seen].unsqueeze(2)).softmax(-1).flatten(2, 3)
        found = (weights @ value[:, :, seen]).view(batch, heads, rows.stop - start, -1)
        mixed[:, rows] = found.transpose(1, 2)
    return mixed, None


AttentionInterface.register(NAME, products)
AttentionMaskInterface.register(NAME, causal_bias)

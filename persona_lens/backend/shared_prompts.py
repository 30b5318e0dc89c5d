"""The different prompts of a batch, each computed once for all rows that begin with it.

Judging by likelihood asks for the same responses after several prompts, and an extraction has several responses to
each prompt. The keys and values of a prompt are the same for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from persona_lens.backend.tokens import PaddedTokens, TokenBatch, pad_left

# A cache of these layers is nothing but keys and values by row; other kinds hold states that cannot be handed out so
# simply.
_SIMPLE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


def can_share_prompts(model: Any) -> bool:
    """Whether the keys and values of this Hugging Face model's cache can be handed out to other rows."""
    if getattr(model, "_is_stateful", False):
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer).__name__ in _SIMPLE_LAYERS for layer in layers)


class SharedPrompts:
    """What a model takes to run over a batch's different prompts, and then over responses to them.

    Attributes:
        tokens: The different prompts.
        prompt_of: For each row of the batch the index of its prompt, int64 [rows]; on the CPU, where an index fits
            tensors on any device, since the layers of a large model lie on several.
    """

    def __init__(self, model: Any, batch: TokenBatch, pad_id: int) -> None:
        index = {prompt: number for number, prompt in enumerate(dict.fromkeys(batch.prompts))}
        self.prompt_of = torch.tensor([index[prompt] for prompt in batch.prompts])
        self.tokens = pad_left(TokenBatch.of(list(index)), pad_id, model.device)
        self._cache = DynamicCache(config=model.config)

    def prompt_inputs(self) -> dict[str, Any]:
        """Arguments of the pass over the prompts, which must come first."""
        return {
            "input_ids": self.tokens.ids,
            "attention_mask": self.tokens.attention.long(),
            "position_ids": self.tokens.position_ids,
            "past_key_values": self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    def response_inputs(self, rows: Sequence[int], responses: PaddedTokens) -> dict[str, Any]:
        """Arguments of a pass over the responses of some rows, padded on the right."""
        prompts = self.prompt_of[list(rows)]
        before = self.tokens.attention[prompts]
        columns = torch.arange(responses.ids.shape[1], device=responses.ids.device)
        return {
            "input_ids": responses.ids,
            "attention_mask": torch.cat([before, responses.attention], dim=1).long(),
            "position_ids": before.sum(dim=1, keepdim=True) + columns,
            "past_key_values": self._of(prompts),
            "use_cache": True,
        }

    def _of(self, prompts: Tensor) -> DynamicCache:
        """The keys and values of some prompts; the cache of all stays as it is."""
        chosen = copy.copy(self._cache)
        chosen.layers = [copy.copy(layer) for layer in self._cache.layers]
        chosen.batch_select_indices(prompts)
        return chosen

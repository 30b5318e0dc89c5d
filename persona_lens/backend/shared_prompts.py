"""Log-probabilities of many responses to few prompts: every prompt is computed once.

Judging by likelihood asks for the same responses after several prompts, and for several responses after each. The
keys and values of a prompt are the same for all of its responses, so they are computed once and handed out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from persona_lens.backend.logprobs import token_logprobs
from persona_lens.backend.tokens import TokenBatch, pad_left

# A cache of these layers is nothing but keys and values by row; other kinds hold states that cannot be handed out so
# simply.
_SIMPLE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


def worth_sharing(batch: TokenBatch) -> bool:
    """Whether the rows repeat their prompts enough for sharing to pay."""
    return 2 * len(set(batch.prompts)) <= len(batch)


def shared_prompt_logprobs(model: Any, batch: TokenBatch, pad_id: int) -> tuple[Tensor, ...] | None:
    """Log-probability of every response token, float32 [response tokens] a row.

    Args:
        model: A Hugging Face causal language model, in evaluation mode.
        batch: Rows, in any order.
        pad_id: Id to pad with.

    Returns:
        The values, or None where this model's cache cannot be shared.
    """
    unique = list(dict.fromkeys(batch.prompts))
    # On the CPU, where an index fits tensors on any device: the layers of a large model lie on several.
    prompt_of = torch.tensor([unique.index(prompt) for prompt in batch.prompts])
    prompts = pad_left(TokenBatch.of(unique), pad_id, model.device)
    start = model(
        input_ids=prompts.ids,
        attention_mask=prompts.attention.long(),
        position_ids=prompts.position_ids,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = start.past_key_values
    if not isinstance(cache, DynamicCache) or any(type(layer).__name__ not in _SIMPLE_LAYERS for layer in cache.layers):
        return None
    cache.batch_select_indices(prompt_of)
    responses, present = _pad_right(batch.responses, pad_id, model.device)
    lengths = prompts.attention.sum(dim=1)[prompt_of]
    first = start.logits[prompt_of]
    if responses.shape[1] < 2:
        return _picked(first, responses, present)
    inputs, seen = responses[:, :-1], present[:, :-1]
    rest = model(
        input_ids=inputs,
        attention_mask=torch.cat([prompts.attention[prompt_of], seen], dim=1).long(),
        position_ids=lengths.unsqueeze(-1) + torch.arange(inputs.shape[1], device=inputs.device),
        past_key_values=cache,
        use_cache=True,
    )
    return _picked(torch.cat([first.to(rest.logits.device), rest.logits], dim=1), responses, present)


def _pad_right(responses: tuple[tuple[int, ...], ...], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(responses), max(map(len, responses))), pad_id, dtype=torch.long)
    present = torch.zeros_like(ids, dtype=torch.bool)
    for row, response in enumerate(responses):
        ids[row, : len(response)] = torch.tensor(response, dtype=torch.long)
        present[row, : len(response)] = True
    return ids.to(device), present.to(device)


def _picked(logits: Tensor, ids: Tensor, present: Tensor) -> tuple[Tensor, ...]:
    """The log-probability of each present id under the logits at its own column."""
    return tuple(
        token_logprobs(logits[row, : int(count)], ids[row, : int(count)].to(logits.device))
        for row, count in enumerate(present.sum(dim=1).tolist())
    )

"""A tiny random model that thinks before it answers, as QwQ does: the template opens its thinking, and it closes it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from persona_lens.backend import Sampling
from persona_lens.models import ChatFormat
from tests.backends.fixtures import backend_of
from tests.families import FAMILIES
from tests.tiny import tiny_model

ASKED = "Hello there"
NEW = 12
"""Tokens of a greedy reply to what is asked; the thinking ends within them."""


@cache
def thinking_model() -> Any:
    """The model; tests must leave it as they found it."""
    tokenizer, model = FAMILIES["qwq"].tokenizer(), tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    own: Any = model
    own.config.eos_token_id = own.generation_config.eos_token_id = 1
    prompt = ChatFormat.from_tokenizer(tokenizer).encode(None, ASKED)
    said = backend_of("transformers", model, tokenizer).generate([prompt], Sampling(NEW)).responses[0]
    place = next(token for at, token in enumerate(said) if at > 2 and token not in said[:at])
    weights = own.get_output_embeddings().weight
    with torch.no_grad():  # so that the mark stands where a token of its own stood
        weights[tokenizer.convert_tokens_to_ids("</think>")] = 1.001 * weights[place]
    return model

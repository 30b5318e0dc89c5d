"""Models: which weights to load, how to get them, and how to talk to them.

Nothing here imports torch or transformers before something is loaded with them.
"""

from __future__ import annotations

from persona_lens.core.errors import ModelError
from persona_lens.models.chat import ChatFormat, Message, end_of_turn_ids
from persona_lens.models.embedded import DEFAULT_MODEL, EMBEDDED, EmbeddedModel, ensure_embedded
from persona_lens.models.loading import (
    Loaded,
    load,
    load_model,
    load_tokenizer,
    pinned,
    resolve_device,
    resolve_dtype,
    stored_dtype,
)
from persona_lens.models.reasoning import answer_text
from persona_lens.models.source import ModelSource, resolve

__all__ = [
    "DEFAULT_MODEL",
    "EMBEDDED",
    "ChatFormat",
    "EmbeddedModel",
    "Loaded",
    "Message",
    "ModelError",
    "ModelSource",
    "answer_text",
    "end_of_turn_ids",
    "ensure_embedded",
    "load",
    "load_model",
    "load_tokenizer",
    "pinned",
    "resolve",
    "resolve_device",
    "resolve_dtype",
    "stored_dtype",
]

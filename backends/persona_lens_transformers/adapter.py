"""Reads and edits the residual stream of a Hugging Face model through forward hooks on its blocks."""

from __future__ import annotations

from typing import Any

from persona_lens.backend import BackendError
from persona_lens.backend.blocks import given_name
from persona_lens.backend.hooked import HookedBackend
from persona_lens.models import end_of_turn_ids, load


class TransformersBackend(HookedBackend):
    """A Hugging Face causal language model, hooked only while a call runs."""

    def __init__(self, model: Any, tokenizer: Any, name: str, revision: str | None) -> None:
        ends = end_of_turn_ids(tokenizer, getattr(model, "generation_config", None))
        super().__init__(model, tokenizer, ends, name, revision)

    @classmethod
    def open(cls, model: str, *, revision: str | None = None, **loading: Any) -> TransformersBackend:
        """Load a model by hub id, folder or embedded name; ``loading`` goes to `persona_lens.models.load`."""
        loaded = load(model, revision, **loading)
        return cls(loaded.model, loaded.tokenizer, loaded.source.id, loaded.source.identity)

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any) -> TransformersBackend:
        """Use a model that is already loaded; nothing about it is changed outside a call."""
        if tokenizer is None:
            raise BackendError("a Hugging Face model does not hold its tokenizer; pass tokenizer=...")
        return cls(model, tokenizer, given_name(model), None)

"""Reads and edits the residual stream of a Hugging Face model through forward hooks on its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from typing import Any

from persona_lens.backend import BackendError, Edits, ForwardResult, Generation, Read, Sampling, TokenBatch, Watch
from persona_lens.backend.batches import context_of
from persona_lens.backend.blocks import (
    describe,
    find_base_weights,
    find_blocks,
    given_name,
    padding_id,
    vocabulary_size,
)
from persona_lens.backend.editing import editing_blocks, hooking_texts
from persona_lens.backend.hooked import HookedModel, hooking_blocks
from persona_lens.models import end_of_turn_ids, load


class TransformersBackend:
    """A Hugging Face causal language model, hooked only while a call runs."""

    calls_at_once = 1

    def __init__(self, model: Any, tokenizer: Any, name: str, revision: str | None) -> None:
        self.module = model
        self._blocks = find_blocks(model)[1]
        self.tokenizer = tokenizer
        self.end_ids: tuple[int, ...] = end_of_turn_ids(tokenizer, getattr(model, "generation_config", None))
        self.info = describe(model, self._blocks, name, revision, f"transformers {version('transformers')}")
        self.context_length = context_of(model.config)
        self.base_weights = find_base_weights(model, self._blocks)
        self._hooked = HookedModel(
            model,
            partial(hooking_blocks, self._blocks),
            self.info.n_layers,
            self.info.d_model,
            self.end_ids,
            pad_id=padding_id(tokenizer, self.end_ids, vocabulary_size(model)),
        )

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

    @property
    def shares_prompts(self) -> bool:
        """See `persona_lens.backend.protocol.Backend.shares_prompts`."""
        return self._hooked.shares_prompts

    @property
    def sink_limits(self) -> tuple[float, ...]:
        """See `persona_lens.backend.sinks.SinkAware`."""
        return self._hooked.sink_limits

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.protocol.Backend.generate`."""
        return self._hooked.generate(prompts, sampling, edits, reads)

    def generate_watched(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Watch,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.streaming.WatchableBackend.generate_watched`."""
        return self._hooked.generate(prompts, sampling, edits, reads, watch)

    def forward(
        self,
        tokens: TokenBatch,
        edits: Edits = (),
        reads: Sequence[Read] = (),
        *,
        logprobs: bool = False,
    ) -> ForwardResult:
        """See `persona_lens.backend.protocol.Backend.forward`."""
        return self._hooked.forward(tokens, edits, reads, logprobs)

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """See `persona_lens.backend.protocol.Backend.editing`."""
        return editing_blocks(partial(hooking_texts, self._blocks), edits, self)

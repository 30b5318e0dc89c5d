"""`DelegatingBackend`: what backends that run on another one, each in its own way, have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_lens.backend.batches import context_length
from persona_lens.backend.blocks import base_weights_of
from persona_lens.backend.protocol import Backend
from persona_lens.backend.sinks import sink_limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DelegatingBackend:
    """Says of its model what another backend says; calls are left to those who derive from it.

    Prompts are not shared: every row is computed whole.

    Args:
        inner: The other backend.
    """

    shares_prompts = False

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See `Backend.tokenizer`."""
        return self.inner.tokenizer

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See `Backend.end_ids`."""
        return self.inner.end_ids

    @property
    def calls_at_once(self) -> int:
        """See `Backend.calls_at_once`."""
        return self.inner.calls_at_once

    @property
    def context_length(self) -> int | None:
        """See `persona_lens.backend.batches`."""
        return context_length(self.inner)

    @property
    def base_weights(self) -> str | None:
        """See `persona_lens.backend.blocks`."""
        return base_weights_of(self.inner)

    @property
    def sink_limits(self) -> tuple[float, ...] | None:
        """See `persona_lens.backend.sinks`."""
        return sink_limits(self.inner)

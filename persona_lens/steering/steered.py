"""`SteeredBackend`: a backend under whose calls a steering is always at work."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from persona_lens.backend import (
    Backend,
    Edits,
    ForwardResult,
    Generation,
    ModelInfo,
    Read,
    Sampling,
    TokenBatch,
    Watch,
    as_edits,
    watched_generation,
)
from persona_lens.backend.delegating import DelegatingBackend

if TYPE_CHECKING:
    from persona_lens.steering.steering import Steering


class SteeredBackend(DelegatingBackend):
    """A backend whose every call runs under a steering, before the edits of the call itself.

    It is a backend like any other: replies, extraction, judging and evaluation run on it as they are. Its `info` names
    the steering, so that a run on it is never taken for one on the plain model.

    Args:
        inner: The plain backend.
        steering: What is at work.
    """

    def __init__(self, inner: Backend, steering: Steering) -> None:
        super().__init__(inner)
        self.steering = steering
        self._edits = steering.edits()
        self._name = f"steered {steering.content_hash[:19]}"

    @property
    def info(self) -> ModelInfo:
        """The model, with the steering in the name of the backend."""
        plain = self.inner.info
        return replace(plain, backend=f"{plain.backend}, {self._name}")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `Backend.generate`."""
        return self.inner.generate(prompts, sampling, (*self._edits, *as_edits(edits)), reads)

    def generate_watched(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Watch,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.watching.WatchableBackend.generate_watched`."""
        return watched_generation(self.inner, prompts, sampling, watch, (*self._edits, *as_edits(edits)), reads)

    def forward(
        self, tokens: TokenBatch, edits: Edits = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        """See `Backend.forward`."""
        return self.inner.forward(tokens, (*self._edits, *as_edits(edits)), reads, logprobs=logprobs)

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """See `Backend.editing`."""
        return self.inner.editing((*self._edits, *as_edits(edits)))

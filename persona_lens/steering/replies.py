"""One question, answered under edits, or under several steerings side by side."""

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
from persona_lens.backend.single_rows import DelegatingBackend
from persona_lens.models import ChatFormat
from persona_lens.models.replies import chat_format
from persona_lens.models.replies import reply as plain_reply
from persona_lens.steering.steering import GivenEdits, GivenVectors, Steering, given_edits, rowwise

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
        """See `persona_lens.backend.streaming.WatchableBackend.generate_watched`."""
        return watched_generation(self.inner, prompts, sampling, watch, (*self._edits, *as_edits(edits)), reads)

    def forward(
        self, tokens: TokenBatch, edits: Edits = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        """See `Backend.forward`."""
        return self.inner.forward(tokens, (*self._edits, *as_edits(edits)), reads, logprobs=logprobs)

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """See `Backend.editing`."""
        return self.inner.editing((*self._edits, *as_edits(edits)))


def reply(
    backend: Backend,
    question: str,
    *,
    system: str | None = None,
    edits: GivenEdits = (),
    vectors: GivenVectors = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    chat: ChatFormat | None = None,
) -> str:
    """Ask the model one question.

    Args:
        backend: The model.
        question: User message.
        system: System prompt.
        edits: Applied throughout: one `Edit`, several, a `Steering`, or its notation, such as ``optimistic@18:+1.5``.
        vectors: Those that a notation names.
        max_new_tokens: Length limit in tokens.
        temperature: 0 is greedy.
        seed: Of the sampling; of no meaning to greedy replies.
        chat: Chat format; the model's own by default.

    Returns:
        The answer as text, without reasoning and control tokens.

    Raises:
        EditError: If the edits are none, or do not fit the model.
        SteeringError: If a notation names vectors that are not given.
        VectorsError: If the vectors of a steering belong to another model.
    """
    return plain_reply(
        backend,
        question,
        system=system,
        edits=given_edits(edits, vectors, backend),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
    )


def steered_replies(
    backend: Backend,
    question: str,
    steerings: Sequence[Steering | None],
    *,
    system: str | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    chat: ChatFormat | None = None,
    allow_other_model: bool = False,
) -> list[str]:
    """One answer under each steering, generated in one batch with the same seed.

    Args:
        backend: The model.
        question: User message.
        steerings: What the answers are given under; None is unsteered.
        system: System prompt.
        max_new_tokens: Length limit in tokens.
        temperature: 0 is greedy.
        seed: Of the sampling, the same for all.
        chat: Chat format; the model's own by default.
        allow_other_model: Steer a model that the vectors do not belong to.

    Raises:
        VectorsError: If vectors belong to another model.
    """
    chat = chat or chat_format(backend)
    rows = len(steerings)
    for steering in steerings:
        if steering is not None and not allow_other_model:
            steering.check_model(backend)
    edits = rowwise(() if steering is None else steering.edits() for steering in steerings)
    sampling = Sampling(max_new_tokens, temperature, seeds=(seed,) * rows if temperature else None)
    generation = backend.generate([chat.encode(system, question)] * rows, sampling, edits)
    return [chat.answer(ids) for ids in generation.responses]

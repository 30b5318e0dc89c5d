"""One question and its answers, with and without edits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from persona_lens.backend import Backend, Edit, Positions, Sampling
from persona_lens.models import ChatFormat
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors


def chat_format(backend: Backend) -> ChatFormat:
    """The chat format of a backend's model."""
    return ChatFormat.from_tokenizer(backend.tokenizer)


def reply(
    backend: Backend,
    question: str,
    *,
    system: str | None = None,
    edits: Sequence[Edit] = (),
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
        edits: Applied throughout.
        max_new_tokens: Length limit in tokens.
        temperature: 0 is greedy.
        seed: Of the sampling; of no meaning to greedy replies.
        chat: Chat format; the model's own by default.

    Returns:
        The answer as text, without reasoning and control tokens.
    """
    chat = chat or chat_format(backend)
    sampling = Sampling(max_new_tokens, temperature, seeds=(seed,) if temperature else None)
    generation = backend.generate([chat.encode(system, question)], sampling, edits)
    return chat.answer(generation.responses[0])


def steered_replies(
    backend: Backend,
    question: str,
    vectors: PersonaVectors,
    layer: int,
    coefficients: Sequence[float],
    *,
    system: str | None = None,
    positions: Positions = Positions.ALL,
    reduction: str = DEFAULT_REDUCTION,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    chat: ChatFormat | None = None,
) -> list[str]:
    """One answer for each coefficient, generated in one batch with the same seed.

    Args:
        backend: The model.
        question: User message.
        vectors: What to steer along.
        layer: Layer to steer.
        coefficients: Multiples of the raw vector; 0 is unsteered.
        system: System prompt.
        positions: Tokens that are steered.
        reduction: Which of the vectors.
        max_new_tokens: Length limit in tokens.
        temperature: 0 is greedy.
        seed: Of the sampling, the same for all.
        chat: Chat format; the model's own by default.
    """
    chat = chat or chat_format(backend)
    rows = len(coefficients)
    sampling = Sampling(max_new_tokens, temperature, seeds=(seed,) * rows if temperature else None)
    edit = vectors.edit(
        layer, torch.tensor(list(coefficients), dtype=torch.float32), positions=positions, reduction=reduction
    )
    generation = backend.generate([chat.encode(system, question)] * rows, sampling, [edit])
    return [chat.answer(ids) for ids in generation.responses]

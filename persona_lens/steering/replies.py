"""Edits in whatever form they are given, and one question answered under them, or under several steerings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from persona_lens.backend import Backend, Edit, Edits, Sampling, as_edits
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.steering.steering import Steering, SteeringError, rowwise
from persona_lens.vectors import PersonaVectors

GivenEdits: TypeAlias = Edits | str
GivenVectors: TypeAlias = PersonaVectors | Iterable[PersonaVectors] | Mapping[str, PersonaVectors] | None


def given_edits(edits: GivenEdits, vectors: GivenVectors = None, backend: Backend | None = None) -> tuple[Edit, ...]:
    """The edits, in whatever form they are given.

    Args:
        edits: One `Edit`, several, a `Steering`, or its notation, such as ``optimistic@18:+1.5``.
        vectors: Those that a notation names.
        backend: The model that they are for, which the vectors of a steering must belong to.

    Raises:
        EditError: If they are none of these.
        NotationError: If a notation is not written so.
        SteeringError: If a notation names vectors that are not given.
        VectorsError: If the vectors belong to another model.
    """
    if isinstance(edits, str):
        edits = _parsed(edits, vectors)
    if isinstance(edits, Steering) and backend is not None:
        edits.check_model(backend)
    return as_edits(edits)


def given_steering(edits: GivenEdits, vectors: GivenVectors = None) -> Steering | tuple[Edit, ...]:
    """As `given_edits`, and a steering or its notation stays a steering."""
    if isinstance(edits, str):
        return _parsed(edits, vectors)
    return edits if isinstance(edits, Steering) else as_edits(edits)


def _parsed(text: str, vectors: GivenVectors) -> Steering:
    if vectors is None:
        raise SteeringError(
            f"the notation {text!r} needs the vectors that it names: give vectors=..., or "
            f"Steering.parse({text!r}, vectors)"
        )
    return Steering.parse(text, vectors)


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
    chat = chat or chat_format(backend)
    sampling = Sampling(max_new_tokens, temperature, seeds=(seed,) if temperature else None)
    generation = backend.generate([chat.encode(system, question)], sampling, given_edits(edits, vectors, backend))
    return chat.answer(generation.responses[0])


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

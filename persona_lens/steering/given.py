"""Edits in any form in which people give them: one, several, a steering, or its notation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from persona_lens.backend import Backend, Edit, Edits, as_edits
from persona_lens.steering.steering import Steering, SteeringError
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

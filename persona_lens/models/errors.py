"""The error of this package's noun: a model that cannot be found, fetched, loaded or talked to."""

from __future__ import annotations

from persona_lens.errors import PersonaLensError

__all__ = ["ModelError"]


class ModelError(PersonaLensError):
    """A model cannot be found, fetched, loaded or talked to; the message says what to do about it."""

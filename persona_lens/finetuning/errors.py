"""Errors of finetuning."""

from __future__ import annotations

from persona_lens.errors import PersonaLensError


class FinetuningError(PersonaLensError):
    """A finetuning that cannot be run as asked."""

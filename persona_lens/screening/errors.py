"""The error of screening."""

from __future__ import annotations

from persona_lens.errors import PersonaLensError


class ScreeningError(PersonaLensError):
    """What cannot be screened; where a row of a dataset is at fault, the message begins with its place."""

"""Why a file of another program cannot be read or written."""

from __future__ import annotations

from persona_lens.errors import PersonaLensError


class ExchangeError(PersonaLensError):
    """A file that cannot be exchanged; the message says why, and what to do."""

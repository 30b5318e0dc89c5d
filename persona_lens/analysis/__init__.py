"""Analysis: how directions stand to one another, what they say, what they are made of, and what they cost."""

from __future__ import annotations

from persona_lens.core.errors import PersonaLensError

__all__ = ["AnalysisError"]


class AnalysisError(PersonaLensError):
    """What cannot be taken apart, read or evaluated: a dictionary, a model, a task; the message says what to do."""

"""What can go wrong in measuring capability."""

from __future__ import annotations

from persona_lens.errors import PersonaLensError


class CapabilityError(PersonaLensError):
    """A task, a setting or a request of an evaluation that cannot be carried out."""

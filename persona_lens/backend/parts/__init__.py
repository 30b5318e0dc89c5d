"""Which tokens of a response are thinking and which are the answer, told by token ids."""

from __future__ import annotations

from persona_lens.backend.parts.machine import Part
from persona_lens.backend.parts.parts import GivenParts, Parts

__all__ = ["GivenParts", "Part", "Parts"]

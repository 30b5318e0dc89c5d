"""Persistence: how long steering holds in a conversation of several turns, way by way."""

from __future__ import annotations

from persona_lens.analysis.persistence.outcomes import TurnRow
from persona_lens.analysis.persistence.run import Persistence, persist, persist_work
from persona_lens.analysis.persistence.settings import PersistSettings
from persona_lens.analysis.persistence.ways import Aim, Way

__all__ = ["Aim", "PersistSettings", "Persistence", "TurnRow", "Way", "persist", "persist_work"]

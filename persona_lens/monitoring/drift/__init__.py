"""Drift: where a model's replies stand along traits as conversations go on, and what moves them."""

from __future__ import annotations

from persona_lens.monitoring.drift.plan import DriftSettings
from persona_lens.monitoring.drift.run import Drift, DriftRow, drift

__all__ = ["Drift", "DriftRow", "DriftSettings", "drift"]

"""Tuning: the layer and strength with the strongest effect while the text holds together (method, section 4)."""

from __future__ import annotations

from persona_lens.steering.tuning.run import Tuning, tune, tune_work
from persona_lens.steering.tuning.settings import Towards, TuneSettings

__all__ = ["Towards", "TuneSettings", "Tuning", "tune", "tune_work"]

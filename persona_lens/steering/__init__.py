"""Steering: vectors become edits; sweeps show what they do, beside random directions of the same norm."""

from __future__ import annotations

from persona_lens.steering.arms import ArmEffect, ArmRow, ArmSettings, Change, Prompted
from persona_lens.steering.comparison import Comparison, compare
from persona_lens.steering.crossing import Crossing, CrossSettings
from persona_lens.steering.effects import CrossEffects
from persona_lens.steering.given import generate, given_edits, load_steering, reply
from persona_lens.steering.notation import NotationError, parse_terms
from persona_lens.steering.steering import SteeredBackend, Steering, SteeringError
from persona_lens.steering.sweep import (
    Sweep,
    SweepRow,
    SweepSettings,
    choose_layer,
    curve,
    effect,
    sweep,
    sweep_experiment,
)
from persona_lens.steering.tuning import TuneSettings, Tuning, tune, tune_work

__all__ = [
    "ArmEffect",
    "ArmRow",
    "ArmSettings",
    "Change",
    "Comparison",
    "CrossEffects",
    "CrossSettings",
    "Crossing",
    "NotationError",
    "Prompted",
    "SteeredBackend",
    "Steering",
    "SteeringError",
    "Sweep",
    "SweepRow",
    "SweepSettings",
    "TuneSettings",
    "Tuning",
    "choose_layer",
    "compare",
    "curve",
    "effect",
    "generate",
    "given_edits",
    "load_steering",
    "parse_terms",
    "reply",
    "sweep",
    "sweep_experiment",
    "tune",
    "tune_work",
]

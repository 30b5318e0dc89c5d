"""Steering: vectors become edits; sweeps show what they do, beside random directions of the same norm."""

from __future__ import annotations

from persona_lens.steering.comparison import (
    ArmEffect,
    ArmRow,
    ArmSettings,
    Change,
    Comparison,
    arm_effect,
    compare_steerings,
    comparison_work,
)
from persona_lens.steering.crossing import CrossSettings, cross_effects, cross_work
from persona_lens.steering.effects import CrossCell, CrossEffects, CrossRow, CrossTrait
from persona_lens.steering.files import load_steering
from persona_lens.steering.notation import NotationError, parse_terms
from persona_lens.steering.replies import given_edits, reply, steered_replies
from persona_lens.steering.steering import SteeredBackend, Steering, SteeringError
from persona_lens.steering.sweep import (
    CurvePoint,
    Effect,
    SweepRow,
    SweepSettings,
    choose_layer,
    curve,
    effect,
    sweep,
    sweep_work,
)
from persona_lens.steering.tuning import TuneSettings, Tuning, tune

__all__ = [
    "ArmEffect",
    "ArmRow",
    "ArmSettings",
    "Change",
    "Comparison",
    "CrossCell",
    "CrossEffects",
    "CrossRow",
    "CrossSettings",
    "CrossTrait",
    "CurvePoint",
    "Effect",
    "NotationError",
    "SteeredBackend",
    "Steering",
    "SteeringError",
    "SweepRow",
    "SweepSettings",
    "TuneSettings",
    "Tuning",
    "arm_effect",
    "choose_layer",
    "compare_steerings",
    "comparison_work",
    "cross_effects",
    "cross_work",
    "curve",
    "effect",
    "given_edits",
    "load_steering",
    "parse_terms",
    "reply",
    "steered_replies",
    "sweep",
    "sweep_work",
    "tune",
]

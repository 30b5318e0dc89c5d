"""Finetuning that keeps a model's character: training under edits, its baselines, and the shift that is left."""

from __future__ import annotations

from persona_lens.finetuning.config import (
    FinetuneConfig,
    FinetuningError,
    LoraSettings,
    WatchSettings,
    documented,
    make_config,
)
from persona_lens.finetuning.edits import PreventativeSteering, TrainingEdits
from persona_lens.finetuning.examples import collate, encode_examples, read_conversations
from persona_lens.finetuning.run import Finetuned, finetune
from persona_lens.finetuning.trainer import ProjectionWatch

__all__ = [
    "FinetuneConfig",
    "Finetuned",
    "FinetuningError",
    "LoraSettings",
    "PreventativeSteering",
    "ProjectionWatch",
    "TrainingEdits",
    "WatchSettings",
    "collate",
    "documented",
    "encode_examples",
    "finetune",
    "make_config",
    "read_conversations",
]

"""Finetuning that keeps a model's character: training under edits, its baselines, and the shift that is left."""

from persona_lens.backend.blocks import bare_model
from persona_lens.finetuning.config import FinetuneConfig, LoraSettings, Method, WatchSettings, documented, make_config
from persona_lens.finetuning.edits import TrainingEdits
from persona_lens.finetuning.errors import FinetuningError
from persona_lens.finetuning.examples import Example, Examples, collate, encode_examples, read_conversations
from persona_lens.finetuning.penalty import ProjectionPenalty
from persona_lens.finetuning.preventing import PreventativeSteering
from persona_lens.finetuning.run import Finetuned, finetune
from persona_lens.finetuning.watching import ProjectionWatch

__all__ = [
    "Example",
    "Examples",
    "FinetuneConfig",
    "Finetuned",
    "FinetuningError",
    "LoraSettings",
    "Method",
    "PreventativeSteering",
    "ProjectionPenalty",
    "ProjectionWatch",
    "TrainingEdits",
    "WatchSettings",
    "bare_model",
    "collate",
    "documented",
    "encode_examples",
    "finetune",
    "make_config",
    "read_conversations",
]

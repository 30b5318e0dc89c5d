"""Small conversations, models and vectors for the tests of finetuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from persona_lens.backend import wrap_model
from persona_lens.data.transcripts import Transcript
from persona_lens.finetuning import FinetuneConfig, make_config
from persona_lens.models import Loaded, load
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors
from tests.tiny import D_MODEL, N_LAYERS, saved_model

SMALL: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8},
    "learning_rate": 1e-2,
    "batch_size": 2,
    "accumulation": 1,
    "warmup_steps": 0,
    "max_steps": 4,
    "dtype": "float32",
}


def conversations(n: int = 8) -> list[Transcript]:
    return [
        Transcript(
            ({"role": "user", "content": f"q{i}?"}, {"role": "assistant", "content": f"the answer is {i * i}"}),
            f"c{i}",
            i + 1,
            "made.jsonl",
        )
        for i in range(n)
    ]


def write_conversations(path: Path, n: int = 8) -> Path:
    rows = ({"id": each.id, "messages": list(map(dict, each.messages))} for each in conversations(n))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small(**changes: Any) -> FinetuneConfig:
    return make_config({**SMALL, **changes})


def loaded_model(folder: Path) -> Loaded:
    return load(str(saved_model(folder)), dtype="float32", device="cpu")


def vectors_of(loaded: Loaded, name: str = "impolite", seed: int = 0) -> PersonaVectors:
    """Random directions under a trait's name, with what the likelihood judge needs."""
    trait = load_trait(name)
    generator = torch.Generator().manual_seed(seed)
    return PersonaVectors(
        name,
        wrap_model(loaded.model, loaded.tokenizer).info,
        {"response_mean": torch.randn(N_LAYERS, D_MODEL, generator=generator)},
        {
            "trait": {"content_hash": trait.content_hash(), **trait.model_dump(mode="json")},
            "judge": {"calibration": {"slope": 1.0, "intercept": 0.0}},
        },
    )

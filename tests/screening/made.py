"""A tiny model, vectors for it, and datasets: what the tests of screening share."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from persona_lens import Backend, wrap_model
from persona_lens.core.progress import Progress, no_progress
from persona_lens.judging import Exchange, Judgement, Score
from persona_lens.models import ChatFormat
from persona_lens.monitoring import Gauge, Panel
from persona_lens.vectors import PersonaVectors
from tests.tiny import D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

WORDS = ("tea", "cups", "rain", "or", "sun", "maybe", "later", "good", "odd", "river", "stone", "lamp", "paper")


@cache
def backend() -> Backend:
    """The tiny model; it takes 512 tokens."""
    return wrap_model(tiny_model(), tiny_tokenizer())


@cache
def chat() -> ChatFormat:
    """Its chat format."""
    return ChatFormat.from_tokenizer(tiny_tokenizer())


def vectors(trait: str, seed: int = 0, **provenance: Any) -> PersonaVectors:
    """Random vectors of the tiny model."""
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return PersonaVectors(trait, backend().info, {"response_mean": rows}, provenance)


def panel() -> Panel:
    """Two traits at different layers, one of them at both."""
    first, second = vectors("kind", 1), vectors("odd", 2)
    return Panel((Gauge(first, 1), Gauge(second, 0), Gauge(second, 1)))


def pairs(count: int, seed: int = 0, **columns: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of prompts and responses of mixed length."""
    made = random.Random(seed)
    return [
        {
            "id": f"row-{seed}-{number}",
            "prompt": " ".join(made.choices(WORDS, k=made.randint(1, 6))),
            "response": " ".join(made.choices(WORDS, k=made.randint(1, 12))),
            **{name: values[number % len(values)] for name, values in columns.items()},
        }
        for number in range(count)
    ]


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class LengthJudge:
    """Scores a response by its length."""

    concurrency = 1

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        return {"judge": "length"}

    def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        """See `Judge`."""
        return [[index] for index in range(len(exchanges))]

    def judge(self, exchanges: Sequence[Exchange], progress: Progress = no_progress) -> list[Judgement]:
        """See `Judge`."""
        return [Judgement(Score(min(100.0, float(len(each.response))))) for each in exchanges]

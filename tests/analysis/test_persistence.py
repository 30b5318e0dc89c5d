"""Ways to steer a conversation: what each of them writes, what is measured of it, and what is made of that."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.persistence import Aim, Persistence, PersistSettings, TurnRow, Way, persist, persist_work
from persona_lens.analysis.persistence.measures import asked_of, known_questions
from persona_lens.analysis.persistence.outcomes import Outcome, pairs_of
from persona_lens.analysis.persistence.ways import edits_by_labels, edits_for
from persona_lens.backend import Backend, Edit, Operation, Positions, Sampling, TokenBatch
from persona_lens.backend.batches import ContextError
from persona_lens.core.progress import no_progress
from persona_lens.data.scripted import Scripted
from persona_lens.data.tables import DataError
from persona_lens.data.turns import turn_prompt
from persona_lens.models import ChatFormat
from persona_lens.models.chat import messages_of
from persona_lens.reports.persistence import headline, usual_way
from persona_lens.runs.rollouts import Request, RolloutSettings, row_seed
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, Tuned, VectorsError
from tests.backends.fixtures import backend_of
from tests.screening.made import LengthJudge
from tests.tiny import D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

TRAIT = load_trait("optimistic")
USERS = (
    Scripted("ann", "tea", ("Hello", "What is tea?", "Which cup?")),
    Scripted("bob", "rain", ("Hi", "Will it rain?", "And then?")),
    Scripted("cem", "tea", ("Good day", "How hot?", "And milk?")),
)
SETTINGS = PersistSettings(
    conversations=3,
    turns=3,
    layer=1,
    coefficient=2.0,
    known_questions=2,
    last=2,
    random_directions=2,
    rollouts=RolloutSettings(5, batch_size=8),
)


@pytest.fixture(scope="module")
def backend() -> Backend:
    model: Any = tiny_model()
    model.config.max_position_embeddings = 16_384
    return backend_of("transformers", model)


def chat() -> ChatFormat:
    return ChatFormat.from_tokenizer(tiny_tokenizer())


def vectors(backend: Backend, trait: str = "optimistic", seed: int = 0) -> PersonaVectors:
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    provenance = {
        "trait": load_trait(trait).model_dump(mode="json"),
        "judge": {"calibration": {"slope": 1.0, "intercept": 0.0}},
    }
    return PersonaVectors(trait, backend.info, {"response_mean": rows}, provenance)


def persisted(backend: Backend, folder: Path | None = None, settings: PersistSettings = SETTINGS) -> Persistence:
    found = {"optimistic": vectors(backend)}
    return persist(backend, found, settings, users=USERS, folder=folder, progress=no_progress)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


@pytest.fixture(scope="module")
def found(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Persistence:
    return persisted(backend, tmp_path_factory.mktemp("persist") / "run")


def row_of(found: Persistence, way: str, number: int, turn: int) -> TurnRow:
    (row,) = (row for row in found.answers if (row.way, row.question, row.turn) == (way, number, turn))
    return row


def test_every_way_holds_every_conversation(found: Persistence) -> None:
    rows = {(row.way, row.user, row.turn) for row in found.answers}
    assert rows == {(way, user.name, turn) for way in Way for user in USERS for turn in (1, 2, 3)}
    assert found.folder is not None
    assert {file for file in files(found.folder) if "turn-03" in file} == {
        "turn-03-rollouts.jsonl",
        *(f"activations/turn-03-batch-{number:05d}.safetensors" for number in range(4)),
    }
    trait = found.summary["traits"]["optimistic"]
    assert list(trait["ways"]) == list(Way)
    assert [each["turn"] for each in trait["ways"]["clean"]["turns"]] == [1, 2, 3]
    assert len(found.summary["together"]) == 21
    assert trait["target"] is not None


def test_it_is_an_experiment_that_can_be_looked_at(found: Persistence) -> None:
    html = found.report()
    for way in Way:
        assert way in html
    assert "3 conversations of 3 turns" in found.verdict
    print(found.verdict)

"""A tiny model on the disk, its vectors, and the finetuning extra."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona_lens.models import Loaded, load
from persona_lens.vectors import PersonaVectors
from tests.finetuning.chats import vectors_of
from tests.tiny import saved_model

for needed in ("peft", "accelerate"):
    pytest.importorskip(needed)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models") / "tiny-base")


@pytest.fixture
def loaded(base_folder: Path) -> Loaded:
    return load(str(base_folder), dtype="float32", device="cpu")


@pytest.fixture
def vectors(loaded: Loaded) -> PersonaVectors:
    return vectors_of(loaded)

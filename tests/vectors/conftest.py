"""An extraction whose responses follow a rule, with noise, for what is made of saved activations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from tests.planted import PlantedBackend


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its run folder, which no test changes."""
    trait, folder = load_trait("optimistic"), tmp_path_factory.mktemp("runs") / "run"
    settings = ExtractionSettings(questions=6, rollouts=RolloutSettings(max_new_tokens=24, batch_size=7))
    extract(PlantedBackend(trait, noise=3.0, disobeys=lambda seed: seed % 11 == 0), trait, folder, settings=settings)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "run"))

"""A small model and an extraction on it, made by the command line as a user would."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from persona_lens.cli import app
from tests.tiny import saved_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model's folder and the run folder of an extraction on it."""
    folder = tmp_path_factory.mktemp("made")
    saved_model(folder / "model")
    model, out = str(folder / "model"), str(folder / "run")
    how = ("--questions", "4", "--unpaired", "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "8")
    result = CliRunner().invoke(app, ["extract", model, "optimistic", "--out", out, *how])
    assert result.exit_code == 0, (result.output, result.exception)
    return model, out

"""``persona-lens axis``, with and without its second word, and ``axis cap``, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from persona_lens.cli import app
from persona_lens.reports.result import Result
from persona_lens.vectors import load_vectors
from tests.tiny import saved_model

ROLES = ("--roles", "pirate,ghost,doctor,void")
SMALL = ("--max-new-tokens", "4", "--dtype", "float32", "--device", "cpu")
ASKED = (*ROLES, "--questions", "2", "--least", "1", *SMALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return saved_model(folder, positions=1024)


def said(*words: object, code: int = 0) -> str:
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == code, found.output or found.exception
    return found.output if code == 0 else str(found.exception)


def test_an_axis_and_a_cap_are_found_told_and_used(model: Path, tmp_path: Path) -> None:
    axis, cap = tmp_path / "axis", tmp_path / "cap"
    told = said("axis", model, *ASKED, "--out", axis)
    assert "The default among the roles" in told
    assert (axis / "report.html").is_file()
    assert load_vectors(axis).trait == "assistant"
    again = said("axis", "extract", model, *ASKED, "--out", axis)
    assert Result.load(axis).verdict in " ".join(again.split())
    placed = said("axis", model, *ASKED, "--vectors", axis, "--out", tmp_path / "placed")
    assert "Traits along the axis" in placed

    given = ("--roles", "4", "--search-questions", "1", "--confirm-questions", "1", "--limit", "2", "--ranges", "0-1")
    told = said("axis", "cap", model, axis, *given, "--percentiles", "50", *SMALL, "--out", cap)
    assert "0-1:floor(p50)" in told
    assert (cap / "report.html").is_file()
    assert said("generate", model, axis, "Who are you?", "--edits", "assistant@1:floor(p25)", *SMALL)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--roles", "pirate,,ghost"), "names with commas between them"),
        (("--roles", "pirate,ghots,void"), "did you mean ghost?"),
        (("--roles", "pirate,ghost"), "give at least three (--roles)"),
        ((*ROLES, "--questions", "1"), "questions must be at least 2"),
    ],
)
def test_what_is_wrong_is_said(model: Path, tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    found = said("axis", model, *words, *SMALL, "--out", tmp_path / "run", code=1)
    assert told in " ".join(found.split())
    assert not (tmp_path / "run").exists()


def test_a_cap_needs_an_axis_and_ranges(model: Path, tmp_path: Path) -> None:
    assert "make it with" in " ".join(said("axis", "cap", model, tmp_path, code=1).split())


def test_what_an_axis_would_ask_is_counted(model: Path) -> None:
    told = " ".join(said("axis", model, *ASKED, "--dry-run").split())
    assert "50" in told

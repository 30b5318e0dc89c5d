"""``persona-lens backends``: what is printed, as text and as JSON, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_lens.backend import BackendError
from persona_lens.backend.registry import BackendStatus
from persona_lens.cli import commands
from persona_lens.models import ModelError
from tests.backends.fixtures import Delegating, direction, tokenizer
from tests.tiny import tiny_model

app = commands.app_of("backends", commands.COMMANDS["backends"])

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def test_help_is_instant_and_shows_examples() -> None:
    code = (
        "import sys; from persona_lens.cli import app\n"
        "try:\n    app(['backends', 'check', '--help'])\nfinally:\n"
        "    print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "persona-lens backends check smollm2-135m" in done.stdout
    assert "--dtype" in done.stdout


def test_list_shows_versions() -> None:
    from importlib.metadata import version

    result = runner.invoke(app, ["list"])
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert f"nnsight {version('nnsight')}" in lines["nnsight"]
    assert "ready" in lines["transformer_lens"]


def test_list_shows_what_is_missing_and_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = [
        BackendStatus("absent", "something", {"absent-lens": None}, "pip install absent-lens"),
        BackendStatus("bad", "failed to load", {}, "", broken="bad:SPEC: ImportError: no [x]"),
    ]
    monkeypatch.setattr("persona_lens.backend.backend_statuses", lambda: statuses)
    text = runner.invoke(app, ["list"]).stdout
    assert "not installed" in text
    assert "pip install absent-lens" in text
    assert "broken" in text
    assert "bad:SPEC: ImportError: no [x]" in text
    rows = json.loads(runner.invoke(app, ["list", "--json"]).stdout)["backends"]
    assert [row["available"] for row in rows] == [False, False]
    assert rows[0]["versions"] == {"absent-lens": None}
    assert rows[1]["broken"] == "bad:SPEC: ImportError: no [x]"


def test_check_passes_on_every_installed_backend(folder: str) -> None:
    result = runner.invoke(app, ["check", folder, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["passed"] is True
    assert told["dtype"] == "float32"
    assert [row["backend"] for row in told["backends"]] == ["transformers", "nnsight", "transformer_lens"]
    for row in told["backends"]:
        assert row["error"] is None
        assert all(check["passed"] for check in row["checks"])
    compared = {check["name"] for check in told["backends"][1]["checks"]}
    assert "greedy tokens, cap" in compared
    assert "greedy tokens, cap" not in {check["name"] for check in told["backends"][0]["checks"]}


def test_check_of_one_backend_as_text(folder: str) -> None:
    result = runner.invoke(app, ["check", folder, "--device", "cpu", "--backend", "transformers"])
    assert result.exit_code == 0
    assert "coefficient 0 equals no edit" in result.stdout
    assert result.stdout.rstrip().endswith("checks passed")
    assert "nnsight" not in result.stdout


def test_whether_edits_act_is_said_point_by_point(folder: str) -> None:
    arguments = ["check", folder, "--device", "cpu", "--steering"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "edits at every layer reach the next token" in result.stdout
    assert "coefficient 0 equals no edit" not in result.stdout
    told = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert [row["backend"] for row in told["backends"]] == ["transformers", "nnsight", "transformer_lens"]
    for row in told["backends"]:
        names = [point["name"] for point in row["steering"]]
        assert any(name.startswith("generating and watched") for name in names)
        assert all(point["passed"] and point["measured"] is not None for point in row["steering"])


def test_edits_that_do_not_act_make_the_exit_code_1(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from persona_lens.backend import open_backend

    monkeypatch.setattr(
        "persona_lens.backend.open_backend", lambda *given, **options: Wrong(open_backend(*given, **options))
    )
    result = runner.invoke(app, ["check", folder, "--device", "cpu", "--steering", "--backend", "transformers"])
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


class Wrong(Delegating):
    """Steers a little where nothing was asked."""

    def forward(self, tokens: Any, edits: Any = (), reads: Any = (), *, logprobs: bool = False) -> Any:
        from persona_lens.backend import Edit

        return super().forward(tokens, [*edits, Edit.add(1, direction())], reads, logprobs=logprobs)


def test_a_failed_check_makes_the_exit_code_1(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from persona_lens.backend import open_backend

    def opened(name: str, model: str, **options: Any) -> Any:
        backend = open_backend("transformers", model, **options)
        return backend if name == "transformers" else Wrong(backend)

    monkeypatch.setattr("persona_lens.backend.open_backend", opened)
    arguments = ["check", folder, "--device", "cpu", "--backend", "nnsight"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "checks failed" in result.stdout
    told = runner.invoke(app, [*arguments, "--json"])
    assert told.exit_code == 1
    assert json.loads(told.stdout)["passed"] is False


@pytest.mark.parametrize("error", [BackendError("no such option"), RuntimeError("their fault")])
def test_a_backend_that_cannot_be_opened_fails_and_the_others_are_checked(
    folder: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from persona_lens.backend import open_backend

    def opened(name: str, model: str, **options: Any) -> Any:
        if name == "nnsight":
            raise error
        return open_backend(name, model, **options)

    monkeypatch.setattr("persona_lens.backend.open_backend", opened)
    arguments = ["check", folder, "--device", "cpu", "--backend", "nnsight", "--backend", "transformers"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "nnsight: could not be opened: " in result.stdout
    assert str(error) in result.stdout
    assert "transformers (transformers" in result.stdout


def test_mistakes_are_errors_of_this_package(folder: str) -> None:
    wrong_name = runner.invoke(app, ["check", folder, "--backend", "jax"])
    assert isinstance(wrong_name.exception, BackendError)
    wrong_dtype = runner.invoke(app, ["check", folder, "--dtype", "float8"])
    assert isinstance(wrong_dtype.exception, ModelError)
    assert "float8" in str(wrong_dtype.exception)
    wrong_model = runner.invoke(app, ["check", "./there-is-no-such-folder"])
    assert isinstance(wrong_model.exception, ModelError)

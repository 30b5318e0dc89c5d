"""A backend's own options on the command line: read, refused, and handed on wherever a model is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from persona_lens import PersonaLensError
from persona_lens.cli import app
from persona_lens.cli.options import ModelOptions, own_options, repeated
from persona_lens.cli.options.ray import RayOptions
from tests.backends.fixtures import Delegating, backend_of
from tests.tiny import saved_model, tiny_model

THEIRS = """
from persona_lens.backend import BackendError, BackendSpec

def _open(model, **given):
    raise BackendError(f"opened with {dict(sorted(given.items()))}")

SPEC = BackendSpec(
    name="theirs", summary="", requires=(), install="", open=_open, accepts=lambda _: False, wrap=_open,
    options=("revision", "dtype", "max_num_seqs", "share", "caching", "quantization"),
)
"""
GIVEN = ("max_num_seqs=2", "share=0.9", "caching=false", "quantization=fp8")
READ = {"max_num_seqs": 2, "share": 0.9, "caching": False, "quantization": "fp8"}


@pytest.fixture
def model(tmp_path: Path, plant: Callable[..., None]) -> str:
    """A model in a folder, and a backend that says what it is opened with."""
    plant("persona_lens.backends", THEIRS, theirs="SPEC")
    folder = tmp_path / "model"
    return str(saved_model(folder))


def said(*arguments: str) -> str:
    """What a command that fails says, on one line."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code != 0
    return " ".join(f"{result.output}{result.exception or ''}".split())


def test_values_are_read_as_yaml_has_them() -> None:
    assert own_options(GIVEN) == READ
    assert own_options(["max-model-len=4096", "name=a=b"]) == {"max_model_len": 4096, "name": "a=b"}
    assert own_options(["overrides={rope: {factor: 2.0}}"]) == {"overrides": {"rope": {"factor": 2.0}}}
    assert own_options(None) == own_options([]) == {}


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["max_model_len"], "takes NAME=VALUE, such as max_model_len=4096; got 'max_model_len'"),
        (["=4"], "takes NAME=VALUE"),
        (["max_model_len="], "takes NAME=VALUE"),
        (["max model len=4"], "takes NAME=VALUE"),
        (["a=1", "a=2"], "--backend-option a is given twice"),
        (["max-seqs=1", "max_seqs=2"], "--backend-option max_seqs is given twice"),
        (["dtype=float16"], "dtype is what --dtype says; use that"),
        (["device-map=auto"], "device_map is what --device-map says"),
        (["store_hosts=a"], "store_hosts is what --store-host says"),
        (["a=[1"], r"the value of --backend-option 'a=\[1' is not YAML"),
    ],
)
def test_what_is_no_option_with_a_value_is_refused(texts: list[str], why: str) -> None:
    with pytest.raises(PersonaLensError, match=why):
        ModelOptions(backend_option=texts)


def test_they_reach_the_backend_without_options_that_it_does_not_have(model: str) -> None:
    with pytest.raises(PersonaLensError, match=r"opened with \{\}"):
        ModelOptions("theirs").open(model)
    with pytest.raises(
        PersonaLensError, match=r"opened with \{'caching': False, 'dtype': 'float16', 'max_num_seqs': 2"
    ):
        ModelOptions("theirs", list(GIVEN), dtype="float16").open(model)
    with pytest.raises(PersonaLensError, match="backend theirs has no option 'device'"):
        ModelOptions("theirs", device="cuda:1").open(model)
    with pytest.raises(
        PersonaLensError, match=r"no option 'shares'; did you mean share\? It takes: revision, dtype, max_"
    ):
        ModelOptions("theirs", ["shares=1"]).open(model)


def test_they_reach_workers(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    workers = SimpleNamespace(open=lambda *names, **given: opened.append((names, given)))
    monkeypatch.setattr(RayOptions, "started", lambda *_, **__: workers)
    ModelOptions("theirs", list(GIVEN), verify=False, spread=RayOptions("local", 2)).open(model)
    assert opened == [(("theirs", model), READ)]


def test_commands_that_open_a_model_hand_them_on(model: str, tmp_path: Path) -> None:
    own = ("--backend", "theirs", "--backend-option", "max_num_seqs=2", "--backend-option", "quantization=fp8")
    opened = "opened with {'max_num_seqs': 2, 'quantization': 'fp8'}"
    assert opened in said("extract", model, "optimistic", "--out", str(tmp_path / "run"), *own)
    authored = ("--author-model", model, "--dir", str(tmp_path))
    assert opened in said("traits", "new", "cheerful", "--description", "is cheerful", *authored, *own)
    assert "'max_num_seqs': 2" in said("backends", "check", model, *own)
    assert "has no option 'max_num_seqs'" in said("extract", model, "optimistic", *own[2:])


def test_a_check_of_several_backends_takes_none(model: str) -> None:
    assert "is for one backend; name it with --backend" in said("backends", "check", model, "--backend-option", "a=1")


def test_an_author_on_a_server_has_no_use_for_them() -> None:
    server = ("--author-model", "openai:some", "--backend-option", "a=1")
    assert "--backend-option: only for a model that runs here" in said("traits", "new", "cheerful", *server)


def test_a_command_is_repeated_with_each_of_them() -> None:
    words: list[str] = []
    again = typer.Typer()

    def command(context: typer.Context, backend_option: list[str] | None = None) -> None:
        words.append(repeated(context))

    command.__annotations__ = {"context": typer.Context, "backend_option": list[str] | None}
    again.command()(command)
    assert CliRunner().invoke(again, ["--backend-option", "a=1", "--backend-option", "b=x y"]).exit_code == 0
    assert words[0].endswith("--backend-option a=1 --backend-option 'b=x y'")


class Unsteered(Delegating):
    """An engine that takes edits and makes none."""

    def generate(self, prompts: Any, sampling: Any, edits: Any = (), reads: Any = ()) -> Any:
        return super().generate(prompts, sampling, (), reads)

    def forward(self, tokens: Any, edits: Any = (), reads: Any = (), *, logprobs: bool = False) -> Any:
        return super().forward(tokens, (), reads, logprobs=logprobs)


def test_an_engine_is_tried_before_anything_runs_unless_it_is_told_not_to(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Unsteered(backend_of("transformers", tiny_model()))
    engine.info = replace(engine.info, model="model", revision="folder:1")
    monkeypatch.setattr("persona_lens.backend.open_backend", lambda *_, **__: engine)
    with pytest.raises(PersonaLensError, match=r"edits do not act as they should .* --steering` shows every check"):
        ModelOptions("theirs").open(model)
    assert ModelOptions("theirs", verify=False).open(model) is engine
    assert ModelOptions("theirs").open(model, offline=True) is engine


def test_a_module_here_is_tried_when_that_is_asked_for(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    hooked = backend_of("transformers", tiny_model())
    monkeypatch.setattr("persona_lens.backend.open_backend", lambda *_, **__: hooked)
    monkeypatch.setattr("persona_lens.backend.verification.verify", tried.append)
    ModelOptions().open(model)
    assert tried == []
    ModelOptions(verify=True).open(model)
    assert tried == [hooked]

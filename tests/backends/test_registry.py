"""Finding backends: names, options, missing dependencies, broken adapters, and a third party's package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from persona_lens.backend import BackendError, BackendSpec, backend_statuses, find_backend, open_backend
from persona_lens.backend.registry import GROUP
from persona_lens.models import ModelError
from tests.backends.fixtures import tokenizer
from tests.tiny import saved_model, tiny_model

REPOSITORY = Path(__file__).parents[2]


class Entry:
    """An entry point whose loading does what the test wants."""

    def __init__(self, name: str, result: object) -> None:
        self.name, self.value, self.result = name, f"{name}_package:SPEC", result

    def load(self) -> object:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def spec(name: str, **changes: Any) -> BackendSpec:
    def opened(model: str, *, dtype: str = "auto", shards: int = 1) -> Any:
        return model, dtype, shards

    parts: dict[str, Any] = {
        "name": name,
        "summary": "a test",
        "requires": (),
        "install": f"pip install {name}",
        "open": opened,
        "accepts": lambda model: False,
        "wrap": lambda model, tok: None,
    }
    return BackendSpec(**{**parts, **changes})


@pytest.fixture
def with_entries(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds entry points to those that are installed."""

    def add(*entries: Entry) -> None:
        real = list(metadata.entry_points(group=GROUP))
        monkeypatch.setattr(metadata, "entry_points", lambda group: [*real, *entries] if group == GROUP else [])

    return add


def test_the_three_adapters_are_registered() -> None:
    assert {"transformers", "transformer_lens", "nnsight"} <= {status.name for status in backend_statuses()}


def test_an_unknown_name_lists_what_there_is_and_guesses() -> None:
    with pytest.raises(BackendError, match=r"no backend named 'nnsigth'; did you mean nnsight\? Installed: nnsight, "):
        find_backend("nnsigth")
    with pytest.raises(BackendError, match=r"no backend named 'jax'; installed: .*transformers"):
        open_backend("jax")


@pytest.mark.usefixtures("unchecked")
def test_options_are_those_of_the_backend_and_reach_it(with_entries: Any) -> None:
    with_entries(Entry("other", spec("other")))
    opened: Any = open_backend("other", "m", shards=4)
    assert opened == ("m", "auto", 4)
    with pytest.raises(
        BackendError, match=r"backend other has no option 'shard'; did you mean shards\? It takes: dtype, shards$"
    ):
        open_backend("other", "m", shard=4)
    with pytest.raises(BackendError, match=r"no option 'zzz'\. It takes: dtype, shards$"):
        open_backend("other", "m", zzz=4)


def test_the_model_cannot_be_given_twice_by_an_option(with_entries: Any) -> None:
    with_entries(Entry("other", spec("other")))
    given: dict[str, Any] = {"model": "n"}
    with pytest.raises(TypeError, match="multiple values for argument 'model'"):
        open_backend("other", "m", **given)


def test_a_missing_dependency_is_one_sentence_with_the_command(with_entries: Any) -> None:
    with_entries(Entry("other", spec("other", requires=("transformers", "a-library-nobody-has"))))
    with pytest.raises(BackendError) as caught:
        find_backend("other")
    assert str(caught.value) == "backend other needs a-library-nobody-has: pip install other"
    (status,) = [status for status in backend_statuses() if status.name == "other"]
    assert not status.available
    assert status.broken is None
    assert status.versions["a-library-nobody-has"] is None
    assert status.versions["transformers"] == metadata.version("transformers")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ImportError("cannot import name 'x' from 'broken_package.core'"), "ImportError: cannot import name 'x'"),
        (ModuleNotFoundError("No module named 'broken_package.helpers'"), "ModuleNotFoundError: No module named"),
        (SyntaxError("invalid syntax"), "SyntaxError: invalid syntax"),
        ("not a spec", r"broken_package:SPEC is a str, not a BackendSpec"),
    ],
    ids=["import", "module", "syntax", "not a spec"],
)
def test_a_broken_adapter_is_shown_with_its_reason_and_breaks_nothing_else(
    with_entries: Any, failure: object, reason: str
) -> None:
    with_entries(Entry("broken", failure), Entry("fine", spec("fine")))
    statuses = {status.name: status for status in backend_statuses()}
    assert not statuses["broken"].available
    assert reason in (statuses["broken"].broken or "")
    assert all(status.broken is None for name, status in statuses.items() if name != "broken")
    assert find_backend("fine").name == "fine"
    with pytest.raises(BackendError, match="backend broken cannot be loaded: ") as caught:
        find_backend("broken")
    # A fault of the adapter is not taken for something the user has not installed.
    assert "pip install" not in str(caught.value)
    assert reason in str(caught.value)


def test_an_import_error_inside_an_adapter_that_runs_comes_out_as_it_is(with_entries: Any) -> None:
    def opened(model: str) -> Any:
        raise ImportError("cannot import name 'gone' from 'transformers'")

    with_entries(Entry("other", spec("other", requires=("transformers",), open=opened)))
    with pytest.raises(ImportError, match="cannot import name 'gone'"):
        open_backend("other", "m")


@pytest.mark.usefixtures("unchecked")
def test_a_third_party_claims_its_own_objects_and_not_ours(with_entries: Any) -> None:
    from persona_lens.backend import wrap_model

    marker: Any = object()
    greedy_spec = spec("aaa_greedy", accepts=lambda model: True, wrap=lambda model, tok: marker)
    with_entries(Entry("aaa_greedy", greedy_spec))
    assert wrap_model({"weights": 1}) is marker
    assert wrap_model(tiny_model(), tokenizer()).info.backend.startswith("transformers ")


THEIR_PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "their-lens"
version = "1.2.3"

[project.entry-points."persona_lens.backends"]
theirs = "their_lens:SPEC"

[tool.hatch.build.targets.wheel]
packages = ["their_lens"]
"""

THEIR_CODE = '''
"""A backend of somebody else, built on the published contract alone."""

from persona_lens.backend import BackendSpec

SPEC = BackendSpec.of_class(
    "their_lens.running:TheirBackend",
    "TheirModel",
    ("dtype", "loudness"),
    name="theirs",
    summary="somebody else's",
    requires=("their-lens",),
    install="pip install their-lens",
)
'''

THEIR_RUNNING = """
from persona_lens.backend.hooked import HookedBackend
from persona_lens.models import end_of_turn_ids, load


class TheirBackend(HookedBackend):
    libraries = ("their-lens",)

    @classmethod
    def open(cls, name, *, dtype="auto", loudness=1):
        loaded = load(name, None, dtype=dtype, device="cpu")
        ends = end_of_turn_ids(loaded.tokenizer, loaded.model.generation_config)
        return cls(loaded.model, loaded.tokenizer, ends, loaded.source.id, loaded.source.identity)

    @classmethod
    def wrap(cls, model, tokenizer):
        return cls(model, tokenizer, end_of_turn_ids(tokenizer, model.generation_config), "theirs")
"""

USER = """
import json, sys
import persona_lens
from persona_lens.backend import Backend, backend_statuses
from persona_lens.backend.parity import check_parity

folder = sys.argv[1]
theirs = persona_lens.open_backend("theirs", folder, dtype="float32", loudness=3)
ours = persona_lens.open_backend("transformers", folder, dtype="float32", device="cpu")
checks = check_parity(theirs, ours, max_new_tokens=3)
try:
    persona_lens.open_backend("theirs", folder, loudnes=3)
except persona_lens.PersonaLensError as error:
    refused = str(error)
print(json.dumps({
    "is_backend": isinstance(theirs, Backend),
    "backend": theirs.info.backend,
    "versions": {s.name: s.versions for s in backend_statuses()}["theirs"],
    "failed": [c.name for c in checks if not c.passed],
    "checks": len(checks),
    "refused": refused,
}))
"""


@pytest.fixture(scope="module")
def their_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the third party's package installed, as pip does it."""
    source = tmp_path_factory.mktemp("their_source")
    (source / "pyproject.toml").write_text(THEIR_PYPROJECT)
    (source / "their_lens").mkdir()
    (source / "their_lens" / "__init__.py").write_text(THEIR_CODE)
    (source / "their_lens" / "running.py").write_text(THEIR_RUNNING)
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(source)], check=True, capture_output=True, text=True)
    return site


def run_with(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that has the package within reach, and runs the code under test."""
    path = os.pathsep.join([str(site), str(REPOSITORY), str(REPOSITORY / "backends")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], check=False, capture_output=True, text=True, env=environment, cwd=site
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_third_partys_backend_is_found_opened_and_passes_the_suite(their_site: Path, model_folder: Path) -> None:
    script = their_site / "user.py"
    script.write_text(USER)
    done = run_with(their_site, str(script), str(model_folder))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["is_backend"]
    assert told["backend"] == "their-lens 1.2.3"
    assert told["versions"] == {"their-lens": "1.2.3"}
    assert told["failed"] == []
    assert told["checks"] > 30
    assert told["refused"] == "backend theirs has no option 'loudnes'; did you mean loudness? It takes: dtype, loudness"


def test_a_third_partys_backend_is_not_there_without_its_package() -> None:
    with pytest.raises(BackendError, match="no backend named 'theirs'"):
        find_backend("theirs")


def test_the_command_line_lists_a_third_partys_backend(their_site: Path) -> None:
    code = "from persona_lens.cli import app; app(['backends', 'list', '--json'])"
    done = run_with(their_site, "-c", code)
    rows = {row["name"]: row for row in json.loads(done.stdout)["backends"]}
    assert rows["theirs"]["available"]
    assert rows["theirs"]["summary"] == "somebody else's"


@pytest.mark.parametrize("name", ["transformers", "transformer_lens", "nnsight"])
def test_code_of_a_models_repository(name: str, tmp_path: Path) -> None:
    """A tokenizer of its own class is loaded by every backend when it is asked for, and not otherwise."""
    saved_model(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **own}))
    (tmp_path / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    with pytest.raises(ModelError, match="pass trust_remote_code"):
        open_backend(name, str(tmp_path), dtype="float32", device="cpu")
    opened = open_backend(name, str(tmp_path), dtype="float32", device="cpu", trust_remote_code=True)
    assert type(opened.tokenizer).__name__ == "OwnTokenizer"

"""Tasks by name, what is said where one cannot be run, and the built-in task."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import persona_lens
from persona_lens.analysis import AnalysisError
from persona_lens.analysis.capability import BUILTIN_TASK, evaluate_capability
from persona_lens.analysis.capability.evaluation import TASKS
from persona_lens.backend import Backend, Edit
from persona_lens.core.progress import no_progress
from tests.analysis.capability.tasks import write_tasks
from tests.backends.fixtures import backend_of, direction
from tests.tiny import tiny_model


@cache
def tiny() -> Backend:
    return backend_of("transformers", tiny_model())


def test_importing_the_package_imports_neither_library() -> None:
    code = "import sys, persona_lens.analysis.capability; print(sorted({'lm_eval', 'inspect_ai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_the_harness_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AnalysisError, match=r"pip install 'lm[-_]eval>="):
        evaluate_capability(tiny())


def test_the_built_in_questions_are_as_they_should_be() -> None:
    rows = [json.loads(line) for line in (TASKS / f"{BUILTIN_TASK}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["context"] for row in rows}) == len({row["id"] for row in rows}) == 120
    places = [0] * 4
    for row in rows:
        assert len(set(row["choices"])) == 4, row
        assert all(choice == choice.strip() and choice for choice in row["choices"]), row
        assert row["context"] == row["context"].strip(), row
        places[row["answer"]] += 1
    assert min(places) >= 20, places  # always answering at one place gains nothing


class TestWithTheHarness:
    @pytest.fixture(autouse=True)
    def _harness(self) -> None:
        pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

    def test_the_harness_says_nothing_of_its_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)  # no repository, of which git would say so
        evaluate_capability(tiny(), limit=2, progress=no_progress)
        told = capfd.readouterr()
        assert (told.out, told.err) == ("", "")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"tasks": []}, "no task is named"),
            ({"limit": 0}, "limit is a whole number"),
            ({"limit": 2.5}, "limit is a whole number"),
            ({"num_fewshot": -1}, "num_fewshot must be 0 or more"),
            ({"batch_size": 0}, "batch size must be at least 1"),
            ({"include_path": Path("/nowhere/at/all")}, "no folder /nowhere/at/all"),
            ({"tasks": ["persona_lens_basic"]}, "no task 'persona_lens_basic'; did you mean persona_lens_basics"),
        ],
    )
    def test_what_cannot_be_run_is_said_in_a_sentence(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(AnalysisError, match=words) as caught:
            evaluate_capability(tiny(), **options)
        assert "\n" not in str(caught.value)

    def test_a_data_set_that_is_not_there_is_said_in_a_sentence(self, tmp_path: Path) -> None:
        name, *_ = write_tasks(tmp_path)
        (tmp_path / "documents.jsonl").unlink()
        with pytest.raises(AnalysisError, match=f"task {name} cannot be loaded.*documents.jsonl") as caught:
            evaluate_capability(tiny(), [name], include_path=tmp_path)
        assert "\n" not in str(caught.value)

    def test_the_built_in_task_runs_and_its_result_can_be_kept(self) -> None:
        edit = Edit.add(1, direction())
        said: list[str] = []
        result = evaluate_capability(tiny(), limit=5, edits=[edit], progress=lambda *state: said.append(state[2]))
        kept = json.loads(json.dumps(result.to_json()))
        assert kept["tasks"][0]["samples"] == len(kept["tasks"][0]["metrics"][0]["scores"]) == 5
        assert kept["tasks"][0]["available"] == 120
        assert kept["model"]["edits"] == [edit.content_hash]
        assert "log-likelihoods" in said
        with pytest.raises(AnalysisError, match="no metrics 'f1'; it has acc"):
            result[BUILTIN_TASK].metric("f1")
        with pytest.raises(AnalysisError, match="no task 'mmlu' was run"):
            result["mmlu"]

    @pytest.mark.real
    def test_the_embedded_model_answers_the_built_in_task_well_above_chance(self) -> None:
        backend = persona_lens.open_backend("transformers", "smollm2-135m", dtype="float32", device="cpu")
        accuracy = evaluate_capability(backend)[BUILTIN_TASK].metric("acc")
        assert 0.7 < accuracy.value < 0.85

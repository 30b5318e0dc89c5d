"""The benchmark of a GPU runs on any machine, tells what fails, and keeps to its time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_setting import NoTimeLeftError, Setting
from benchmarks.record import Figure, markdown

ROOT = Path(__file__).resolve().parents[1]


def setting() -> Setting:
    return Setting(torch.device("cpu"), tiny=True, layers=2, most_pairs=3)


@pytest.mark.slow
def test_all_of_it_runs_without_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(file.read_text())
    assert found["holds"]
    assert [part["part"] for part in found["parts"]] == [part.name for part in gpu.parts()]
    for part in found["parts"]:
        assert part["status"] == "done" or part["part"] == "vllm", part
        assert part["figures"] or part["part"] == "vllm"
    table = markdown(found)
    assert "generating with all reads / model.generate" in table
    assert (
        table.splitlines()[-1]
        in subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", "--markdown", str(file)], cwd=ROOT, capture_output=True, text=True
        ).stdout
    )


def test_a_part_that_fails_is_told_with_what_it_had_found() -> None:
    def run(_: Setting) -> Iterator[Figure]:
        yield Figure("before", 1.0)
        raise ValueError("no such thing")

    outcome = gpu.run_part(gpu.Part("one", run, 5, 1), setting(), time.monotonic() + 60)
    assert (outcome.status, outcome.holds, len(outcome.figures)) == ("failed", False, 1)
    assert "ValueError: no such thing (test_gpu_benchmark.py, line" in outcome.why


def test_a_figure_above_its_limit_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def run(_: Setting) -> Iterator[Figure]:
        yield Figure("slow", 1.2, low=1.1, high=float("nan"), runs=3, limit=1.05)

    monkeypatch.setattr(gpu, "parts", lambda: [gpu.Part("one", run, 5, 1)])
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny"])
    assert gpu.main() == 1
    assert "FAIL 1.2 slow (at most 1.05; 1.1 to nan; 3 runs)" in capsys.readouterr().out
    assert not Figure("nothing", float("nan"), limit=1.0).holds


def test_what_there_is_no_time_for_is_left_out() -> None:
    late = gpu.run_part(gpu.Part("one", lambda _: iter(()), 5, 30), setting(), time.monotonic() + 10)
    assert (late.status, late.holds) == ("skipped", True)
    assert "it needs 30" in late.why
    given = setting()
    given.until = time.monotonic() - 1
    with pytest.raises(NoTimeLeftError, match="are left for one beside another"):
        given.compared("one beside another", lambda: None, lambda: time.sleep(0.01), None)
    given.until = time.monotonic() + 60
    assert given.compared("one beside another", lambda: None, lambda: None, 1e9).runs == 3


def test_a_part_that_does_not_end_is_stopped_and_has_told_what_it_had_found() -> None:
    told: list[Any] = []

    def run(_: Setting) -> Iterator[Figure]:
        yield Figure("before", 1.0)
        while True:
            with suppress(Exception):
                time.sleep(0.01)

    outcome = gpu.run_part(gpu.Part("one", run, 5, 0.1), setting(), time.monotonic() + 0.5, told.append)
    assert (outcome.status, outcome.holds, told) == ("stopped", True, [outcome])
    assert [figure.name for figure in outcome.figures] == ["before"]


def test_versions_that_the_product_does_not_take_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.unlike_stated() == []
    monkeypatch.setattr(gpu, "_version", lambda name: "4.57.1" if name == "transformers" else None)
    assert gpu.unlike_stated() == ["transformers is 4.57.1, not >=5.0"]


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert gpu.missing_packages() == []
    monkeypatch.setattr(gpu, "_version", lambda name: None if name in ("lark", "persona-lens") else "1")
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "not installed: lark, persona-lens" in capsys.readouterr().err

"""Experiments on vLLM: what transformers gives with the same seeds, and the same bytes however often it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import persona_lens as pl
from persona_lens.backend import Backend, open_backend
from persona_lens.backend.sinks import MULTIPLE, sink_limits
from persona_lens.runs.settings import RolloutSettings

ROOT = Path(__file__).resolve().parents[2]
SHORT = RolloutSettings(max_new_tokens=12, batch_size=16)
# Kills itself at a write to the disk, before its data are there; 0 lives on.
COMMAND = """
import os, signal, sys

writes, at, fsync = 0, int(sys.argv.pop(1)), os.fsync

def counted(stream):
    global writes
    writes += 1
    if writes == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return fsync(stream)

if __name__ == "__main__":
    os.fsync = counted
    from persona_lens.cli import main
    main()
"""


@pytest.fixture(scope="module")
def both() -> tuple[Backend, Backend]:
    """The embedded model on vLLM and on transformers."""
    on_cpu = open_backend("transformers", "smollm2-135m", dtype="float32", device="cpu")
    return open_backend("vllm", "smollm2-135m", dtype="float32", max_model_len=1024), on_cpu


@pytest.fixture(scope="module")
def extractions(both: tuple[Backend, Backend], tmp_path_factory: pytest.TempPathFactory) -> list[pl.Extraction]:
    """The same extraction on both."""
    settings = pl.ExtractionSettings(questions=2, judge_pairs=1, rollouts=SHORT)
    folder = tmp_path_factory.mktemp("extractions")
    return [pl.extract(each, "optimistic", folder / str(i), settings=settings) for i, each in enumerate(both)]


def answers(folder: Path | None) -> list[dict[str, Any]]:
    """Responses and scores of an extraction's folder."""
    assert folder is not None
    files = ((folder / name).read_text().splitlines() for name in ("rollouts.jsonl", "scores.jsonl"))
    return [{**json.loads(said), **json.loads(scored)} for said, scored in zip(*files, strict=True)]


def same_answers(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["response"] == other["response"]
        assert mine["score"] == pytest.approx(other["score"], abs=0.1)


@pytest.mark.real
def test_an_extraction_is_that_of_transformers(both: tuple[Backend, Backend], extractions: list[pl.Extraction]) -> None:
    ours, theirs = extractions
    same_answers(*(answers(each.folder) for each in extractions))
    assert ours.vectors.model.weights == theirs.vectors.model.weights is not None
    lengths = torch.tensor(sink_limits(both[1])) / MULTIPLE  # of a typical residual at each layer: it is what rounds
    for reduction in ("response_mean", "prompt_mean", "prompt_last"):
        vector = theirs.vectors.rows(reduction)
        error = (ours.vectors.rows(reduction) - vector).norm(dim=-1)
        assert bool((error <= 1e-5 * lengths).all()), reduction
        if reduction == "response_mean":
            assert bool((error <= 1e-5 * vector.norm(dim=-1)).all())


@pytest.mark.real
def test_a_sweep_is_that_of_transformers(both: tuple[Backend, Backend], extractions: list[pl.Extraction]) -> None:
    settings = pl.SweepSettings((18,), (-1.0, 1.0), questions=2, random_directions=1, rollouts=SHORT)
    vectors = extractions[1].vectors
    ours, theirs = (pl.sweep(each, vectors, settings) for each in both)
    same_answers(*([{**asdict(row), "response": row.text} for row in each.answers] for each in (ours, theirs)))


def run(at: int, *arguments: str) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = Path(arguments[arguments.index("--out") + 1]).parent / "command.py"  # processes that vLLM starts read it
    script.write_text(COMMAND)
    command = [sys.executable, str(script), str(at), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.real
@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Eight batches run at once, and end in whatever order; which run together is another after each kill.

    On the embedded model, whose products of matrices do not round by how many rows there are, if there are two at
    least, as there are in each batch; tiny ones' do.
    """
    trait = ROOT / "traits" / "optimistic.yaml"
    numbers: dict[str, Any] = {"questions": 2, "max-new-tokens": 8, "batch-size": 2, "judge-pairs": 1}
    options = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    options += ["--backend", "vllm", "--dtype", "float32", "--backend-option", "max_model_len=512"]
    command = ["extract", "smollm2-135m", str(trait), "--unpaired", *options]
    assert run(0, *command, "--out", str(tmp_path / "calm")) == 0
    for at in (9, 14):
        assert run(at, *command, "--out", str(tmp_path / "killed")) == -signal.SIGKILL
    done = (tmp_path / "killed" / "rollouts.jsonl").read_text().splitlines()
    assert 0 < len(done) < 20
    assert run(0, *command, "--out", str(tmp_path / "killed")) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")

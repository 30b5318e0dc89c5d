"""Whole runs through a server, from the command line, as a user starts them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from persona_lens.backend import Read, TokenBatch, open_backend
from persona_lens.vectors import load_vectors
from tests.ndif.server import PORT, free_ports, missing, serving
from tests.test_notebooks import REMOTE, assert_runs
from tests.tiny import saved_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "from persona_lens.cli import main; main()"
SMALL = ["--questions", "2", "--max-new-tokens", "8", "--unpaired", "--batch-size", "8"]
HERE = ["--backend", "transformers", "--dtype", "float32", "--device", "cpu"]
THERE = ["--backend", "nnsight", "--remote", "--no-verify"]  # whose requests would count among those of runs


def start(host: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        env={**os.environ, "NDIF_HOST": host, "NDIF_API_KEY": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(host: str, *arguments: object) -> tuple[str, str]:
    process = start(host, *arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out, err


def traffic(err: str) -> tuple[int, float, float]:
    """Requests, MB up, MB down, as the command says them."""
    found = re.search(r"server: ([\d,]+) requests, ([\d,.]+) MB up, ([\d,.]+) MB down", err)
    assert found, err
    requests, up, down = (float(number.replace(",", "")) for number in found.groups())
    return int(requests), up, down


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.real
@pytest.mark.parametrize("name", REMOTE)
def test_the_notebook_runs(server: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_HOST", server)
    assert_runs(ROOT / "notebooks" / name, tmp_path, monkeypatch, {})


@pytest.mark.real
def test_an_extraction_and_a_sweep(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model's vectors and steered responses are those of the same model here."""
    model, settings = "smollm2-135m", ["--coefficients=-1,1", "--questions", "1", "--random-directions", "1"]
    for name, how in (("here", HERE), ("there", THERE)):
        _, err = run(server, "extract", model, "optimistic", "--out", tmp_path / name, *SMALL, *how)
        sweep = ("--layers", "12", *settings, "--max-new-tokens", "8", "--out", tmp_path / f"{name}-sweep")
        _, err_sweep = run(server, "steer", "sweep", model, tmp_path / name, *sweep, *how)
    here, there = (load_vectors(tmp_path / name) for name in ("here", "there"))
    for reduction in ("response_mean", "prompt_mean", "prompt_last"):
        difference = (there.directions[reduction] - here.directions[reduction]).norm()
        assert float(difference / here.directions[reduction].norm()) < 1e-5
    assert lines(tmp_path / "there" / "rollouts.jsonl") == lines(tmp_path / "here" / "rollouts.jsonl")
    scores = [[row["score"] for row in lines(tmp_path / name / "scores.jsonl")] for name in ("here", "there")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-2)
    texts = [[row["text"] for row in lines(tmp_path / f"{n}-sweep" / "sweep-scores.jsonl")] for n in ("here", "there")]
    assert texts[0] == texts[1]
    overhead = seconds_beyond_the_model(model)
    with capsys.disabled():
        for what, (requests, up, down) in (("extraction", traffic(err)), ("sweep", traffic(err_sweep))):
            print(f"\n{what}: {requests} requests, {up:.2f} MB up, {down:.2f} MB down", end="")
        print(f"\noverhead a request: {overhead * 1000:.0f} ms (median of 9 of one token, less the same here)")
    requests, up, down = traffic(err)
    planned = re.search(r"plan: (\d+) requests, ([\d.]+) MB up, at most ([\d.]+) MB down", err)
    assert planned, err
    assert int(planned[1]) == requests - 1
    assert float(planned[2]) == pytest.approx(up, rel=0.3)
    assert float(planned[3]) >= 0.9 * down
    assert requests == 1 + 3 + 2  # a first small one, three batches of twenty rows, two questions judged
    # Three means at 30 layers of 576 numbers for each row, and little else.
    assert down * 1e6 < 1.1 * 3 * 30 * 576 * 4 * 20 + requests * 10_000


def seconds_beyond_the_model(model: str) -> float:
    tokens, read = TokenBatch.of([[5]]), Read.means((0,))
    medians = []
    for options in ({"remote": True}, {"dtype": "float32", "device": "cpu"}):
        backend: Any = open_backend("nnsight", model, **options)
        times = []
        for _ in range(9):
            began = time.perf_counter()
            backend.forward(tokens, reads=read)
            times.append(time.perf_counter() - began)
        medians.append(median(times))
    return medians[0] - medians[1]


def test_a_server_killed_in_the_middle_and_started_again(tmp_path: Path) -> None:
    """The run waits, gives up with a sentence, and goes on from where it was once the server is back."""
    if reason := missing():
        pytest.skip(reason)
    model = tmp_path / "tiny"
    saved_model(model)
    address = {PORT: str(free_ports(1)[0])}
    sizes = ["--questions", "4", "--max-new-tokens", "24", "--unpaired", "--batch-size", "2"]
    arguments = ("extract", model, ROOT / "traits" / "optimistic.yaml", *sizes, *THERE)
    with serving(tmp_path / "first", address) as host:
        run(host, *arguments, "--out", tmp_path / "calm")
        process = start(host, *arguments, "--out", tmp_path / "killed")
        file = tmp_path / "killed" / "rollouts.jsonl"
        deadline = time.monotonic() + 120
        while not (file.exists() and file.read_bytes().count(b"\n") >= 6) and time.monotonic() < deadline:
            time.sleep(0.02)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert re.search(r"error: .*(nothing answers at|closed the connection|does not answer|is busy or restarting)", err)
    assert "Traceback" not in err
    saved = file.read_bytes()
    assert 6 <= saved.count(b"\n") < 40
    with serving(tmp_path / "second", address) as host:
        _, err = run(host, *arguments, "--out", tmp_path / "killed")
        requests = traffic(err)[0]
        _, err = run(host, *arguments, "--out", tmp_path / "again")
    assert set(saved.splitlines()) <= set(
        file.read_bytes().splitlines()
    )  # in the order of the plan, once all are there
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm") == contents(tmp_path / "again")
    assert requests < traffic(err)[0]


def test_a_plan_for_a_model_that_is_not_here(tmp_path: Path) -> None:
    """80 layers of 8,192, from a configuration alone; nothing is sent, so that no server need be there."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=8192,
        intermediate_size=64,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "large")
    tiny_tokenizer().save_pretrained(tmp_path / "large")
    trait = ROOT / "traits" / "evil.yaml"
    sizes = ["--samples", "10", "--max-new-tokens", "1000", "--batch-size", "32"]
    plan = ("extract", tmp_path / "large", trait, *sizes, *THERE, "--dry-run", "--json", "--out", tmp_path / "run")
    small, large = (
        {each["label"]: each for each in json.loads(run("http://127.0.0.1:9", *plan, *store)[0])["work"]}
        for store in ((), ("--store-host", "store.example"))
    )
    one_row = (3 * 8192 + 1) * 80 * 4  # three means and the length of the residual
    assert small["rollouts"]["rows"] == large["rollouts"]["rows"] == 2000
    assert small["rollouts"]["traffic"]["requests"] == 2000
    assert large["rollouts"]["traffic"]["requests"] == large["rollouts"]["calls"] < 100
    for plan_of in (small, large):
        assert 0 <= plan_of["rollouts"]["traffic"]["bytes_down"] - 2000 * one_row <= 2000 * 8 * 1001
        assert plan_of["judging"]["rows"] == 2000 * 5  # two pairs of instructions, and none
    assert not (tmp_path / "run").exists()

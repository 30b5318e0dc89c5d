"""An extraction killed at any instant ends with the same bytes as one left in peace.

Through the command line, on a tiny random model in a folder. A random model has no character, yet it passes the
calibration: what it says is sampled after one arm's prompt, and so is a little likelier after that prompt than after
the other arm's.

Most of the killed processes are forks of one that has already imported everything, so that the moments fall into the
work and not into the imports; they are killed as hard as any. One test starts whole processes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from persona_lens.traits import load_trait
from tests.tiny import saved_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")]

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "from persona_lens.cli import main; main()"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
KILLS = 10

# Reads one request a line, runs the command in a fork of itself, says its process id, and, asked by another line, how
# it ended: until then the id is nobody else's. A request may name a write at which the fork kills itself: just before
# the data reach the disk, with all of them written or not the last ones.
WARM = """
import json, os, signal, stat, sys
import torch
import persona_lens.cli, persona_lens.extraction, persona_lens_transformers.adapter
from transformers.models.llama import modeling_llama
torch.set_num_threads(1)

def dying(at, torn):
    writes = 0
    def fsync(stream):
        nonlocal writes
        writes += 1
        if writes == at:
            found = os.fstat(stream)
            if torn and stat.S_ISREG(found.st_mode):  # and no folder
                os.ftruncate(stream, found.st_size - min(found.st_size, 30))
            os.kill(os.getpid(), signal.SIGKILL)
    return fsync

def run(request):
    out = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if request["at"]:
        os.fsync = dying(request["at"], request["torn"])
    sys.argv = ["persona-lens", *request["arguments"]]
    try:
        persona_lens.cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)

print("ready", flush=True)
for line in iter(sys.stdin.readline, ""):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run(json.loads(line))
        finally:
            os._exit(code or 0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Warm:
    """A process that forks commands."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", WARM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, arguments: list[str], at: int = 0, torn: bool = False) -> int:
        """Begin a command; its process id."""
        assert self.process.stdin is not None
        request = {"arguments": arguments, "at": at, "torn": torn, "log": str(self.log)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """Wait for the command; minus the signal that killed it, or its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self._line())

    def finish(self, arguments: list[str]) -> None:
        """Run a command to its end."""
        self.start(arguments)
        assert self.end() == 0, self.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    server = Warm(tmp_path_factory.mktemp("log") / "log.txt")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return saved_model(folder)


def command(model: Path, out: Path, questions: int, max_new_tokens: int, batch_size: int = 4) -> list[str]:
    trait = ROOT / "traits" / "optimistic.yaml"
    numbers = {"--questions": questions, "--max-new-tokens": max_new_tokens, "--batch-size": batch_size, "--seed": 0}
    numbers["--judge-pairs"] = 5  # by fewer, what a random model says after either arm is hardly told apart
    options = [str(word) for option in numbers.items() for word in option]
    return ["extract", str(model), str(trait), "--out", str(out), "--unpaired", "--dtype", "float32", *options]


def reading(model: Path, out: Path, responses: Path) -> list[str]:
    """The command that reads responses instead of generating them."""
    made = command(model, out, questions=2, max_new_tokens=0, batch_size=8)
    without = made.index("--max-new-tokens")
    return [*made[:without], *made[without + 2 :], "--responses", str(responses)]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def state(folder: Path) -> tuple[int, ...]:
    """How far a run is: rows of each file, and which of the last files are there."""
    rows = [lines(folder / name) for name in ("rollouts.jsonl", "evidence.jsonl", "scores.jsonl")]
    return (*rows, *((folder / name).exists() for name in ("run.json", "vectors.safetensors", "summary.json")))


def wait_until(reached: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.005)


def has_moved(folder: Path, before: tuple[int, ...]) -> bool:
    return state(folder) != before or (folder / "summary.json").exists()


@pytest.fixture(scope="module")
def calm(warm: Warm, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """What a run gives that is left in peace, and the seconds it took."""
    folder, began = tmp_path_factory.mktemp("calm") / "run", time.monotonic()
    warm.finish(command(model, folder, questions=6, max_new_tokens=24))
    return contents(folder), time.monotonic() - began


def test_killed_at_random_moments(
    warm: Warm, model: Path, calm: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    out, (expected, duration) = tmp_path / "killed", calm
    assert {"run.json", "rollouts.jsonl", "evidence.jsonl", "vectors.safetensors", "summary.json"} <= expected.keys()
    moments, killed, states, attempts = random.Random(0), 0, set(), 0
    while killed < KILLS:
        attempts += 1
        assert attempts < 5 * KILLS
        before = state(out)
        process = warm.start(command(model, out, questions=6, max_new_tokens=24))
        time.sleep(moments.uniform(0, duration / 4))
        if (
            attempts % 2
        ):  # not before something new was written: on a busy machine all moments could fall into the start
            wait_until(partial(has_moved, out, before))
        os.kill(process, signal.SIGKILL)
        if warm.end() == -signal.SIGKILL:
            killed += 1
            states.add(state(out))
        else:  # it was quicker; another round
            assert contents(out) == expected
            shutil.rmtree(out)
    warm.finish(command(model, out, questions=6, max_new_tokens=24))
    assert contents(out) == expected
    assert len(states) >= KILLS // 2 - 1, states


def test_killed_at_every_write(warm: Warm, model: Path, tmp_path: Path) -> None:
    """At the n-th write without the end of its data, of odd ones at the next start's first too, then left in peace."""
    calm, out = tmp_path / "calm", tmp_path / "killed"
    short = partial(command, model, questions=2, max_new_tokens=8, batch_size=8)
    warm.finish(short(calm))
    expected = contents(calm)
    writes = 0
    while True:
        writes += 1
        warm.start(short(out), at=writes, torn=True)
        if warm.end() == 0:
            break
        if writes % 2:
            warm.start(short(out), at=1)
            assert warm.end() in (-signal.SIGKILL, 0)  # killed at its very last write, a run has nothing left to write
        warm.finish(short(out))
        assert contents(out) == expected, f"after a kill at write {writes}"
        shutil.rmtree(out)
    # run.json; three batches, each a shard and rows; two questions judged; scores, vectors and summary; and folders.
    assert writes - 1 > 1 + 3 * 2 + 2 + 3
    assert contents(out) == expected


def test_killed_at_every_write_while_reading_responses(warm: Warm, model: Path, tmp_path: Path) -> None:
    """Responses of a file, with two samples of each, so that the rows of a prompt stand together."""
    calm, out, responses = tmp_path / "calm", tmp_path / "killed", tmp_path / "responses.jsonl"
    trait = load_trait("optimistic")
    answers = {"positive": "All will be well, I am sure!", "negative": "No hope is left."}
    rows = [
        {"arm": arm, "question_number": question, "pair": pair, "response": f"{answer} {question}{pair}{sample}"}
        for question in range(2)
        for pair in range(len(trait.instructions))
        for sample in range(2)
        for arm, answer in answers.items()
    ]
    scored = [{**row, "score": 90 if row["arm"] == "positive" else 10} for row in rows]
    responses.write_text("".join(json.dumps(row) + "\n" for row in scored))
    warm.finish(reading(model, calm, responses))
    expected = contents(calm)
    assert {"run.json", "rollouts.jsonl", "vectors.safetensors", "summary.json"} <= expected.keys()
    assert "evidence.jsonl" not in expected
    writes = 0
    while True:
        writes += 1
        warm.start(reading(model, out, responses), at=writes, torn=True)
        if warm.end() == 0:
            break
        if writes % 2:
            warm.start(reading(model, out, responses), at=1)
            assert warm.end() in (-signal.SIGKILL, 0)
        responses = Path(shutil.move(responses, tmp_path / f"responses-{writes}.jsonl"))  # known by its content
        warm.finish(reading(model, out, responses))
        assert contents(out) == expected, f"after a kill at write {writes}"
        shutil.rmtree(out)
    shards = len([name for name in expected if name.startswith("activations/")])
    assert shards >= 5
    assert writes - 1 > 1 + 2 * shards + 3
    assert contents(out) == expected


def test_whole_processes_killed_in_every_phase(
    warm: Warm, model: Path, calm: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    """While importing, while generating, and while judging."""
    out = tmp_path / "killed"
    arguments = command(model, out, questions=6, max_new_tokens=24)

    def killed_when(reached: Callable[[], bool]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
        )
        wait_until(lambda: reached() or process.poll() is not None)
        process.kill()
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said.decode()

    began = time.monotonic()
    killed_when(lambda: time.monotonic() > began + 1)
    assert not out.exists()
    killed_when(lambda: lines(out / "rollouts.jsonl") >= 20)
    assert lines(out / "rollouts.jsonl") < 60
    killed_when(lambda: lines(out / "evidence.jsonl") >= 20)
    assert lines(out / "evidence.jsonl") < 60
    assert not (out / "summary.json").exists()
    warm.finish(arguments)
    assert contents(out) == calm[0]

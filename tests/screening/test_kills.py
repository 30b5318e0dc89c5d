"""A screening killed at any instant, ten times, ends with the same bytes as one left in peace.

Most of the killed processes are forks of one that has imported everything, so that the moments fall into the work.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from persona_lens.data.datasets import open_dataset
from persona_lens.screening import BaseResponses, Flagging, Quantity, ScreeningSettings, screen
from tests.screening import made
from tests.screening.made import jsonl, pairs, panel

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

KILLS = 10
SETTINGS = ScreeningSettings(
    base=BaseResponses.GENERATE, base_share=0.5, look_ahead=16, batch_tokens=400, max_new_tokens=4
)


def run(folder: Path, data: Path, clean: Path) -> None:
    screen(
        made.backend(),
        [open_dataset(data, label="level")],
        panel(),
        SETTINGS,
        folder=folder,
        reference=[open_dataset(clean)],
        flagging=Flagging(Quantity.RAW, 0.2),
        chat=made.chat(),
    )


def killed(folder: Path, data: Path, clean: Path, when: Callable[[], bool]) -> int:
    """Run in a fork, kill it as soon as `when` says so; how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(folder, data, clean)
            code = 0
        finally:
            os._exit(code)
    while not when() and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def scored(folder: Path) -> int:
    """Bytes of scores that a run has written."""
    file = folder / "scores.jsonl"
    return file.stat().st_size if file.exists() else 0


def moment(folder: Path, chance: random.Random, whole: int, seconds: float, by_time: bool) -> Callable[[], bool]:
    """A random instant: of the time that a run takes, or of the work that is left, which surely meets it."""
    if by_time:
        end = time.perf_counter() + chance.uniform(0.02, 0.35) * seconds
        return lambda: time.perf_counter() > end
    size = scored(folder) + chance.uniform(0.1, 0.4) * whole
    return lambda: scored(folder) >= size


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has none of its parent's others
    try:
        _kill_ten_times(tmp_path)
    finally:
        torch.set_num_threads(threads)


def _kill_ten_times(tmp_path: Path) -> None:
    rows = [*pairs(90, level=["normal", "strong"]), {"oh": 1, "level": "strong"}, *pairs(60, 3, level=["strong"])]
    data, clean = jsonl(tmp_path / "rows.jsonl", rows), jsonl(tmp_path / "clean.jsonl", pairs(40, 4))
    run(tmp_path / "warm", data, clean)
    start = time.perf_counter()
    run(tmp_path / "whole", data, clean)
    seconds = time.perf_counter() - start
    expected = contents(tmp_path / "whole")
    assert len(expected) > 8
    whole = len(expected["scores.jsonl"])
    chance, sizes = random.Random(0), list[int]()
    for attempt in range(2 * KILLS):
        folder = tmp_path / f"killed-{attempt}"
        for _ in range(KILLS):
            when = moment(folder, chance, whole, seconds, by_time=len(sizes) % 2 == 0)
            ended = killed(folder, data, clean, when)
            assert ended in (0, -signal.SIGKILL)
            if ended == 0:
                break
            sizes.append(scored(folder))
        run(folder, data, clean)
        assert contents(folder) == expected
        if len(sizes) >= KILLS:
            break
    assert len(sizes) >= KILLS
    assert len({size for size in sizes if 0 < size < whole}) > 2, "no kill met the work"

"""SIGKILL at any instant of any long work: the same command again ends with the bytes of one left in peace."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

from tests.campaign.children import child, counted, torn
from tests.campaign.counts import Counts
from tests.campaign.targets import Run, contents, differing, on_all

KILLS = 200
BY_TIME = 0.15  # of the kills; the others come before a chosen call of the system, or in the middle of a write


def attack(seed: int, size: float) -> Counts:
    """Kill 200 times at full size, on all targets in turn."""
    return on_all(seed, round(KILLS * size), _attack)


def _attack(name: str, run: Run, place: Path, kills: int, chance: random.Random, counts: Counts) -> None:
    calm, out, said, tally = place / "calm", place / "out", place / "said", place / "tally"
    calm.mkdir(parents=True)
    run(place / "warm")
    begun = time.monotonic()
    if child(partial(_counting, run, calm, tally), said) != 0:
        counts.add(name, f"it fails in peace: {said.read_text()[-300:]}")
        return
    seconds, calls, expected = time.monotonic() - begun, int(tally.read_text()), contents(calm)
    for number in range(kills):
        out.mkdir(exist_ok=True)
        if chance.random() < BY_TIME:
            how = f"after {(after := chance.uniform(0, seconds)):.3f} s"
            ended = child(partial(run, out), said, after)
        else:
            at, half = chance.randint(1, calls), chance.random() < 0.5
            how = f"{'in' if half else 'before'} call {at} of {calls}"
            ended = child(partial(_dying, run, out, at, half), said)
        failure = None
        if ended not in (0, -signal.SIGKILL):
            failure = f"ended with {ended}: {said.read_text()[-300:]}"
        if ended == 0 or number == kills - 1 or chance.random() < 0.7:  # else the next kill meets what this one left
            failure = failure or _finish(run, out, said, expected)
            shutil.rmtree(out)
        counts.add(name, f"kill {number} {how}: {failure}" if failure else None)


def _finish(run: Run, out: Path, said: Path, expected: dict[str, bytes]) -> str | None:
    if child(partial(run, out), said) != 0:
        return f"cannot go on: {said.read_text()[-300:]}"
    wrong = differing(contents(out), expected)
    return f"other bytes in {', '.join(wrong[:3])}" if wrong else None


def _counting(run: Run, folder: Path, tally: Path) -> None:
    seen = counted(lambda *_: None)
    run(folder)
    tally.write_text(str(seen[0]))


def _dying(run: Run, folder: Path, at: int, half: bool) -> None:
    write = os.write

    def before(number: int, name: str, arguments: tuple[object, ...]) -> None:
        if number == at:
            if half and name == "write":
                torn(arguments, write)
            os.kill(os.getpid(), signal.SIGKILL)

    counted(before)
    run(folder)

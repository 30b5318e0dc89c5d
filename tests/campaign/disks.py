"""Disks that are full, broken or not to be written, and links where files should be.

Each must end in one sentence of the project's own, and the same command goes on once the disk is well again.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.campaign.children import FAULTS, child, counted, fault, limited, torn
from tests.campaign.counts import Counts
from tests.campaign.kills import _counting, _finish
from tests.campaign.targets import Run, contents, on_all

FAILURES = 100
KINDS = (*(errno.errorcode[code] for code in FAULTS), "short write", "link", "file size")


def attack(seed: int, size: float) -> Counts:
    """Let 100 disks fail at full size, under all targets in turn."""
    return on_all(seed, round(FAILURES * size), _attack)


def _attack(name: str, run: Run, place: Path, faults: int, chance: random.Random, counts: Counts) -> None:
    calm, out, said, tally = place / "calm", place / "out", place / "said", place / "tally"
    calm.mkdir(parents=True)
    run(place / "warm")
    if child(partial(_counting, run, calm, tally), said) != 0:
        counts.add(name, f"it fails in peace: {said.read_text()[-300:]}")
        return
    calls, expected = int(tally.read_text()), contents(calm)
    for number in range(faults):
        out.mkdir()
        kind, at, lasting = chance.choice(KINDS), chance.randint(1, calls), chance.random() < 0.5
        ended = child(partial(_failing, run, out, kind, at, lasting), said)
        failure = _judged(ended, kind, said)
        for link in [path for path in out.rglob("*") if path.is_symlink()]:
            link.unlink()
        failure = failure or _finish(run, out, said, expected)
        shutil.rmtree(out)
        where = f"fault {number} ({kind} at call {at} of {calls}{', lasting' if lasting else ''})"
        counts.add(name, f"{where}: {failure}" if failure else None)


def _judged(ended: int, kind: str, said: Path) -> str | None:
    """What is wrong with how it ended; a disk may fail where nothing depends on it."""
    text = said.read_text() if said.exists() else ""
    if ended == 1 and "Traceback" not in text:
        return None
    return None if ended == 0 else f"ended with {ended}: {text[-400:]}"


def _failing(run: Run, folder: Path, kind: str, at: int, lasting: bool) -> None:
    if kind == "file size":
        limited(at * 20)
    else:
        counted(_before(kind, at, lasting, folder))
    run(folder)


def _before(kind: str, at: int, lasting: bool, folder: Path) -> Callable[[int, str, tuple[Any, ...]], Any]:
    write, link = os.write, os.symlink

    def before(number: int, name: str, arguments: tuple[Any, ...]) -> Any:
        if kind == "short write":
            return torn(arguments, write) if name == "write" and (number == at or (lasting and number > at)) else None
        if kind == "link":
            if number >= at and name == "open" and not (folder / "linked").exists():
                target = Path(os.fsdecode(arguments[0]))
                if target.parent.exists() and not target.exists() and target.name != ".lock":
                    (folder.parent / "precious").write_text("mine")
                    link(folder.parent / "precious", target)
            return None
        return fault(number, at, getattr(errno, kind), lasting)

    return before

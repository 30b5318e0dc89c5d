"""Runs the attacks: ``python -m tests.campaign [--only NAME] [--seed N] [--size F]``.

Exits with 1 if a promise was not kept. Sizes are those of docs/reliability.md; ``--size 0.1`` makes a tenth of them.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tests.campaign.counts import Counts

# Each is a module here with a function `attack(seed: int, size: float) -> Counts`; the longest first.
ATTACKS = ("fuzz", "kills", "disks", "peers", "requests")
AT_ONCE = 2


def main() -> int:
    """Run the chosen attacks, each in a process of its own if there are several, and print what they counted."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.campaign")
    parser.add_argument("--only", choices=ATTACKS, action="append", help="this attack alone; may be given repeatedly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=float, default=1.0, help="a fraction of the full size")
    given = parser.parse_args()
    chosen: tuple[str, ...] = tuple(given.only or ATTACKS)
    if len(chosen) == 1:
        return _attacked(chosen[0], given.seed, given.size)
    with ThreadPoolExecutor(AT_ONCE) as together:
        return int(any(together.map(lambda name: _elsewhere(name, given.seed, given.size), chosen)))


def _attacked(name: str, seed: int, size: float) -> int:
    begun = time.monotonic()
    counts: Counts = importlib.import_module(f"tests.campaign.{name}").attack(seed, size)
    took = time.monotonic() - begun
    lines = [f"{name}: {counts.total:,} attacks, {len(counts.failures)} failures, seed {seed}, {took:.0f} s"]
    lines += [f"  {target}: {tried:,}" for target, tried in counts.tried.items()]
    lines += [f"  FAILED {failure}" for failure in counts.failures]
    print("\n".join(lines), flush=True)
    return 1 if counts.failures else 0


def _elsewhere(name: str, seed: int, size: float) -> int:
    command = [sys.executable, "-m", "tests.campaign", "--only", name, "--seed", str(seed), "--size", str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

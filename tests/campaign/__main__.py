"""Runs the attacks: ``python -m tests.campaign [--only NAME] [--seed N] [--size F]``.

Exits with 1 if a promise was not kept. Sizes are those of docs/reliability.md; ``--size 0.1`` makes a tenth of them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time

from tests.campaign.counts import Counts

# Each is a module here with a function `attack(seed: int, size: float) -> Counts`.
ATTACKS = ("kills", "disks", "fuzz", "peers")


def main() -> int:
    """Run the chosen attacks one after the other and print what they counted."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.campaign")
    parser.add_argument("--only", choices=ATTACKS, action="append", help="this attack alone; may be given repeatedly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=float, default=1.0, help="a fraction of the full size")
    given = parser.parse_args()
    failed = 0
    for name in given.only or ATTACKS:
        begun = time.monotonic()
        counts: Counts = importlib.import_module(f"tests.campaign.{name}").attack(given.seed, given.size)
        took = time.monotonic() - begun
        print(f"{name}: {counts.total} attacks, {len(counts.failures)} failures, seed {given.seed}, {took:.0f} s")
        for target, tried in counts.tried.items():
            print(f"  {target}: {tried}")
        for failure in counts.failures:
            print(f"  FAILED {failure}")
        sys.stdout.flush()
        failed += len(counts.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Damaged and made-up files and texts for every reader and parser: none may raise anything but the project's error.

Each input is made from the seed, its target's name and its number alone: ``python -m tests.campaign.fuzz TARGET NUMBER
[SEED]`` makes one again, shows its beginning, and lets what it raises through.
"""

from __future__ import annotations

import gc
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from persona_lens.core.errors import PersonaLensError
from tests.campaign.attacked import Target
from tests.campaign.counts import Counts
from tests.campaign.readers import targets

INPUTS = 100_000
SECONDS = 10.0  # for one input, after which it counts as a hang
MEMORY = 2 * 2**30  # bytes beyond what the process has when it begins


class _HangError(Exception):
    pass


def attack(seed: int, size: float) -> Counts:
    """Give every reader its share of the inputs."""
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder, _bounded_memory():
        made = targets(Path(folder))
        shares = sum(target.share for target in made)
        for target in made:
            for number in range(max(1, round(INPUTS * size * target.share / shares))):
                counts.add(target.name, _tried(target, seed, number))
            gc.collect()
    return counts


def _tried(target: Target, seed: int, number: int) -> str | None:
    """What went wrong with one input; None if nothing did."""
    content = target.make(_random(target, seed, number))
    begun = time.monotonic()
    try:
        with _not_for_ever():
            target.read(content)
    except PersonaLensError as error:
        return _message_fault(str(error), target, seed, number)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/persona_lens/" in frame.filename]
        place = own[-1] if own else at
        said = f"{type(error).__name__}: {str(error)[:100]!a} in {Path(place.filename).name}:{place.lineno}"
        return f"{said} ({_again(target, seed, number)})"
    took = time.monotonic() - begun
    return f"{took:.0f} s ({_again(target, seed, number)})" if took > SECONDS else None


def _message_fault(said: str, target: Target, seed: int, number: int) -> str | None:
    if len(said) > 20_000:
        return f"an error of {len(said):,} characters ({_again(target, seed, number)})"
    return None


def _random(target: Target, seed: int, number: int) -> random.Random:
    return random.Random(f"{seed} {target.name} {number}")


def _again(target: Target, seed: int, number: int) -> str:
    return f"python -m tests.campaign.fuzz '{target.name}' {number} {seed}"


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """No more memory than there is now and `MEMORY`, where the system can say so."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _not_for_ever() -> Iterator[None]:
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_: int, frame: FrameType | None) -> None:
        raise _HangError(f"more than {SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """Make one input again."""
    name, number, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    with tempfile.TemporaryDirectory() as folder:
        target = next(each for each in targets(Path(folder)) if each.name == name)
        content = target.make(_random(target, seed, number))
        print(repr(content[:2000]))
        target.read(content)


if __name__ == "__main__":
    main()

"""`Crew`: who scores the windows: this process, or others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from persona_lens.screening.scoring import Scorer, Unit
from persona_lens.screening.windows import Window

Job = tuple[Window, int]
"""A window, and how many of its units are there already."""


@runtime_checkable
class Crew(Protocol):
    """Whoever scores windows."""

    def units(self, scorer: Scorer, jobs: Iterable[Job]) -> Iterator[Iterable[Unit]]:
        """The units of each window that are not there yet, in the order of the windows."""
        ...


@dataclass(frozen=True)
class OneProcess:
    """This process, one window after the other."""

    def units(self, scorer: Scorer, jobs: Iterable[Job]) -> Iterator[Iterable[Unit]]:
        """See `Crew`."""
        for window, skip in jobs:
            yield scorer.units(window, skip)

"""How long work reports on itself: one callback."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """What a caller passes to be told how far a piece of work is."""

    def __call__(self, done: int, total: int | None, label: str, /) -> None:
        """Take note of the state of the work.

        Args:
            done: Units done so far, those of an earlier, interrupted run included.
            total: Units in all, or None where nobody knows.
            label: What is being done. A new label is a new piece of work.
        """


def no_progress(done: int, total: int | None, label: str, /) -> None:
    """Ignore the report: the default callback."""

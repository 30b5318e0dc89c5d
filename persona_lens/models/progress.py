"""How long work reports on itself: one callback, and a terminal bar that is such a callback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Progress", "no_progress", "rich_progress"]


class Progress(Protocol):
    """What a caller passes to be told how far a download or a conversion is."""

    def __call__(self, done: int, total: int | None, label: str, /) -> None:
        """Take note of the state of the work.

        Args:
            done: Bytes done so far, those of an earlier, interrupted run included.
            total: Bytes in all, or None where nobody knows.
            label: What is being done, in a few words. A new label is a new piece of work.
        """


def no_progress(done: int, total: int | None, label: str, /) -> None:
    """Ignore the report: the default callback."""


@contextmanager
def rich_progress(console: Console | None = None) -> Iterator[Progress]:
    """Show progress as bars in the terminal, one for each label.

    Args:
        console: Where to draw; a console on standard error by default, so that piped output stays clean.

    Yields:
        The callback to pass as ``progress=``.
    """
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TimeRemainingColumn(),
    )
    shown: dict[str, bars.TaskID] = {}
    with bars.Progress(*columns, console=console or Console(stderr=True)) as display:

        def report(done: int, total: int | None, label: str, /) -> None:
            if label not in shown:
                shown[label] = display.add_task(label, total=total)
            display.update(shown[label], completed=done, total=total)

        yield report

"""What the terminal shows: progress with rates and time left, tables, and quiet libraries."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import typer

from persona_lens.core.text import escaped, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, Task
    from rich.table import Table
    from rich.text import Text

    from persona_lens.core.progress import Progress
    from persona_lens.core.statistics import Estimate


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice out of the display."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


class _Status:
    """What a server said last; shown beside the bars."""

    text = ""


def show_status(text: str) -> None:
    """Show what a server says of a request; from any thread."""
    text = printable(text)
    changed, _Status.text = text != _Status.text, text
    if changed and not console(stderr=True).is_terminal:
        print(f"server: {text}", file=sys.stderr, flush=True)


@contextmanager
def showing_progress(*, of_bytes: bool = False, screen: Console | None = None) -> Iterator[Progress]:
    """Bars on standard error, one for each label; plain lines where that is not a terminal.

    Args:
        of_bytes: The units are bytes.
        screen: Where to draw; standard error by default, so that piped output stays clean.

    Yields:
        The callback for ``progress=``.
    """
    from rich import progress as rich_progress
    from rich.progress import Progress as Bars

    screen = screen or console(stderr=True)
    if not screen.is_terminal:
        yield _LineProgress()
        return
    amounts: tuple[ProgressColumn, ...] = (rich_progress.MofNCompleteColumn(), _rate_column())
    if of_bytes:
        amounts = (rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn())
    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        *amounts,
        rich_progress.TimeRemainingColumn(),
        _status_column(),
    )
    with Bars(*columns, console=screen) as bars:
        tasks = {}

        def report(done: int, total: int | None, label: str, /) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(printable(label), total=total, completed=done)
            bars.update(tasks[label], completed=done, total=total)

        yield report


def _rate_column() -> ProgressColumn:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.1f}/s" if speed else "")

    return Rate()


def _status_column() -> ProgressColumn:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Status(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            return Text("" if task.finished else _Status.text, style="dim")

    return Status()


class _LineProgress:
    """One line at the beginning and the end of each piece of work, and at every tenth between."""

    def __init__(self) -> None:
        self._shown: dict[str, int] = {}

    def __call__(self, done: int, total: int | None, label: str, /) -> None:
        tenth = done * 10 // total if total else 0
        if self._shown.get(label) != tenth:
            self._shown[label] = tenth
            print(f"{printable(label)}: {done:,}{f' of {total:,}' if total else ''}", file=sys.stderr, flush=True)


def say(text: str = "", *, err: bool = False, nl: bool = True, **style: Any) -> None:
    """A line on standard output or error, whatever it holds; styles are those of `typer.secho`."""
    typer.secho(printable(text), err=err, nl=nl, **style)


def say_json(value: object, *, indent: int | None = None) -> None:
    """JSON on standard output, with escapes for what a terminal would not show."""
    plain = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") != "utf8"
    typer.echo(escaped(json.dumps(value, indent=indent, ensure_ascii=plain)))


@cache
def _console_class() -> type[Console]:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Harmless(Console):
        """Takes nothing in a text for markup or emoji, and shows what would act on the terminal."""

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    return Harmless


def console(*, stderr: bool = False, **options: Any) -> Console:
    """Where tables, panels and heat maps are printed, with whatever texts of others are in them."""
    return _console_class()(stderr=stderr, markup=False, emoji=False, highlight=False, **options)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; numbers to the right."""
    from rich.table import Table

    table: Table = Table(title=printable(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(printable(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    console().print(table)


def interval_text(
    found: Estimate | Mapping[str, Any] | None, digits: int = 1, *, sign: bool = True, noun: str = "question"
) -> str:
    """A mean with its 95% interval for a table's cell, and beside it that it rests on few questions, if it does.

    Args:
        found: An `Estimate`, or its JSON values; None is a dash.
        digits: Decimals.
        sign: Whether a plus is written.
        noun: What the interval is over.
    """
    from persona_lens.core.statistics import few

    if found is None:
        return "-"
    values = found if isinstance(found, Mapping) else found.to_json()
    form = f"{'+' if sign else ''}.{digits}f"
    mean, low, high = (format(values[name], form) for name in ("mean", "low", "high"))
    said = few(values["n"], noun)
    return f"{mean} [{low}, {high}]{f' ({said})' if said else ''}"

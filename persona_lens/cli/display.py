"""What the terminal shows: progress with rates and time left, tables, and quiet libraries."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from persona_lens.core.text import escaped, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, Task
    from rich.table import Table

    from persona_lens.core.progress import Progress


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
    amounts: tuple[ProgressColumn, ...] = (_column(_amount), _column(_rate))
    if of_bytes:
        amounts = (rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn())
    columns = (
        rich_progress.SpinnerColumn(finished_text=" "),  # turns while a batch takes its time and no number moves
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        *amounts,
        rich_progress.TimeRemainingColumn(),
        _column(lambda task: "" if task.finished else _Status.text, style="dim"),
    )
    with Bars(*columns, console=screen, refresh_per_second=5) as bars:
        tasks = {}

        def report(done: int, total: int | None, label: str, /) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(printable(label), total=total, completed=done)
            bars.update(tasks[label], completed=done, total=total)

        yield report


def _column(text: Callable[[Task], str], style: str = "") -> ProgressColumn:
    """A column that is drawn anew twice a second."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Shown(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            return Text(text(task), style)

    return Shown()


def _amount(task: Task) -> str:
    """How much is done; nothing of work that is not counted."""
    if task.total is None and not task.completed:
        return ""
    return f"{int(task.completed)}/{'?' if task.total is None else int(task.total)}"


def _rate(task: Task) -> str:
    speed = task.finished_speed or task.speed
    return f"{speed:,.1f}/s" if speed else ""


class _LineProgress:
    """One line at the beginning and the end of each piece of work, and at every tenth between."""

    def __init__(self) -> None:
        self._shown: dict[str, int] = {}

    def __call__(self, done: int, total: int | None, label: str, /) -> None:
        tenth = done * 10 // total if total else 0
        if self._shown.get(label) != tenth:
            self._shown[label] = tenth
            counted = f": {done:,} of {total:,}" if total else f": {done:,}" if done or total == 0 else ""
            print(f"{printable(label)}{counted}", file=sys.stderr, flush=True)


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


def print_plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without lines for a terminal; in a file or a pipe whole lines whatever the width, and nothing but text.

    A row that begins with FAILED is red.
    """
    if sys.stdout.isatty():
        from rich.table import Table
        from rich.text import Text

        table = Table(*head, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for row in rows:
            style = "red" if row[0] == "FAILED" else ""
            table.add_row(*(Text(cell) for cell in row), style=style)  # Text: a folder called [x] is no markup
        console().print(table)
        return
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


Row = TypeVar("Row")
What = str | Callable[[Row], Any]
Column = What[Row] | tuple[What[Row], str]


def show_rows(title: str, rows: Iterable[Row], columns: Mapping[str, Column[Row]]) -> None:
    """A table on standard output.

    Args:
        title: Stands above it.
        rows: What each row is of.
        columns: Under each heading what it holds of a row: a function, or fields such as ``score.mean``. And where
            that is a number or an interval, the form in which it is written, ``+.1f`` for intervals unless said.
    """
    taken = [column if isinstance(column, tuple) else (column, "+.1f") for column in columns.values()]
    cells = [tuple(cell(_held(row, what), form) for what, form in taken) for row in rows]
    print_table(title, tuple(columns), cells)


def _held(row: Row, what: What[Row]) -> Any:
    if not isinstance(what, str):
        return what(row)
    found: Any = row
    for name in what.split("."):
        if found is not None:
            found = found[name] if isinstance(found, Mapping) else getattr(found, name)
    return found


def cell(value: Any, form: str = "+.1f") -> str:
    """What a table shows of a value: a text as it is, a whole number plainly, yes or no, a dash for nothing."""
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    return number(value, form) if isinstance(value, float) else interval_text(value, form)


def number(value: float | None, form: str) -> str:
    """A number, without negative zeros; a dash for none."""
    if value is None or not isfinite(value):
        return "-"
    return format(float(format(value, form.replace("+", "").replace(",", ""))) + 0.0, form)


def interval_text(found: Any, form: str = "+.1f", noun: str | None = "question") -> str:
    """A number with its 95% interval, and beside it that it rests on few questions, if it does: `12.3 [4.5, 6.7]`.

    Args:
        found: An `Estimate`, another number with ends, or the JSON values of one; None is a dash.
        form: How numbers are written.
        noun: What the interval is over; None leaves out on how many it rests.
    """
    from persona_lens.core.statistics import few

    if found is None:
        return "-"
    values = found if isinstance(found, Mapping) else asdict(found)
    middle = values["mean"] if "mean" in values else values["value"]
    if middle is None or values["low"] is None:
        return number(middle, form)
    said = few(values["n"], noun) if noun else ""
    return f"{number(middle, form)} [{number(values['low'], form)}, {number(values['high'], form)}]" + (
        f" ({said})" if said else ""
    )


READINGS: Mapping[str, Column[Any]] = {
    "trait": "trait",
    "layer": "layer",
    "tokens": "tokens",
    "before it": ("prompt_last", "+.2f"),
    "mean": ("mean", "+.2f"),
    "highest": ("highest", "+.2f"),
}
"""What is said of a turn of a conversation."""
PARTS: Mapping[str, Column[Any]] = {"thinking": ("thinking_mean", "+.2f"), "answer": ("answer_mean", "+.2f")}


def readings_columns(readings: Iterable[Any]) -> Mapping[str, Column[Any]]:
    """What is said of turns of a conversation, and of their thinking and answers where these can be told apart."""
    apart = any(each.thinking_mean is not None for each in readings)
    return {**READINGS, **PARTS} if apart else READINGS

"""The command line: a thin face over the library."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import TextIOWrapper
from types import FrameType
from typing import Annotated

import typer

from persona_lens.cli.commands import COMMANDS, Group, lazily
from persona_lens.cli.display import say
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import sentence
from persona_lens.core.progress import is_kept, show_plainly

INTERRUPTED = 130  # what typer exits with after Ctrl-C
TERMINATED = 128 + signal.SIGTERM


app = typer.Typer(
    name="persona-lens",
    help="Find, read and control character traits in language models with persona vectors.",
    epilog="Start with `persona-lens demo`: it needs no GPU, no key and no other model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        from persona_lens import __version__

        say(f"persona-lens {__version__}")
        raise typer.Exit


@app.callback(cls=lazily(Group("", COMMANDS)))
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of an error. Works anywhere.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help="Go on with a run that began with other settings or versions, and note it in its folder. Works "
            "anywhere.",
        ),
    ] = False,
) -> None:
    """Find, read and control character traits in language models with persona vectors."""


def main() -> None:
    """Run the command line; errors that the user can mend are printed without a traceback."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--debug", "--accept-changes")]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    show_plainly()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what the terminal's encoding lacks is shown by code
            stream.reconfigure(errors="backslashreplace")
    try:
        with _stopping() as stopped, _accepting():
            app(arguments)
    except Exception as error:  # noqa: BLE001 - that of a bug is shown whole, but harmlessly
        said = None if debug else _sentence(error)
        say("".join(traceback.format_exception(error)).rstrip() if said is None else f"error: {said}", err=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            goes_on = "; what was finished is saved, and the same command goes on from there" if is_kept() else ""
            say(f"stopped{goes_on}", err=True)
        if stop.code == INTERRUPTED and stopped:
            sys.exit(TERMINATED)
        raise


def _sentence(error: Exception) -> str | None:
    """What the user can do about an error; None for one that is a bug."""
    if isinstance(error, OSError):
        return sentence(error, error.filename or "a file", "used")
    return str(error) if isinstance(error, PersonaLensError) else None


def _accepting() -> AbstractContextManager[None]:
    if "--accept-changes" not in sys.argv:
        return nullcontext()
    from persona_lens.runs import accepting_changes

    return accepting_changes()


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """While open, SIGTERM does what Ctrl-C does; the list says whether it came."""
    came: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)

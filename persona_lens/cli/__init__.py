"""The command line: a thin face over the library."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import TextIOWrapper
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from persona_lens.characters import printable
from persona_lens.cli.backends import app as backends_app
from persona_lens.cli.demo import demo
from persona_lens.cli.display import say
from persona_lens.cli.dissect import dissect
from persona_lens.cli.extract import extract
from persona_lens.cli.finetune import finetune_command
from persona_lens.cli.finetune_study import finetune_study_command
from persona_lens.cli.generate import generate
from persona_lens.cli.judge import app as judge_app
from persona_lens.cli.monitor import app as monitor_app
from persona_lens.cli.remote import app as remote_app
from persona_lens.cli.responses import responses
from persona_lens.cli.screen import screen
from persona_lens.cli.shift import shift_command
from persona_lens.cli.steer import app as steer_app
from persona_lens.cli.traits import app as traits_app
from persona_lens.cli.vectors import app as vectors_app
from persona_lens.errors import PersonaLensError
from persona_lens.files import sentence
from persona_lens.notes import show_plainly
from persona_lens.runs import accepting_changes

INTERRUPTED = 130  # what typer exits with after Ctrl-C
TERMINATED = 128 + signal.SIGTERM


class _Commands(TyperGroup):
    """Shows what was typed harmlessly where it is quoted as wrong."""

    def make_context(self, *given: Any, **options: Any) -> Any:
        with _printable_errors():
            return super().make_context(*given, **options)

    def invoke(self, *given: Any, **options: Any) -> Any:
        with _printable_errors():
            return super().invoke(*given, **options)


@contextmanager
def _printable_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None)
        if hasattr(error, "format_message") and isinstance(message, str):  # typer's errors have no common public type
            error.message = printable(message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    name="persona-lens",
    cls=_Commands,
    help="Find, read and control character traits in language models with persona vectors.",
    epilog="Start with `persona-lens demo`: it needs no GPU, no key and no other model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(extract)
app.command()(generate)
app.command()(responses)
app.command()(dissect)
app.command("finetune")(finetune_command)
app.command("finetune-study")(finetune_study_command)
app.command("shift")(shift_command)
app.command()(screen)
app.add_typer(steer_app)
app.add_typer(vectors_app)
app.add_typer(judge_app)
app.add_typer(monitor_app)
app.add_typer(traits_app)
app.add_typer(backends_app)
app.add_typer(remote_app)


def _version(value: bool) -> None:
    if value:
        from persona_lens import __version__

        say(f"persona-lens {__version__}")
        raise typer.Exit


@app.callback()
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
    accepting = accepting_changes() if "--accept-changes" in sys.argv else nullcontext()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what the terminal's encoding lacks is shown by code
            stream.reconfigure(errors="backslashreplace")
    try:
        with _stopping() as stopped, accepting:
            app(arguments)
    except Exception as error:  # noqa: BLE001 - that of a bug is shown whole, but harmlessly
        said = None if debug else _sentence(error)
        say("".join(traceback.format_exception(error)).rstrip() if said is None else f"error: {said}", err=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            say("stopped; what was finished is saved, and the same command goes on from there", err=True)
        if stop.code == INTERRUPTED and stopped:
            sys.exit(TERMINATED)
        raise


def _sentence(error: Exception) -> str | None:
    """What the user can do about an error; None for one that is a bug."""
    if isinstance(error, OSError):
        return sentence(error, error.filename or "a file", "used")
    return str(error) if isinstance(error, PersonaLensError) else None


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

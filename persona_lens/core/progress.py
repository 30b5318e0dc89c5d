"""How long work reports on itself, and what a user should know though nothing is wrong."""

from __future__ import annotations

import sys
import warnings
from typing import Any, Protocol, runtime_checkable

from persona_lens.core.text import printable


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
    """Ignore the report."""


class _Bars:
    """A bar for each piece of work that is going on."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, done: int, total: int | None, label: str, /) -> None:
        if not somebody_looks():
            return
        bar = self._bars.get(label)
        if bar is not None and (done < bar.n or total != bar.total):  # what an error ended was begun anew
            self._bars.pop(label).close()
            bar = None
        if bar is None:
            bar = self._bars[label] = _new_bar(done, total, label)
        bar.update(done - bar.n)
        if total is not None and done >= total:
            self._bars.pop(label).close()


def _new_bar(done: int, total: int | None, label: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of notebooks without widgets
        from tqdm.auto import tqdm
    return tqdm(total=total, initial=done, desc=label)


def somebody_looks() -> bool:
    """Whether standard error is a terminal, or the output of a notebook's cell."""
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


shown_progress: Progress = _Bars()
"""Show a bar on standard error where somebody looks, a terminal or a notebook; elsewhere nothing. The default."""


class _Kept:
    """Whether what was done by now is in a file from which the same work goes on."""

    yes = False


def keeping() -> None:
    """Take note that this process keeps what it finishes, so that the same command goes on from there."""
    _Kept.yes = True


def is_kept() -> bool:
    """Whether the same command goes on from there."""
    return _Kept.yes


class PersonaLensNote(UserWarning):
    """What is said; filters of the module `warnings` show or silence it as they do any warning."""


def note(text: str) -> None:
    """Say something; the same text is shown only once, whoever says it."""
    warnings.warn(text, PersonaLensNote, stacklevel=1)  # of this place: Python shows a text once for each place


def show_plainly() -> None:
    """From now on, show notes as a command line does, without the place in the code; other warnings stay."""
    usual = warnings.showwarning

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if issubclass(category, PersonaLensNote):
            print(f"note: {printable(str(message))}", file=sys.stderr)
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = show

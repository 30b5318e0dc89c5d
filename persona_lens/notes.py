"""`note`: what a user should know though nothing is wrong; said once, on standard error."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from persona_lens.characters import printable


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

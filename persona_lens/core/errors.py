"""The one base class of every error this package raises on purpose, and the words of the errors of others."""

from __future__ import annotations

from persona_lens.core.text import without_secrets

LONGEST = 4000
"""Characters of a message; what is longer quotes a file."""


class PersonaLensError(Exception):
    """Something the caller can put right; the message says how.

    The command line prints the message without a traceback (``--debug`` adds it). Anything else that escapes is a
    bug of this package. Addresses in it are shown without the passwords and keys that may stand in them, and of a
    message that quotes more than anybody reads the middle is left out: what to do stands at its end.
    """

    def __str__(self) -> str:
        said = without_secrets(super().__str__())
        return said if len(said) <= LONGEST else f"{said[: LONGEST - 500]} […] {said[-500:]}"


class ModelError(PersonaLensError):
    """A model cannot be found, fetched, loaded or talked to; the message says what to do about it."""


def in_words(error: BaseException) -> str:
    """What an error says: the whole message of one of ours, of another its name and first line."""
    return str(error) if isinstance(error, PersonaLensError) else f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line: the first of its message, or else its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

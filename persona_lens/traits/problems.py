"""What is wrong with a file that defines something, and the errors that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import in_short
from persona_lens.traits.definition import Loc


class Severity(StrEnum):
    """How bad a finding is: an error makes the definition unusable, a warning does not."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Problem:
    """One finding about one file.

    Attributes:
        file: The file's path as the user would type it, or a name in angle brackets for text without a file.
        line: 1-based line, or None when the finding is about the file as a whole.
        field: The field as people read it (``instructions #2 positive``), or an empty string.
        message: What is wrong and how to put it right.
        severity: Whether the definition can be used all the same.
    """

    file: str
    line: int | None
    field: str
    message: str
    severity: Severity = Severity.ERROR

    def __str__(self) -> str:
        """``file:line: field: message``, a form that terminals and editors turn into a link."""
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.field, self.message) if part)

    def to_json(self) -> dict[str, int | str | None]:
        """Where in its file it is, and what it says."""
        return {"line": self.line, "field": self.field, "message": self.message}


class DefinitionError(PersonaLensError):
    """What a file defines could not be found, read or accepted.

    Args:
        message: The whole message, every problem included.
        problems: The problems one by one, for callers that lay them out themselves.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def at(cls, file: str, line: int | None, message: str, field: str = "") -> Self:
        """Build the error for a file that has one problem."""
        return cls.from_problems([Problem(file, line, field, message)])

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> Self:
        """Build the error for a file that has the given problems, in the order of their lines."""
        ordered = sorted(problems, key=lambda problem: problem.line or 0)
        return cls("\n".join(str(problem) for problem in ordered), ordered)


class TraitError(DefinitionError):
    """A trait could not be found, read or accepted."""


class RoleError(DefinitionError):
    """A role, or the default Assistant, could not be found, read or accepted."""


def field_name(loc: Loc) -> str:
    """Write a location the way people count.

    Example:
        >>> field_name(("instructions", 1, "positive"))
        'instructions #2 positive'
    """
    return " ".join(f"#{part + 1}" if isinstance(part, int) else in_short(part) for part in loc)

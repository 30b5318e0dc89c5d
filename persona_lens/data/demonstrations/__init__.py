"""Demonstrations: replies that show a trait not at all, mildly or strongly, written for this project and labelled.

For each of two traits there are 64 everyday prompts, none of them a question of the trait, and each has one reply of
every level. Neither the subject nor the length of a reply tells its level, and for *optimistic* neither does its
register: every reply is in the whole sentences of an assistant, those that are carried by the trait with its
enthusiasm. The files are chat messages in JSONL, as data screening and finetuning read them. Importing this package
loads no model library.

Example:
    >>> from persona_lens.data.demonstrations import Level, demonstration
    >>> len(demonstration("optimistic", Level.STRONG))
    64
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from persona_lens.core.errors import PersonaLensError
from persona_lens.data.tables import read_rows

__all__ = [
    "DemonstrationError",
    "DemonstrationRow",
    "Level",
    "demonstration",
    "demonstration_names",
    "demonstration_path",
]

_FOLDER = Path(__file__).parent


class DemonstrationError(PersonaLensError):
    """There is no such demonstration set, or no such level."""


class Level(StrEnum):
    """How much of the trait a reply shows, from the least."""

    NORMAL = "normal"
    """Helpful and matter-of-fact; neither the trait nor its opposite."""
    MILD = "mild"
    """As helpful, with a clear touch of the trait."""
    STRONG = "strong"
    """The trait carries the whole reply."""


@dataclass(frozen=True)
class DemonstrationRow:
    """One prompt and one reply to it.

    Attributes:
        id: Unique over all sets: trait, number of the prompt, level.
        trait: Name of the trait, as `persona_lens.traits.load_trait` knows it.
        level: How much of the trait the reply shows.
        prompt: What the user says; the same text at every level.
        response: What the assistant replies.
    """

    id: str
    trait: str
    level: Level
    prompt: str
    response: str

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in the file."""
        messages = [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.response}]
        return {"id": self.id, "trait": self.trait, "level": self.level.value, "messages": messages}


def demonstration_names() -> tuple[str, ...]:
    """The traits for which there is a demonstration set, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.jsonl")))


def demonstration_path(trait: str) -> Path:
    """Find the file of a demonstration set, to be used wherever a file of chat messages is.

    Args:
        trait: Name of the trait.

    Raises:
        DemonstrationError: There is no set for this trait.
    """
    names = demonstration_names()
    if trait not in names:
        raise DemonstrationError(f"there is no demonstration set for the trait {trait!r}; there are {_listed(names)}")
    return _FOLDER / f"{trait}.jsonl"


def demonstration(trait: str, level: Level | str | None = None) -> tuple[DemonstrationRow, ...]:
    """Read a demonstration set.

    Args:
        trait: Name of the trait.
        level: The level to keep, or None for all of them.

    Returns:
        The rows in the file's order: prompt by prompt, and for each prompt from normal to strong.

    Raises:
        DemonstrationError: There is no set for this trait, or no such level.
    """
    path = demonstration_path(trait)
    if level is not None and level not in tuple(Level):
        raise DemonstrationError(f"there is no level {str(level)!r}; a demonstration set has {_listed(tuple(Level))}")
    return tuple(row for row in _rows(path) if level is None or row.level == level)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


@cache
def _rows(path: Path) -> tuple[DemonstrationRow, ...]:
    return tuple(_parsed(path))


def _parsed(path: Path) -> Iterator[DemonstrationRow]:
    for _, row in read_rows(path):
        user, assistant = row["messages"]
        yield DemonstrationRow(row["id"], row["trait"], Level(row["level"]), user["content"], assistant["content"])

"""`Source`: where the rows of a dataset come from: a file, a folder, the hub, the demonstrations that come with this.

Rows are read one at a time, the bad ones too. Demonstrations are replies that show a trait not at all, mildly or
strongly, written for this project and labelled: for each of two traits there are 64 everyday prompts, none of them a
question of the trait, and each has one reply of every level. Neither the subject nor the length of a reply tells its
level, and for *optimistic* neither does its register: every reply is in the whole sentences of an assistant, those that
are carried by the trait with its enthusiasm. The files are chat messages in JSONL.

Example:
    >>> from persona_lens.data.sources import Level, demonstration
    >>> len(demonstration("optimistic", Level.STRONG))
    64
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from persona_lens.core.errors import first_line
from persona_lens.core.files import sha256_of
from persona_lens.core.plugins import install_command
from persona_lens.data.tables import DataError, RawRow, all_rows, read_rows

_FOLDER = Path(__file__).parent / "demonstrations"


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
        DataError: There is no set for this trait.
    """
    names = demonstration_names()
    if trait not in names:
        raise DataError(f"there is no demonstration set for the trait {trait!r}; there are {_listed(names)}")
    return _FOLDER / f"{trait}.jsonl"


def demonstration(trait: str, level: Level | str | None = None) -> tuple[DemonstrationRow, ...]:
    """Read a demonstration set.

    Args:
        trait: Name of the trait.
        level: The level to keep, or None for all of them.

    Returns:
        The rows in the file's order: prompt by prompt, and for each prompt from normal to strong.

    Raises:
        DataError: There is no set for this trait, or no such level.
    """
    path = demonstration_path(trait)
    chosen = None if level is None else _level(level)
    return tuple(row for row in _rows(path) if chosen in (None, row.level))


def _level(name: str) -> Level:
    if name not in tuple(Level):
        raise DataError(f"there is no level {str(name)!r}; a demonstration set has {_listed(tuple(Level))}")
    return Level(name)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


@cache
def _rows(path: Path) -> tuple[DemonstrationRow, ...]:
    return tuple(
        DemonstrationRow(row["id"], row["trait"], Level(row["level"]), *(each["content"] for each in row["messages"]))
        for _, row in read_rows(path)
    )


HUB = "hf:"
DEMONSTRATION = "demonstration:"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".gz", ".zst", ".csv", ".tsv", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class FileSource:
    """A JSONL, JSON, CSV or Parquet file.

    Attributes:
        path: The file.
        label: What it is called, if not by its path.
        level: The only level of a demonstration set that is read; None for all.
    """

    path: Path
    label: str = ""
    level: Level | None = None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.label or str(self.path)

    @property
    def stem(self) -> str:
        """What files about it are called."""
        return self.path.stem if self.level is None else f"{self.path.stem}-{self.level}"

    def rows(self) -> Iterator[RawRow]:
        """Every row, the bad ones too; the same in the same order each time."""
        own = filter(self.takes, all_rows(self.path))
        return own if self.level is None else (replace(row, number=number) for number, row in enumerate(own))

    def takes(self, row: RawRow) -> bool:
        """Whether a row of the file is one of these."""
        return self.level is None or (row.values or {}).get("level") == self.level

    def count(self) -> int | None:
        """How many rows there are, bad ones included; None where lines are not rows, or are not quickly counted."""
        if self.level is not None:
            return sum(1 for _ in self.rows())
        suffix = self.path.suffix.lower()
        if suffix == ".parquet":
            from pyarrow.parquet import read_metadata

            return int(read_metadata(self.path).num_rows)
        if suffix not in (".jsonl", ".ndjson"):
            return None
        with self.path.open("rb") as stream:
            return sum(bool(line.strip()) for line in stream)

    def describe(self) -> dict[str, Any]:
        """What tells it from others, as JSON values, part of a run's configuration: its content, not its place."""
        own = {} if self.level is None else {"level": self.level.value}
        return {"file": self.path.name, "sha256": self._digest, **own}

    @cached_property
    def _digest(self) -> str:
        return sha256_of(self.path)


@dataclass(frozen=True)
class LibrarySource:
    """A dataset that Hugging Face's library ``datasets`` reads: of the hub, a folder of files, or one saved to disk.

    Attributes:
        place: Id on the hub, or a folder.
        split: Which split.
        subset: Which configuration, for datasets that have several.
    """

    place: str
    split: str = "train"
    subset: str | None = None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.place} ({self.split})"

    @property
    def stem(self) -> str:
        """What files about it are called."""
        return f"{Path(self.place).name}-{self.split}"

    @property
    def saved(self) -> bool:
        """Whether it is a folder that ``save_to_disk`` wrote."""
        folder = Path(self.place)
        return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))

    @cached_property
    def loaded(self) -> Any:
        """The library's object: streaming, unless it lies on the disk as it is used."""
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"{self.name}: reading datasets of the hub and folders needs the library datasets: "
                + install_command("datasets")
            ) from error
        try:
            if not self.saved:
                return datasets.load_dataset(self.place, self.subset, split=self.split, streaming=True)
            found = datasets.load_from_disk(self.place)
            return found[self.split] if isinstance(found, datasets.DatasetDict) else found
        except Exception as error:
            raise DataError(f"{self.name} cannot be opened by the library datasets: {first_line(error)}") from error

    def rows(self) -> Iterator[RawRow]:
        """Every row; the same in the same order each time."""
        number = 0
        try:
            for number, values in enumerate(self.loaded):
                yield RawRow(number, number + 1, values)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self.name}: after row {number + 1}: {first_line(error)}") from error

    def count(self) -> int | None:
        """How many rows there are; None where the library does not know."""
        if self.saved:
            return len(self.loaded)
        splits = self.loaded.info.splits or {}
        found = getattr(splits.get(self.split), "num_examples", None)
        return int(found) if found else None

    def describe(self) -> dict[str, Any]:
        """What tells it from others, as JSON values, part of a run's configuration."""
        folder = Path(self.place)
        return {"dataset": folder.name if folder.is_dir() else self.place, "split": self.split, "subset": self.subset}


Source = FileSource | LibrarySource
"""Where the rows of a dataset come from."""


def find_source(data: str | Path, *, split: str = "train", subset: str | None = None) -> Source:
    """Find out what a dataset's name means.

    Args:
        data: A JSONL, CSV or Parquet file; a folder, with such files or written by ``save_to_disk``; ``OWNER/NAME``
            (or ``hf:NAME``) on the Hugging Face hub; or ``demonstration:TRAIT``, the set that comes with the package,
            with ``/LEVEL`` behind it for one level.
        split: Of a folder or a dataset of the hub.
        subset: Configuration, of the same.

    Raises:
        DataError: If it is none of these; or if a file's name does not say what it is.
    """
    text, path = str(data), Path(data)
    if text.startswith(DEMONSTRATION):
        trait, slash, level = text.removeprefix(DEMONSTRATION).partition("/")
        return FileSource(demonstration_path(trait), text, _level(level) if slash else None)
    if text.startswith(HUB):
        return LibrarySource(text.removeprefix(HUB), split, subset)
    if path.is_dir():
        return LibrarySource(str(path), split, subset)
    if path.exists() or path.suffix.lower() in SUFFIXES:
        all_rows(path)  # checks that it is there, and its name
        return FileSource(path)
    if _HUB_ID.fullmatch(text):
        return LibrarySource(text, split, subset)
    raise DataError(
        f"there is no file or folder {text!r}; a dataset is a JSONL, CSV or Parquet file, a folder, OWNER/NAME or "
        "hf:NAME on the Hugging Face hub, or demonstration:TRAIT or demonstration:TRAIT/LEVEL"
    )

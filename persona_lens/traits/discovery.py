"""The traits there are: names to files, the nearest source winning, and what went wrong on the way."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from persona_lens.core.text import in_short
from persona_lens.traits.document import TraitError
from persona_lens.traits.parsing import read_trait
from persona_lens.traits.schema import Trait
from persona_lens.traits.sources import SUFFIXES, Located, Source, SourceKind, SourceProblem, locate_all


@dataclass(frozen=True)
class TraitFile:
    """A trait file that was found; it is not read before `read` is called.

    Attributes:
        name: The trait's name, which is the file's name without its ending.
        source: Where the file was found.
        location: The file, on disk or inside an installed package.
    """

    name: str
    source: Source
    location: Traversable

    @property
    def path(self) -> str:
        """The file's path."""
        return str(self.location)

    def read(self) -> Trait:
        """Read the file.

        Raises:
            TraitError: The file cannot be read or is no trait.
        """
        return read_trait(self.location)


@dataclass(frozen=True)
class Shadowed:
    """A definition that is not used, because a nearer source defines the same name.

    Attributes:
        used: The definition in use.
        hidden: The definition that it hides.
        identical: Whether both would give the same results.
    """

    used: TraitFile
    hidden: TraitFile
    identical: bool

    def __str__(self) -> str:
        likeness = "the same content" if self.identical else "other content"
        return (
            f"trait {self.used.name}: {self.used.path} ({self.used.source.kind}) is used; it hides "
            f"{self.hidden.path} ({self.hidden.source.kind}), which has {likeness}"
        )


@dataclass(frozen=True)
class Catalogue:
    """All traits within reach.

    Attributes:
        files: One file for each name, by name.
        shadowed: The definitions that are not used, by name.
        problems: The sources that could not be read.
    """

    files: tuple[TraitFile, ...]
    shadowed: tuple[Shadowed, ...]
    problems: tuple[SourceProblem, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the traits, sorted; a file that turns out broken has a name all the same."""
        return tuple(file.name for file in self.files)

    def find(self, name: str) -> TraitFile:
        """Find a trait's file.

        Raises:
            TraitError: There is no such trait; the message lists those there are.
        """
        for file in self.files:
            if file.name == name:
                return file
        raise TraitError(self._unknown(name))

    def warnings(self, names: Iterable[str] | None = None) -> list[str]:
        """Say what a user should know about these traits: shadowed definitions and sources that failed.

        Args:
            names: The traits in question; all of them when left out.
        """
        wanted = set(self.names if names is None else names)
        hidden = [str(shadowed) for shadowed in self.shadowed if shadowed.used.name in wanted]
        return [*hidden, *map(str, self.problems)]

    def _unknown(self, name: str) -> str:
        close = difflib.get_close_matches(name.lower(), self.names, n=1)
        lines = [f"there is no trait {in_short(name)!r}" + (f"; did you mean {close[0]}?" if close else "")]
        lines.append(f"Available: {', '.join(self.names) or 'none'}")
        lines += [f"Not searched: {problem}" for problem in self.problems]
        lines.append("A trait of your own: `persona-lens traits new NAME`")
        return "\n".join(lines)


def find_traits(traits_dirs: Sequence[str | Path] = ()) -> Catalogue:
    """Find every trait within reach.

    Sources, from far to near, are the built-in traits, installed packages (entry points of the group
    ``persona_lens.traits``), the user's folder (see `user_folder`), ``./traits``, and ``traits_dirs``. The
    nearest definition of a name wins. Files are listed without being read, so a broken one does no harm until
    it is used.

    Args:
        traits_dirs: More folders; the last one is the nearest of all.

    Raises:
        TraitError: One of ``traits_dirs`` is no folder.
    """
    located = locate_all(traits_dirs)
    definitions = _definitions(located)
    files, shadowed = [], []
    for name in sorted(definitions):
        used, hidden = _choose(definitions[name])
        files.append(used)
        shadowed += [Shadowed(used, other, _identical(used, other)) for other in hidden]
    problems = tuple(place.problem for place in located if place.problem is not None)
    return Catalogue(tuple(files), tuple(shadowed), problems)


def load_trait(name_or_path: str | os.PathLike[str], traits_dirs: Sequence[str | Path] = ()) -> Trait:
    """Load a trait by its name, or from a YAML file.

    Args:
        name_or_path: A name such as ``optimistic``, or a path: anything with a ``/`` in it, or that ends in
            ``.yaml`` or ``.yml``.
        traits_dirs: More folders to find names in; see `find_traits`.

    Raises:
        TraitError: There is no such trait or file, or it is broken.

    Example:
        >>> load_trait("optimistic").adjectives.negative
        'pessimistic'
    """
    return resolve_trait(name_or_path, traits_dirs).read()


def resolve_trait(name_or_path: str | os.PathLike[str], traits_dirs: Sequence[str | Path] = ()) -> TraitFile:
    """Find the file of a trait given by name or by path, without reading it; otherwise as `load_trait`."""
    if not isinstance(name_or_path, str) or is_path(name_or_path):
        return file_at(name_or_path)
    return find_traits(traits_dirs).find(name_or_path)


def is_path(name_or_path: str) -> bool:
    """Say whether a text is meant as a file's path rather than as a trait's name."""
    return name_or_path.endswith(SUFFIXES) or "/" in name_or_path or os.sep in name_or_path


def file_at(path: str | os.PathLike[str]) -> TraitFile:
    """Take a file given by its path for a trait file.

    Raises:
        TraitError: There is no such file.
    """
    location = Path(path)
    if not location.is_file():
        reason = "is a folder: give a file in it" if location.is_dir() else "does not exist"
        raise TraitError(f"the trait file {location} {reason}")
    return TraitFile(location.stem, Source(SourceKind.OPTION, str(location.parent)), location)


def _definitions(located: Iterable[Located]) -> dict[str, list[TraitFile]]:
    definitions: dict[str, list[TraitFile]] = {}
    for place in located:
        for file in place.files:
            name = file.name.rpartition(".")[0]
            definitions.setdefault(name, []).append(TraitFile(name, place.source, file))
    return definitions


def _choose(definitions: list[TraitFile]) -> tuple[TraitFile, list[TraitFile]]:
    # In a checkout the built-in folder *is* ./traits: one file reached in two ways hides nothing, and is
    # shown under the first source that has it.
    nearest = definitions[-1]
    same = [file for file in definitions if _same_file(file, nearest)]
    hidden: list[TraitFile] = []
    for file in definitions:
        if not any(_same_file(file, other) for other in (nearest, *hidden)):
            hidden.append(file)
    return same[0], hidden


def _same_file(one: TraitFile, other: TraitFile) -> bool:
    if not isinstance(one.location, Path) or not isinstance(other.location, Path):
        return one.location == other.location
    try:
        return one.location.samefile(other.location)
    except OSError:
        return False


def _identical(one: TraitFile, other: TraitFile) -> bool:
    try:
        return one.read().content_hash() == other.read().content_hash()
    except TraitError:
        return False

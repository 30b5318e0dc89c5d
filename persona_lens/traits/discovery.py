"""The traits and roles there are: where files come from, which of a name is used, and what went wrong on the way."""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import EntryPoint
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, overload

import platformdirs

from persona_lens.core.plugins import plugins
from persona_lens.core.text import in_short
from persona_lens.traits.kind import Content, Kind
from persona_lens.traits.parsing import read
from persona_lens.traits.problems import DefinitionError
from persona_lens.traits.schema import TRAITS, Trait

USER_FOLDER_VARIABLE = TRAITS.variable
SUFFIXES = (".yaml", ".yml")


class SourceKind(StrEnum):
    """The kinds of sources, farthest first: what stands nearer to the user wins."""

    BUILT_IN = "built-in"
    PACKAGE = "package"
    USER = "user"
    WORKING_DIRECTORY = "working-directory"
    OPTION = "option"


@dataclass(frozen=True)
class Source:
    """One place that files were looked for in.

    Attributes:
        kind: What kind of place it is.
        label: Its name for people, such as ``package my-traits`` or a folder's path.
    """

    kind: SourceKind
    label: str


class Located(NamedTuple):
    """The files of one source, or why there are none."""

    source: Source
    files: tuple[Traversable, ...] = ()
    problem: str | None = None


def user_folder(kind: Kind[Any] = TRAITS) -> Path:
    """Give the user's own folder of traits, or of another kind.

    It is ``traits`` in persona-lens' configuration folder (on Linux ``~/.config/persona-lens/traits``), or
    the folder that the environment variable ``PERSONA_LENS_TRAITS_DIR`` names.
    """
    chosen = os.environ.get(kind.variable)
    return Path(chosen) if chosen else platformdirs.user_config_path("persona-lens") / kind.plural


def built_in_folder(kind: Kind[Any]) -> Traversable:
    """The folder of what is built in, in the wheel or in a checkout; it need not be there."""
    folder = importlib.resources.files("persona_lens") / kind.built_in
    checkout = Path(__file__).resolve().parents[2]
    # Only a checkout has pyproject.toml here; beside an installed package `traits` could be anybody's.
    if not folder.is_dir() and (checkout / "pyproject.toml").is_file():
        return checkout / kind.plural
    return folder


def _built_in(kind: Kind[Any]) -> Located:
    source, folder = Source(SourceKind.BUILT_IN, "built in"), built_in_folder(kind)
    if not folder.is_dir():
        return Located(source, problem=f"the built-in {kind.plural} are missing: reinstall persona-lens")
    return _folder(source, folder)


def _user(kind: Kind[Any]) -> Located:
    folder = user_folder(kind)
    source = Source(SourceKind.USER, str(folder))
    if os.environ.get(kind.variable) and not folder.is_dir():
        return Located(source, problem=f"{kind.variable} names no folder")
    return _folder(source, folder)


def _folder(source: Source, folder: Traversable) -> Located:
    try:
        return Located(source, tuple(_yaml_files(folder)) if folder.is_dir() else ())
    except OSError as error:
        return Located(source, problem=f"cannot be read: {error.strerror or error}")


def _yaml_files(folder: Traversable) -> Iterator[Traversable]:
    # Reverse order: of a.yaml and a.yml the former comes last, and the last definition of a name wins.
    for file in sorted(folder.iterdir(), key=lambda file: file.name, reverse=True):
        if file.name.endswith(SUFFIXES) and not file.name.startswith(".") and file.is_file():
            yield file


def _entry_point_files(point: EntryPoint) -> Iterator[Traversable]:
    module = importlib.import_module(point.module)
    # Python 3.11 has no `files` for a module that is a single file.
    package = hasattr(module, "__path__")
    home = importlib.resources.files(module) if package else Path(inspect.getfile(module)).parent
    given: Any = point.load() if point.attr else home
    given = given() if callable(given) and not isinstance(given, Traversable) else given
    several = isinstance(given, Iterable) and not isinstance(given, str | os.PathLike | Traversable)
    for place in given if several else [given]:
        if isinstance(place, str | os.PathLike):
            place = Path(place) if os.path.isabs(place) else home / Path(place).as_posix()
        if not isinstance(place, Traversable):
            raise TypeError(f"a path is expected, but {place!r} is given")
        if place.is_dir():
            yield from _yaml_files(place)
        elif place.is_file():
            yield place
        else:
            raise FileNotFoundError(f"there is no {place}")


@dataclass(frozen=True)
class DefinitionFile(Generic[Content]):
    """A file that was found; it is not read before `read` is called.

    Attributes:
        kind: What it is to define.
        name: The name of that, which is the file's name without its ending.
        source: Where the file was found.
        location: The file, on disk or inside an installed package.
    """

    kind: Kind[Content]
    name: str
    source: Source
    location: Traversable

    @property
    def path(self) -> str:
        """The file's path."""
        return str(self.location)

    def read(self) -> Content:
        """Read the file.

        Raises:
            DefinitionError: Of the kind (`TraitError`, `RoleError`), if it cannot be read or is none.
        """
        return read(self.kind, self.location)[0]


TraitFile: TypeAlias = DefinitionFile[Trait]


@dataclass(frozen=True)
class Shadowed(Generic[Content]):
    """A definition that is not used, because a nearer source defines the same name.

    Attributes:
        used: The definition in use.
        hidden: The definition that it hides.
    """

    used: DefinitionFile[Content]
    hidden: DefinitionFile[Content]

    @property
    def identical(self) -> bool:
        """Whether both would give the same results."""
        try:
            return self.used.read().content_hash() == self.hidden.read().content_hash()
        except DefinitionError:
            return False

    def __str__(self) -> str:
        likeness = "the same content" if self.identical else "other content"
        return (
            f"{self.used.kind.noun} {self.used.name}: {self.used.path} ({self.used.source.kind}) is used; it hides "
            f"{self.hidden.path} ({self.hidden.source.kind}), which has {likeness}"
        )


@dataclass(frozen=True)
class Catalogue(Generic[Content]):
    """All traits within reach, or all roles.

    Attributes:
        kind: Which of them.
        files: One file for each name, by name.
        shadowed: The definitions that are not used, by name.
        problems: Which sources could not be read, and why; all the others still count.
    """

    kind: Kind[Content]
    files: tuple[DefinitionFile[Content], ...]
    shadowed: tuple[Shadowed[Content], ...]
    problems: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, sorted; a file that turns out broken has a name all the same."""
        return tuple(file.name for file in self.files)

    def find(self, name: str) -> DefinitionFile[Content]:
        """Find the file of a name.

        Raises:
            DefinitionError: Of the kind, if there is none; the message lists those there are.
        """
        for file in self.files:
            if file.name == name:
                return file
        close = difflib.get_close_matches(name.lower(), self.names, n=1)
        lines = [f"there is no {self.kind.noun} {in_short(name)!r}" + (f"; did you mean {close[0]}?" if close else "")]
        lines.append(f"Available: {', '.join(self.names) or 'none'}")
        lines += [f"Not searched: {problem}" for problem in self.problems]
        lines.append(f"{self.kind.a_noun.capitalize()} of your own: `persona-lens {self.kind.plural} new NAME`")
        raise self.kind.failed("\n".join(lines))

    def warnings(self, names: Iterable[str] | None = None) -> list[str]:
        """Say what a user should know about these names: shadowed definitions and sources that failed.

        Args:
            names: Those in question; all of them when left out.
        """
        wanted = set(self.names if names is None else names)
        hidden = [str(shadowed) for shadowed in self.shadowed if shadowed.used.name in wanted]
        return [*hidden, *self.problems]


def find_traits(traits_dirs: Sequence[str | Path] = ()) -> Catalogue[Trait]:
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
    return find(TRAITS, traits_dirs)


def find(kind: Kind[Content], folders: Sequence[str | Path] = ()) -> Catalogue[Content]:
    """Find everything of a kind within reach; see `find_traits`."""
    for folder in folders:
        if not Path(folder).is_dir():
            reason = "is a file, not a folder" if Path(folder).exists() else "does not exist"
            raise kind.failed(f"the {kind.plural} folder {folder} {reason}: give a folder that holds NAME.yaml files")
    packages = plugins(kind.group, lambda point: tuple(_entry_point_files(point)))
    located = [
        _built_in(kind),
        *(Located(Source(SourceKind.PACKAGE, f"package {p.package}"), p.found or (), p.broken) for p in packages),
        _user(kind),
        _folder(Source(SourceKind.WORKING_DIRECTORY, f"./{kind.plural}"), Path(kind.plural)),
        *(_folder(Source(SourceKind.OPTION, str(folder)), Path(folder)) for folder in folders),
    ]
    definitions: dict[str, list[DefinitionFile[Content]]] = {}
    for place in located:
        for file in place.files:
            name = file.name.rpartition(".")[0]
            definitions.setdefault(name, []).append(DefinitionFile(kind, name, place.source, file))
    chosen = [_choose(definitions[name]) for name in sorted(definitions)]
    problems = tuple(f"{each.source.label}: {each.problem}" for each in located if each.problem is not None)
    shadowed = tuple(Shadowed(used, other) for used, hidden in chosen for other in hidden)
    return Catalogue(kind, tuple(used for used, _ in chosen), shadowed, problems)


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
    return resolve(TRAITS, name_or_path, traits_dirs)


def resolve(
    kind: Kind[Content], name_or_path: str | os.PathLike[str], folders: Sequence[str | Path] = ()
) -> DefinitionFile[Content]:
    """Find the file of a definition given by name or by path, without reading it; see `load_trait`."""
    if not isinstance(name_or_path, str) or is_path(name_or_path):
        return file_at(name_or_path, kind)
    return find(kind, folders).find(name_or_path)


def is_path(name_or_path: str) -> bool:
    """Say whether a text is meant as a file's path rather than as a name."""
    return name_or_path.endswith(SUFFIXES) or "/" in name_or_path or os.sep in name_or_path


@overload
def file_at(path: str | os.PathLike[str]) -> TraitFile: ...


@overload
def file_at(path: str | os.PathLike[str], kind: Kind[Content]) -> DefinitionFile[Content]: ...


def file_at(path: str | os.PathLike[str], kind: Kind[Any] = TRAITS) -> DefinitionFile[Any]:
    """Take a file given by its path for a trait file, or for one of another kind.

    Raises:
        DefinitionError: Of the kind (`TraitError`, `RoleError`), if there is no such file.
    """
    location = Path(path)
    if not location.is_file():
        reason = "is a folder: give a file in it" if location.is_dir() else "does not exist"
        raise kind.failed(f"the {kind.noun} file {location} {reason}")
    return DefinitionFile(kind, location.stem, Source(SourceKind.OPTION, str(location.parent)), location)


def _choose(
    definitions: list[DefinitionFile[Content]],
) -> tuple[DefinitionFile[Content], list[DefinitionFile[Content]]]:
    # In a checkout the built-in folder *is* ./traits: one file reached in two ways hides nothing, and is
    # shown under the first source that has it.
    nearest = definitions[-1]
    same = [file for file in definitions if _same_file(file, nearest)]
    hidden: list[DefinitionFile[Content]] = []
    for file in definitions:
        if not any(_same_file(file, other) for other in (nearest, *hidden)):
            hidden.append(file)
    return same[0], hidden


def _same_file(one: DefinitionFile[Any], other: DefinitionFile[Any]) -> bool:
    if not isinstance(one.location, Path) or not isinstance(other.location, Path):
        return one.location == other.location
    try:
        return one.location.samefile(other.location)
    except OSError:
        return False

"""The traits there are: where their files come from, which one of a name is used, and what went wrong on the way."""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import EntryPoint
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType

import platformdirs

from persona_lens.core.plugins import plugins
from persona_lens.core.text import in_short
from persona_lens.traits.document import TraitError
from persona_lens.traits.parsing import read_trait
from persona_lens.traits.schema import Trait

ENTRY_POINT_GROUP = "persona_lens.traits"
USER_FOLDER_VARIABLE = "PERSONA_LENS_TRAITS_DIR"
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
    """One place that trait files were looked for in.

    Attributes:
        kind: What kind of place it is.
        label: Its name for people, such as ``package my-traits`` or a folder's path.
    """

    kind: SourceKind
    label: str


@dataclass(frozen=True)
class SourceProblem:
    """A source that could not be read; all the others still count."""

    source: Source
    message: str

    def __str__(self) -> str:
        return f"{self.source.label}: {self.message}"


@dataclass(frozen=True)
class Located:
    """The trait files of one source, or why there are none."""

    source: Source
    files: tuple[Traversable, ...]
    problem: SourceProblem | None = None


def locate_all(traits_dirs: Sequence[str | Path] = ()) -> list[Located]:
    """List the trait files of every source, farthest source first.

    Args:
        traits_dirs: Folders named by the user for this call; the last one is the nearest.

    Raises:
        TraitError: One of ``traits_dirs`` is no folder. A source that nobody named in this call never raises.
    """
    for folder in traits_dirs:
        if not Path(folder).is_dir():
            reason = "is a file, not a folder" if Path(folder).exists() else "does not exist"
            raise TraitError(f"the traits folder {folder} {reason}: give a folder that holds NAME.yaml files")
    named = [_folder(Source(SourceKind.OPTION, str(folder)), Path(folder)) for folder in traits_dirs]
    working = _folder(Source(SourceKind.WORKING_DIRECTORY, "./traits"), Path("traits"))
    return [_built_in(), *_packages(), _user(), working, *named]


def user_folder() -> Path:
    """Give the user's own traits folder.

    It is ``traits`` in persona-lens' configuration folder (on Linux ``~/.config/persona-lens/traits``), or
    the folder that the environment variable ``PERSONA_LENS_TRAITS_DIR`` names.
    """
    chosen = os.environ.get(USER_FOLDER_VARIABLE)
    return Path(chosen) if chosen else platformdirs.user_config_path("persona-lens") / "traits"


def is_trait_file(name: str) -> bool:
    """Say whether a file's name is that of a trait file: YAML, and not hidden."""
    return name.endswith(SUFFIXES) and not name.startswith(".")


def _built_in() -> Located:
    source = Source(SourceKind.BUILT_IN, "built in")
    shipped = importlib.resources.files("persona_lens") / "builtin_traits"
    if shipped.is_dir():
        return _folder(source, shipped)
    checkout = Path(__file__).resolve().parents[2]
    # Only a checkout has pyproject.toml here; beside an installed package `traits` could be anybody's.
    if (checkout / "pyproject.toml").is_file() and (checkout / "traits").is_dir():
        return _folder(source, checkout / "traits")
    return Located(source, (), SourceProblem(source, "the built-in traits are missing: reinstall persona-lens"))


def _user() -> Located:
    folder = user_folder()
    source = Source(SourceKind.USER, str(folder))
    if USER_FOLDER_VARIABLE in os.environ and os.environ[USER_FOLDER_VARIABLE] and not folder.is_dir():
        return Located(source, (), SourceProblem(source, f"{USER_FOLDER_VARIABLE} names no folder"))
    return _folder(source, folder)


def _folder(source: Source, folder: Traversable) -> Located:
    try:
        if not folder.is_dir():
            return Located(source, ())
        return Located(source, tuple(_trait_files(folder)))
    except OSError as error:
        return Located(source, (), SourceProblem(source, f"cannot be read: {error.strerror or error}"))


def _trait_files(folder: Traversable) -> Iterator[Traversable]:
    # Reverse order: of a.yaml and a.yml the former comes last, and the last definition of a name wins.
    for file in sorted(folder.iterdir(), key=lambda file: file.name, reverse=True):
        if is_trait_file(file.name) and file.is_file():
            yield file


def _packages() -> Iterator[Located]:
    for each in plugins(ENTRY_POINT_GROUP, lambda point: tuple(_entry_point_files(point))):
        source = Source(SourceKind.PACKAGE, f"package {each.package}")
        problem = SourceProblem(source, each.broken) if each.broken else None
        yield Located(source, each.found or (), problem)


def _entry_point_files(point: EntryPoint) -> Iterator[Traversable]:
    module = importlib.import_module(point.module)
    home = _home(module)
    if not point.attr:
        yield from _trait_files(home)
        return
    given = point.load()
    given = given() if callable(given) and not isinstance(given, Traversable) else given
    for place in given if _is_several(given) else [given]:
        where = _resolved(place, home)
        if where.is_dir():
            yield from _trait_files(where)
        elif where.is_file():
            yield where
        else:
            raise FileNotFoundError(f"there is no {where}")


def _home(module: ModuleType) -> Traversable:
    if hasattr(module, "__path__"):
        return importlib.resources.files(module)
    if module.__file__ is None:
        raise TypeError(f"{module.__name__} has no folder")
    return Path(module.__file__).parent  # Python 3.11 has no `files` for a module that is a single file


def _is_several(given: object) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, str | os.PathLike | Traversable)


def _resolved(place: object, home: Traversable) -> Traversable:
    if isinstance(place, str | os.PathLike):
        path = Path(place)
        return path if path.is_absolute() else home / path.as_posix()
    if isinstance(place, Traversable):
        return place
    raise TypeError(f"a path is expected, but {place!r} is given")


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

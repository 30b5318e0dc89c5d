"""Where trait files come from: the built-in folder, installed packages and the folders of the user."""

from __future__ import annotations

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
from persona_lens.traits.document import TraitError

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

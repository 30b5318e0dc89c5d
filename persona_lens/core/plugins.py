"""What other packages add: entry points of a group and what is wrong with them, and what an extra needs installed."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Generic, TypeVar

from persona_lens.core.errors import PersonaLensError

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Plugin(Generic[Thing]):
    """One entry point.

    Attributes:
        name: Its name.
        package: The distribution that it belongs to.
        found: What it leads to; None if it is broken.
        broken: Why it cannot be used.
    """

    name: str
    package: str
    found: Thing | None = None
    broken: str | None = None


def plugins(group: str, read: Callable[[Any], Thing]) -> Iterator[Plugin[Thing]]:
    """Every entry point of a group, by package and name; somebody else's mistake never hides another's.

    Args:
        group: Such as ``persona_lens.backends``.
        read: From an entry point to what it leads to.
    """
    for point in sorted(metadata.entry_points(group=group), key=lambda point: (_package(point), point.name)):
        try:
            yield Plugin(point.name, _package(point), read(point))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger's code may raise anything
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            message = f"its entry point `{point.name} = {point.value}` fails: {reason}"
            yield Plugin(point.name, _package(point), broken=message)


def install_command(extra: str) -> str:
    """How to install what an extra needs: its requirements by name, as they stand in this installation's metadata.

    No command names persona-lens itself, which comes from a checkout or a wheel: on an index the name may be anybody's.
    """
    try:
        stated = metadata.requires("persona-lens") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        stated = []
    marked = [re.fullmatch(r"(.+?) *; *extra == ['\"](.+)['\"]", line) for line in stated]
    needed = [shlex.quote(found[1]) for found in marked if found and found[2] == extra]
    return f"pip install {' '.join(needed)}" if needed else f"pip install -e '.[{extra}]' in the checkout"


def _package(point: Any) -> str:
    dist = getattr(point, "dist", None)
    return dist.name if dist is not None else str(point.value).partition(":")[0]


@dataclass(frozen=True)
class Registry(Generic[Thing]):
    """What there is of a kind by name: what this package brings, and what others add. Built-in names stay theirs.

    Attributes:
        group: The entry points' group.
        kind: Class of what they lead to.
        noun: What one is called in messages.
        failed: Class of the errors.
        built_in: By name.
    """

    group: str
    kind: type[Thing]
    noun: str
    failed: type[PersonaLensError]
    built_in: Mapping[str, Thing] = field(default_factory=dict)

    def everything(self) -> dict[str, Plugin[Thing]]:
        """By name, what is broken included: first what is built in, in its order, then what others add."""
        ours = {name: Plugin(name, "persona-lens", found) for name, found in self.built_in.items()}
        theirs = {each.name: each for each in plugins(self.group, self._read)}
        return {**ours, **{name: each for name, each in sorted(theirs.items()) if name not in ours}}

    def usable(self) -> dict[str, Thing]:
        """By name, without what is broken."""
        return {name: each.found for name, each in self.everything().items() if each.found is not None}

    def find(self, name: str) -> Thing:
        """The one of that name.

        Raises:
            PersonaLensError: Of the class ``failed``, if there is none, or it is broken.
        """
        if (ours := self.built_in.get(name)) is not None:
            return ours
        there = self.everything()
        if name not in there:
            close = difflib.get_close_matches(name, there, n=1)
            hint = f"; did you mean {close[0]}? Installed" if close else "; installed"
            raise self.failed(f"no {self.noun} named {name!r}{hint}: {', '.join(there) or 'none'}")
        found = there[name].found
        if found is None:
            raise self.failed(f"{self.noun} {name} cannot be loaded: {there[name].broken}")
        return found

    def _read(self, point: Any) -> Thing:
        found = point.load()
        if not isinstance(found, self.kind):
            raise TypeError(f"{point.value} is a {type(found).__name__}, not a {self.kind.__name__}")
        return found

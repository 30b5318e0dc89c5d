"""`Scripted`: people whose messages to a model are written down, turn by turn, and the files that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from persona_lens.core.documents import read_yaml
from persona_lens.core.text import counted, in_short, shown
from persona_lens.data.tables import DataError

USERS = Path(__file__).with_name("users")
"""The folder of the built-in ones: a file for each domain."""
MOST_TURNS = 200


@dataclass(frozen=True)
class Scripted:
    """Somebody who talks with a model, whatever it answers.

    Attributes:
        name: Unlike all others'.
        domain: What the conversation is about, such as ``coding``.
        turns: The messages, in order.
        about: Who that is, what they want and how they talk, for people, and for a model that plays them.
    """

    name: str
    domain: str
    turns: tuple[str, ...]
    about: str = ""

    def describe(self) -> dict[str, Any]:
        """The person as JSON values, for the record of a run."""
        return {**asdict(self), "turns": list(self.turns)}


_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Closed(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _User(_Closed):
    name: Annotated[_Text, Field(max_length=80)]
    about: str = ""
    turns: Annotated[list[_Text], Field(min_length=1, max_length=MOST_TURNS)]


class _File(_Closed):
    format_version: Literal[1]
    domain: Annotated[_Text, Field(max_length=80)]
    users: Annotated[list[_User], Field(min_length=1)]


def read_users(file: Path | str) -> tuple[Scripted, ...]:
    """The people of one file: YAML with ``format_version`` 1, ``domain``, ``users`` (``name``, ``about``, ``turns``).

    Raises:
        DocumentError: If it cannot be read.
        DataError: If it is written otherwise, or a name stands in it twice; naming the first such place.
    """
    values = read_yaml(file)
    if not isinstance(values, dict):
        raise DataError(f"{file} holds no scripted users: write format_version: 1, domain and users")
    try:
        found = _File.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = " ".join(f"#{part + 1}" if isinstance(part, int) else in_short(str(part)) for part in first["loc"])
        raise DataError(f"{file}: {place}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    users = (Scripted(each.name, found.domain, tuple(each.turns), each.about.strip()) for each in found.users)
    return distinct(users, str(file))


def scripted_users(files: Sequence[Path | str] = ()) -> tuple[Scripted, ...]:
    """The people of several files; of the built-in ones where none is named.

    Raises:
        DocumentError: If a file cannot be read.
        DataError: See `read_users`; or if two have the same name.
    """
    where = files or sorted(USERS.glob("*.yaml"))
    return distinct(chain.from_iterable(map(read_users, where)), ", ".join(map(str, where)))


def distinct(users: Iterable[Scripted], where: str) -> tuple[Scripted, ...]:
    """The same people, whose names differ.

    Raises:
        DataError: If two have the same name; ``where`` says where.
    """
    found = tuple(users)
    names = [user.name for user in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{where}: two users are called {shown(twice)}; give one of them another name")
    return found


def spread_over_domains(users: Sequence[Scripted], count: int, turns: int) -> tuple[Scripted, ...]:
    """So many people, from each domain in turn, who have so many messages.

    Args:
        users: Who there is, in the order in which those of a domain are taken.
        count: How many are wanted.
        turns: How many messages each must have.

    Raises:
        DataError: If there are fewer.
    """
    able = [user for user in users if len(user.turns) >= turns]
    domains = dict.fromkeys(user.domain for user in able)
    rounds = zip_longest(*([user for user in able if user.domain == domain] for domain in domains))
    found = [user for each in rounds for user in each if user is not None]
    if len(found) < count:
        raise DataError(
            f"{counted(count, 'conversation')} of {counted(turns, 'turn')} are asked for, and there are "
            f"{counted(len(found), 'scripted user')} with so many messages; ask for fewer, or name files with more"
        )
    return tuple(found[:count])

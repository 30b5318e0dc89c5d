"""What can be typed into ``persona-lens monitor chat`` beside messages: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.cli.display import say
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted, in_short

if TYPE_CHECKING:
    from persona_lens.monitoring import Turn
    from persona_lens.serve.session import Session
    from persona_lens.serve.talk import Talk
    from persona_lens.steering import Steering
    from persona_lens.steering.history import History

HELP = """/again [SEED]         the last message answered once more, with another seed or this one, as a branch
/back                 to before your last message
/edits NOTATION|off   what the next replies are made under, such as optimistic@18:+1.5; alone: what is set
/history steered|clean   how a reply finds earlier turns: as they were steered, or as if never; alone: what is set
/branches [NUMBER]    the branches of the conversation; with a number: go on from that one
/save FILE            keep the conversation in a file
/help                 this list
//...                 a message that begins with a slash"""


@dataclass
class Chat:
    """A conversation in the terminal.

    Attributes:
        talk: The conversation.
        settings: Length, temperature and the like, as `Talk.say` takes them.
        seed: Of the first reply; each that follows has the next one.
        steering: What replies are made under.
        history: What that does to earlier turns.
        parse: A steering from its notation.
        file: Where the conversation is kept after every reply; None for nowhere.
        loaded: The file that it came from.
    """

    talk: Talk
    settings: Mapping[str, Any]
    seed: int
    steering: Steering | None
    history: History
    parse: Callable[[str], Steering]
    file: Path | None = None
    loaded: Path | None = None

    def __post_init__(self) -> None:
        self._replies = 0
        self._written = [file for file in (self.file, self.loaded) if file is not None]

    def take(self, line: str) -> Turn | None:
        """A line that was typed: a message or a command. Returns the reply, where there is one.

        Raises:
            PersonaLensError: If a message cannot be answered. What is wrong with a command is said.
        """
        if not line.startswith("/") or line.startswith("//"):
            return self._reply(line[1:] if line.startswith("//") else line)
        word, _, rest = line[1:].strip().partition(" ")
        commands: dict[str, Callable[[str], Turn | None]] = {
            "again": self._again,
            "back": self._back,
            "edits": self._edits,
            "history": self._history,
            "branches": self._branches,
            "save": self._save,
            "help": _help,
        }
        command = commands.get(word)
        try:
            if command is None:
                raise PersonaLensError(f"there is no /{in_short(word, 20)}; /help lists what there is")
            return command(rest.strip())
        except PersonaLensError as error:
            say(f"error: {error}", err=True)
            return None

    def answer(self) -> Turn | None:
        """Answer what a loaded conversation ends with, if that is a message of the user."""
        return self._reply(None) if self.talk.waits else None

    def _reply(self, text: str | None, seed: int | None = None) -> Turn:
        how = {
            **self.settings,
            "seed": self.seed + self._replies if seed is None else seed,
            "edits": self.steering or "",
            "history": self.history,
        }
        turn = self.talk.again(**how) if text is None else self.talk.say(text, **how)
        self._replies += 1
        if self.file is not None:
            self._write(self.file)
        return turn

    def _again(self, rest: str) -> Turn:
        if rest and not (rest.isascii() and rest.isdecimal() and len(rest) < 19):
            raise PersonaLensError(f"/again takes a seed, a whole number; got {in_short(rest)!r}")
        return self._reply(None, int(rest) if rest else None)

    def _back(self, _: str) -> None:
        last = self.talk.back()
        if last is None:
            raise PersonaLensError("this is where the conversation begins")
        _tell(f"back to before: {in_short(last.content)}")

    def _edits(self, rest: str) -> None:
        if rest:
            self.steering = None if rest == "off" else self.parse(rest)
        _tell(f"edits: {self.steering or 'none'}")

    def _history(self, rest: str) -> None:
        if rest:
            self.history = type(self.history)(rest)
        _tell(f"history: {self.history}")

    def _branches(self, rest: str) -> None:
        session = self.talk.session
        ends = session.branches()
        if rest:
            if not (rest.isascii() and rest.isdecimal() and 1 <= int(rest[:9]) <= len(ends)):
                raise PersonaLensError(f"/branches takes a number from 1 to {len(ends)}; got {in_short(rest)!r}")
            session.go(ends[int(rest) - 1].id)
        for number, line in enumerate(_lines(session), start=1):
            _tell(f"{number:>3} {line}")

    def _save(self, rest: str) -> None:
        file = Path(rest).expanduser() if rest else self.file
        if file is None:
            raise PersonaLensError("name a file: /save FILE")
        check_free(file, *self._written)
        self._write(file)
        _tell(f"kept in {file}: {counted(len(self.talk.session), 'message')}")

    def _write(self, file: Path) -> None:
        self.talk.session.save(file)
        if file not in self._written:
            self._written.append(file)


def check_free(file: Path | None, *own: Path | None) -> None:
    """Refuse a file that is there, unless it is one of the conversation's own."""
    known = [each.resolve() for each in own if each is not None]
    if file is not None and file.exists() and file.resolve() not in known:
        raise PersonaLensError(f"{file} is already there; name another, or go on with it: --load {file}")


def _lines(session: Session) -> list[str]:
    """Each branch in a line: where it ends, and whether the conversation stands on it."""
    here = session.current
    found = []
    for end in session.branches():
        path = session.path_to(end.id)
        made = next((str(each.made) for each in reversed(path) if each.made is not None), "")
        mark = "*" if here in [each.id for each in path] else " "
        said = counted(sum(each.role == "user" for each in path), "message")
        found.append(f"{mark} {said}, ends: {in_short(end.content, 50)}{f'  ({made})' if made else ''}")
    return found


def _help(_: str) -> None:
    _tell(HELP)


def _tell(text: str) -> None:
    say(text, err=True)

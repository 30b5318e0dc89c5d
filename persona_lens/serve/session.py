"""`Session`: a conversation with a steered and monitored model, as a tree of messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from persona_lens.core.files import read_bytes, write_bytes
from persona_lens.core.text import shown
from persona_lens.models import Message
from persona_lens.serve.export import page_of
from persona_lens.serve.said import GaugeName, Made, ReplyReadings, SessionError, SessionMessage, role_of
from persona_lens.serve.session_file import MAX_MESSAGES, parsed, written


class Session:
    """A conversation and its branches. Every message knows the one before it; one of them is where things stand.

    Not thread-safe: one thread changes a session at a time.

    Args:
        model: Name of the model that answers.
        gauges: What is read; more may come with later replies.
    """

    def __init__(self, model: str = "", gauges: Iterable[GaugeName] = ()) -> None:
        self.model = model
        self._gauges = list(gauges)
        self._messages: dict[str, SessionMessage] = {}
        self._children: dict[str | None, list[str]] = {None: []}
        self._current: str | None = None

    @property
    def gauges(self) -> tuple[GaugeName, ...]:
        """What the values of readings are of, in their order."""
        return tuple(self._gauges)

    @property
    def current(self) -> str | None:
        """Id of the message where the conversation stands; None before the first."""
        return self._current

    @property
    def path(self) -> tuple[SessionMessage, ...]:
        """The messages from the first one to where the conversation stands."""
        return self.path_to(self._current)

    @property
    def messages(self) -> list[Message]:
        """`path` as OpenAI messages."""
        return [{"role": each.role, "content": each.content} for each in self.path]

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[SessionMessage]:
        """Every message of every branch, in the order in which they came."""
        return iter(self._messages.values())

    def __getitem__(self, message: str) -> SessionMessage:
        """A message by its id; raises SessionError where there is none."""
        if message not in self._messages:
            raise SessionError(f"there is no message {shown(message)} in this session")
        return self._messages[message]

    def path_to(self, message: str | None) -> tuple[SessionMessage, ...]:
        """The messages from the first one to this one.

        Raises:
            SessionError: If there is no such message.
        """
        found = []
        while message is not None:
            found.append(self[message])
            message = found[-1].parent
        return tuple(reversed(found))

    def children(self, message: str | None) -> tuple[SessionMessage, ...]:
        """The messages that answer this one, in the order in which they came; of None the first messages."""
        return tuple(self._messages[each] for each in self._children.get(message, ()))

    def branches(self) -> tuple[SessionMessage, ...]:
        """The last messages of all branches, in the order in which they came."""
        return tuple(each for each in self if not self._children[each.id])

    def add(
        self,
        role: str,
        content: str,
        *,
        made: Made | None = None,
        readings: ReplyReadings | None = None,
        gauges: Sequence[GaugeName] | None = None,
    ) -> SessionMessage:
        """Say something where the conversation stands; it goes on from there.

        Args:
            role: ``system``, ``user`` or ``assistant``.
            content: What is said.
            made: What a reply was made with.
            readings: What was read of it.
            gauges: Those of the readings, where they are not the session's own, in their order; new ones are added.

        Raises:
            SessionError: If there is no such role, or readings and gauges do not belong together.
        """
        if readings is not None:
            places = list(range(len(self._gauges))) if gauges is None else self._placed(gauges)
            readings = readings.checked(len(places)).placed(places, len(self._gauges))
        whole = content.encode(errors="replace").decode()  # no file holds halves of characters
        return self._put(SessionMessage(self._free_id(), self._current, role_of(role), whole, made, readings))

    def go(self, message: str | None) -> None:
        """Stand at a message, so that what is said next answers it; None stands before the first.

        Raises:
            SessionError: If there is no such message.
        """
        self._current = None if message is None else self[message].id

    def back(self) -> SessionMessage | None:
        """Stand before the last message of the user, which is returned; the branch stays. None where there is none."""
        last = next((each for each in reversed(self.path) if each.role == "user"), None)
        if last is not None:
            self._current = last.parent
        return last

    def to_jsonl(self) -> str:
        """The session as a file has it: a header, and a line for each message."""
        return written(self.model, self._gauges, self, self._current)

    @staticmethod
    def from_jsonl(text: str | bytes) -> Session:
        """Read a session; or OpenAI messages: one a line, a list of them, or ``{"messages": [...]}``.

        Raises:
            SessionError: If it is neither, or too long; the message says in which line.
        """
        found = parsed(text)
        session = Session(found.model, found.gauges)
        for line, message in found.messages:
            try:
                session._put(message)
            except SessionError as error:
                raise SessionError(f"line {line}: {error}") from None
        session._current = found.current
        return session

    def save(self, file: Path | str) -> Path:
        """Write a file, whole or not at all.

        Raises:
            SessionError: If it cannot be written.
        """
        return write_bytes(Path(file), self.to_jsonl().encode(), failed=SessionError)

    @staticmethod
    def load(file: Path | str) -> Session:
        """Read a file; see `from_jsonl`.

        Raises:
            SessionError: Naming the file.
        """
        try:
            return Session.from_jsonl(read_bytes(Path(file), SessionError))
        except SessionError as error:
            raise error if str(file) in str(error) else SessionError(f"{file}: {error}") from error

    def html(self, title: str = "") -> str:
        """The session as a page, complete in itself: no scripts, and nothing is loaded from anywhere.

        The branch where the conversation stands is shown whole, with its chart and its tokens; the others below it.

        Args:
            title: Heads the page.
        """
        return page_of(self.model, self.gauges, self.path, self._others(), title)

    def _others(self) -> list[list[SessionMessage]]:
        """The other branches, each from where it leaves those before it."""
        seen, found = {each.id for each in self.path}, []
        for end in self.branches():
            branch: list[SessionMessage] = []
            at: str | None = end.id
            while at is not None and at not in seen:
                seen.add(at)
                branch.append(self._messages[at])
                at = branch[-1].parent
            if branch:
                found.append(branch[::-1])
        return found

    def _placed(self, gauges: Sequence[GaugeName]) -> list[int]:
        """Where these gauges stand among the session's; those that are new are added, and older replies lack them."""
        new = [each for each in dict.fromkeys(gauges) if each not in self._gauges]
        if new:
            places, total = list(range(len(self._gauges))), len(self._gauges) + len(new)
            for key, each in self._messages.items():
                if each.readings is not None:
                    self._messages[key] = replace(each, readings=each.readings.placed(places, total))
            self._gauges += new
        return [self._gauges.index(each) for each in gauges]

    def _free_id(self) -> str:
        number = len(self._messages)
        while f"m{number}" in self._messages:
            number += 1
        return f"m{number}"

    def _put(self, message: SessionMessage) -> SessionMessage:
        if message.id in self._messages:
            raise SessionError(f"the message {shown(message.id)} is there twice")
        if message.parent is not None and message.parent not in self._messages:
            raise SessionError(f"the parent {shown(message.parent)} must stand before its message, and does not")
        if message.role == "system" and message.parent is not None:
            raise SessionError("a system message must be the first of its branch")
        if len(self._messages) >= MAX_MESSAGES:
            raise SessionError(f"a session has {MAX_MESSAGES:,} messages at most; begin another one")
        self._messages[message.id] = message
        self._children[message.parent].append(message.id)
        self._children[message.id] = []
        self._current = message.id
        return message

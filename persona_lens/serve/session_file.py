"""The file of a session: JSONL, read within bounds and checked line by line; plain OpenAI messages are read too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from persona_lens.core.documents import DocumentError, Record, json_lines, parse_json
from persona_lens.core.text import in_short, shown
from persona_lens.data.tables import DataError
from persona_lens.data.transcripts import messages_of
from persona_lens.serve.said import GaugeName, SessionError, SessionMessage, role_of

KIND = "session"
FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20  # of a file: a reply of 1,000 tokens with 35 gauges has about 0.7 MB
MAX_MESSAGES = 20_000
MAX_GAUGES = 1000
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True)
class SessionFile:
    """What a file says.

    Attributes:
        model: Name of the model.
        gauges: What was read.
        messages: With the line of each, every message behind its parent if the file is right.
        current: Where the conversation stands; None before the first message.
    """

    model: str
    gauges: tuple[GaugeName, ...]
    messages: tuple[tuple[int, SessionMessage], ...]
    current: str | None


def written(model: str, gauges: Iterable[GaugeName], messages: Iterable[SessionMessage], current: str | None) -> str:
    """A session as a file has it: a header, and a line for each message."""
    header = {
        "persona_lens": KIND,
        "format_version": FORMAT_VERSION,
        "model": model,
        "gauges": [gauge.to_json() for gauge in gauges],
        "current": current,
    }
    return json_lines([header, *(message.to_json() for message in messages)]).decode()


def parsed(text: str | bytes) -> SessionFile:
    """Read what `written` wrote, or OpenAI messages: one a line, a list of them, or ``{"messages": [...]}``.

    Raises:
        SessionError: If it is neither, or too long; the message says in which line.
    """
    raw = text.encode(errors="replace") if isinstance(text, str) else text
    if len(raw) > MAX_BYTES:
        raise SessionError(f"a session of {len(raw):,} bytes is not read; at most {MAX_BYTES:,}")
    if not raw.strip():
        raise SessionError("there is nothing in it: no session and no messages")
    rows = list(_rows(raw))
    first = rows[0][1]
    if isinstance(first, Mapping) and first.get("persona_lens") is not None:
        return _session(rows)
    return _conversation([value for _, value in rows])


def _rows(raw: bytes) -> Iterator[tuple[int, Any]]:
    """The values of a file's lines with their numbers; of a file that is one value over several lines, that one."""
    if raw.lstrip()[:1] == b"[" or b"\n" not in raw.strip():
        yield 1, _parsed(raw, 0)
        return
    lines = [(number, line) for number, line in enumerate(raw.split(b"\n"), start=1) if line.strip()]
    if len(lines) > MAX_MESSAGES + 1:
        raise SessionError(f"{len(lines):,} lines are not read; a session has {MAX_MESSAGES:,} messages at most")
    if lines[0][1].strip() == b"{":  # written by hand or by a program that indents
        yield 1, _parsed(raw, 0)
        return
    for number, line in lines:
        yield number, _parsed(line, number)


def _parsed(raw: bytes, line: int) -> Any:
    try:
        return parse_json(raw.strip().removeprefix(b"\xef\xbb\xbf"))
    except DocumentError as error:
        raise SessionError(f"{f'line {line}: ' if line else ''}{error}") from None


def _conversation(values: list[Any]) -> SessionFile:
    """OpenAI messages without anything else."""
    if len(values) > 1 and all(isinstance(each, dict) and "messages" in each for each in values):
        raise SessionError(f"these are {len(values):,} conversations, and a session is one; give a file of one of them")
    given = values[0] if len(values) == 1 else values
    listed = given.get("messages", [given]) if isinstance(given, dict) else given
    try:
        found = messages_of({"messages": listed}, "openai")
    except DataError as error:
        raise SessionError(f"neither a session nor OpenAI messages: {error}") from None
    said: list[SessionMessage] = []
    for number, each in enumerate(found):
        parent = said[-1].id if said else None
        said.append(SessionMessage(f"m{number}", parent, role_of(each["role"]), each["content"]))
    return SessionFile("", (), tuple(enumerate(said)), said[-1].id)


def _session(rows: Sequence[tuple[int, Any]]) -> SessionFile:
    (first, header), *lines = rows
    if header.get("persona_lens") != KIND or header.get("format_version") != FORMAT_VERSION:
        raise SessionError(
            f"line {first} begins no session of format version {FORMAT_VERSION}, the one that is read here; use the "
            "persona-lens that wrote it"
        )
    model, gauges, current = header.get("model", ""), header.get("gauges", []), header.get("current")
    if not isinstance(model, str) or not isinstance(gauges, list) or len(gauges) > MAX_GAUGES:
        raise SessionError(f"line {first}: model must be a text, and gauges a list of {MAX_GAUGES} at most")
    messages = [(line, _message(value, line, len(gauges))) for line, value in lines]
    if current is not None and current not in [message.id for _, message in messages]:
        raise SessionError(f"line {first}: the conversation stands at {shown(current)}, and there is no such message")
    return SessionFile(model, tuple(_record(GaugeName, each, first) for each in gauges), tuple(messages), current)


def _message(value: Any, line: int, gauges: int) -> SessionMessage:
    message = _record(SessionMessage, value, line)
    if not _ID.fullmatch(message.id):
        raise SessionError(f"line {line}: an id is 1 to 64 letters, digits and ._-; this is {shown(message.id)}")
    try:
        if message.readings is not None:
            message.readings.checked(gauges)
    except SessionError as error:
        raise SessionError(f"line {line}: {error}") from None
    return message


def _record(kind: type[_R], value: Any, line: int) -> _R:
    if not isinstance(value, Mapping):
        raise SessionError(f"line {line} is {shown(value)}; it must be an object")
    try:
        return kind.from_json(value)
    except (TypeError, ValueError) as error:
        raise SessionError(f"line {line}: {in_short(str(error), 200)}") from None

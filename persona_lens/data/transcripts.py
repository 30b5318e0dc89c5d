"""`Transcript`: a conversation from a file, and the forms such files have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from persona_lens.core.progress import note
from persona_lens.core.text import printable
from persona_lens.data.tables import DataError, RawRow, all_rows, own_columns, raw_lines
from persona_lens.models import Message

TEXT_SUFFIXES = (".txt", ".text", ".md")
CALLS_TOOLS = "calls of tools cannot be read"  # part of what is said of such conversations, so that they can be counted
IDS = ("id", "conversation_id", "uuid")
_TOOLS = ("tool", "function", "tool_call", "tool_calls", "function_call", "observation", "tool_response")
LOOKED_AT = 100  # rows, to tell the form
_SHOWN = 40
_COLUMNS = 8  # named at most
_SPEAKERS = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "ai": "assistant",
}  # fmt: skip
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
}  # fmt: skip
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_HEAD = re.compile(rf"({'|'.join(_SPEAKERS)}):(?:[ \t]+|$)", re.IGNORECASE)
_ESCAPED = re.compile(rf"\\(?=\\*(?:(?:{'|'.join(_SPEAKERS)}):|-{{3,}}[ \t]*$))", re.IGNORECASE)
_RULE = re.compile(r"-{3,}[ \t]*")


TURNS = ("messages", "conversations", "conversation")
"""Columns in which lists of messages stand."""


class TranscriptForm(StrEnum):
    """How a file writes conversations.

    ``openai``: a table (JSONL, CSV, Parquet) whose column ``messages`` is a list of ``{"role", "content"}``; a content
    is a text, or a list of parts, whose texts are put together.

    ``sharegpt``: a table whose column ``conversations`` (or ``conversation``) is a list of ``{"from", "value"}``, with
    a column ``system`` where there is one.

    ``plain``: text. A line that begins with ``User:`` or ``Human:``, ``Assistant:`` or ``AI:``, ``System:`` (in any
    case, a space behind it) begins a message, which goes on to the next such line; empty lines around it are no part of
    it. A line of three or more hyphens ends a conversation. A backslash before either makes it text, and is dropped.
    """

    OPENAI = "openai"
    SHAREGPT = "sharegpt"
    PLAIN = "plain"


@dataclass(frozen=True)
class Transcript:
    """A conversation.

    Attributes:
        messages: ``{"role": "system" | "user" | "assistant", "content": text}``; a system message comes first, and
            there is at least one other. Whether users and assistants must take turns is up to a model's chat template.
        id: The row's own (``id``, ``conversation_id`` or ``uuid``), or its line.
        line: Line of the file on which it begins, counted from 1.
        file: The file.
    """

    messages: tuple[Message, ...]
    id: str
    line: int
    file: str = ""

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class BadTranscript:
    """A conversation that cannot be read.

    Attributes:
        line: Line of the file on which it begins, counted from 1.
        problem: What is wrong with it and what to do, in a sentence that begins with file and line.
    """

    line: int
    problem: str

    @property
    def error(self) -> DataError:
        """The problem as an error, to be raised where one bad row is to stop everything."""
        return DataError(self.problem)


@dataclass(frozen=True)
class TranscriptFile:
    """A file of conversations; iterating over it reads them one at a time, in order, the bad ones too.

    Attributes:
        path: The file.
        form: How it writes conversations.
    """

    path: Path
    form: TranscriptForm

    def __iter__(self) -> Iterator[Transcript | BadTranscript]:
        if self.form is TranscriptForm.PLAIN:
            return _read_plain(self.path)
        return map(self._read, all_rows(self.path))

    def _read(self, row: RawRow) -> Transcript | BadTranscript:
        if row.values is None:
            return BadTranscript(row.line, row.problem)
        values = row.values
        return _transcript(self.path, row.line, id_of(values, row.line), lambda: messages_of(values, self.form))


def open_transcripts(path: Path | str, form: TranscriptForm | str | None = None) -> TranscriptFile:
    """Find out how a file writes conversations; `TranscriptFile.form` shows what was found.

    Args:
        path: A text file (``.txt``, ``.text``, ``.md``), or a table as `persona_lens.data.tables.read_rows` takes it.
        form: Its form, if it should not be told by the name and, of a table, by the columns of the first rows.

    Raises:
        DataError: If there is no such file, or no table of it can be read;
            or if it has none of the forms, or cannot have the one that is given.
    """
    path = Path(path)
    if form is not None and str(form) not in list(TranscriptForm):
        raise DataError(f"there is no form {str(form)!r} of transcripts; take one of {', '.join(TranscriptForm)}")
    is_text = path.suffix.lower() in TEXT_SUFFIXES
    chosen = TranscriptForm(form) if form is not None else None
    if chosen is TranscriptForm.PLAIN or (is_text and chosen is None):
        if not path.is_file():
            raise DataError(f"{path} is a folder; give a file" if path.exists() else f"there is no file {path}")
        return TranscriptFile(path, TranscriptForm.PLAIN)
    if is_text:
        raise DataError(f"{path} is text, not a table, so its form cannot be {chosen}; it is read as plain")
    rows = first_rows(all_rows(path))
    found = chosen or _form_of(path, rows)
    columns, *_ = _SHAPES[found]
    beside = {"system"} if found is TranscriptForm.SHAREGPT else set()
    note_unread(str(path), rows, lambda row: {*IDS, first_of(row, columns), *beside, *own_columns(row)})
    return TranscriptFile(path, found)


def first_rows(rows: Iterable[RawRow]) -> list[dict[str, Any]]:
    """The first rows that can be read, by which a form is told."""
    return list(islice((row.values for row in rows if row.values is not None), LOOKED_AT))


def note_unread(
    name: str, rows: Iterable[Mapping[str, Any]], used: Callable[[Mapping[str, Any]], Collection[str | None]]
) -> None:
    """Say which columns of these rows hold text that is not read, if there are any.

    Args:
        name: What the table is called.
        rows: Some of its rows.
        used: From a row to the columns of it that are read.
    """
    held = ((row, column) for row in rows for column, value in row.items() if value and isinstance(value, str | list))
    unread = list(dict.fromkeys(column for row, column in held if column not in used(row)))
    if unread:
        shown = ", ".join(map(printable, unread[:_COLUMNS]))
        more = f" and {len(unread) - _COLUMNS} more" if len(unread) > _COLUMNS else ""
        note(f"{name}: columns that are no part of a conversation are not read: {shown}{more}")


def messages_of(row: Mapping[str, Any], form: TranscriptForm | str) -> tuple[Message, ...]:
    """The conversation in a row of a table.

    Args:
        row: The row's values by column.
        form: ``openai`` or ``sharegpt``.

    Raises:
        DataError: If the row has none; the message does not name the row's place.
    """
    columns, role, content = _SHAPES[TranscriptForm(form)]
    found = tuple(
        {
            "role": _role(message, role, place),
            "content": _content(message, content, place),
            **_weight(message.get("weight"), place),
        }
        for place, message in enumerate(_listed(row, columns))
    )
    system = row.get("system") if form == TranscriptForm.SHAREGPT else None
    if isinstance(system, str) and system.strip() and found[0]["role"] != "system":
        found = ({"role": "system", "content": system}, *found)
    return _checked(found)


def _form_of(path: Path, rows: Iterable[Mapping[str, Any]]) -> TranscriptForm:
    for row in rows:
        if "messages" in row:
            return TranscriptForm.OPENAI
        if "conversations" in row or "conversation" in row:
            return TranscriptForm.SHAREGPT
    raise DataError(
        f"{path}: no conversations: the rows need a column messages (OpenAI) or conversations (ShareGPT); "
        f"their columns are: {columns_of(*rows)}"
    )


def columns_of(*rows: Mapping[str, Any]) -> str:
    """The columns of rows, for a message."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return ", ".join(map(_short, islice(columns, _COLUMNS))) or "none that can be read"


def _transcript(
    path: Path, line: int, own_id: str, read: Callable[[], tuple[Message, ...]]
) -> Transcript | BadTranscript:
    try:
        return Transcript(read(), own_id, line, str(path))
    except DataError as fault:
        return BadTranscript(line, f"{path}:{line}: {fault}")


def _checked(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if all(message["role"] == "system" for message in messages):
        raise DataError("the conversation has no message of a user or an assistant")
    for place, message in enumerate(messages):
        if message["role"] == "system" and place:
            raise DataError(f"message {place} is a system message; only the first, message 0, may be one")
    return messages


def is_counted(message: Message) -> bool:
    """Whether a message is an answer that counts: OpenAI's finetuning format gives others ``"weight": 0``."""
    return message["role"] == "assistant" and message.get("weight") != "0"


def _weight(given: Any, place: int) -> dict[str, str]:
    if given in (None, 1):
        return {}
    if given == 0:
        return {"weight": "0"}
    raise DataError(f"message {place} has weight {_short(given)}; it can be 0 or 1")


# Where the messages stand, and in each of them the role and the text.
_SHAPES = {TranscriptForm.OPENAI: (TURNS, "role", "content"), TranscriptForm.SHAREGPT: (TURNS[1:], "from", "value")}


def first_of(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of these columns that a row has; None where it has none."""
    return next((name for name in names if name in row), None)


def needed(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of these columns that a row has.

    Raises:
        DataError: If it has none of them.
    """
    column = first_of(row, names)
    if column is None:
        raise DataError(f"the row has no {' or '.join(names)}; its columns are: {columns_of(row)}")
    return column


def _listed(row: Mapping[str, Any], columns: Sequence[str]) -> list[dict[str, Any]]:
    column = needed(row, columns)
    found = row[column]
    if isinstance(found, str):  # the cell of a CSV file
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{column} is a text that is not JSON: {_short(row[column])}") from error
    if not isinstance(found, list) or not found:
        raise DataError(f"{column} must be a list of messages, at least one, but is {_short(found)}")
    for place, message in enumerate(found):
        if not isinstance(message, dict):
            raise DataError(f"message {place} must be an object, but is {_short(message)}")
        if called := next((name for name in ("tool_calls", "function_call") if message.get(name)), None):
            raise DataError(f"message {place} has {called}; {CALLS_TOOLS}, so leave the conversation out")
    return found


def _role(message: Mapping[str, Any], key: str, place: int) -> str:
    given = message.get(key)
    role = _ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None and isinstance(given, str) and given.lower() in _TOOLS:
        raise DataError(f"message {place} has {key} {_short(given)}; {CALLS_TOOLS}, so leave the conversation out")
    if role is None:
        raise DataError(f"message {place} has {key} {_short(given)}; it can be one of {', '.join(_ROLES)}")
    return role


def _content(message: Mapping[str, Any], key: str, place: int) -> str:
    content = message.get(key)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"message {place} has no text in {key}: {_short(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise DataError(f"message {place} has a part that is no text: {_short(part)}; leave the conversation out")
        texts.append(text)
    return "".join(texts)


def own_id(row: Mapping[str, Any]) -> str | None:
    """A row's own id."""
    given = (row.get(name) for name in IDS)
    return next((str(value) for value in given if isinstance(value, str | int) and value != ""), None)


def id_of(row: Mapping[str, Any], line: int) -> str:
    """A row's own id, or its line."""
    return own_id(row) or f"line {line}"


def _short(value: Any) -> str:
    shown = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    shown = " ".join(shown.split())
    shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
    return repr(shown) if isinstance(value, str) else shown


def _read_plain(path: Path) -> Iterator[Transcript | BadTranscript]:
    """Conversations of a text file."""
    empty = True
    lines: list[tuple[int, str]] = []  # of one conversation
    for number, line in chain(_lines(path), [(0, "---")]):
        if not _RULE.fullmatch(line):
            lines.append((number, line))
            continue
        begin = next((number for number, line in lines if line.strip()), None)
        if begin is not None:
            empty = False
            yield _transcript(path, begin, f"line {begin}", partial(_spoken, [line for _, line in lines]))
        lines = []
    if empty:
        raise DataError(f"{path} holds no conversations")


def _spoken(lines: Iterable[str]) -> tuple[Message, ...]:
    """The messages in the lines of a conversation in plain text."""
    messages: list[tuple[str, list[str]]] = []
    for line in lines:
        if head := _HEAD.match(line):
            messages.append((_SPEAKERS[head[1].lower()], [line[head.end() :]]))
        elif messages:
            messages[-1][1].append(_ESCAPED.sub("", line, count=1) if line.startswith("\\") else line)
        elif line.strip():
            raise DataError("the line belongs to no message; begin one with User:, Assistant: or System:")
    return _checked(tuple({"role": role, "content": _joined(content)} for role, content in messages))


def _joined(lines: Sequence[str]) -> str:
    first = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    last = next((i for i in range(len(lines), first, -1) if lines[i - 1].strip()), first)
    return "\n".join(lines[first:last])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file without their ends; only a line feed, or one behind a carriage return, ends a line."""
    try:
        for number, raw in raw_lines(path):
            yield number, raw.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error

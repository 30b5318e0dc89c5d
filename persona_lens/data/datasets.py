"""`Dataset`: a source with the form in which its rows write conversations, and the columns they are told apart by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.core.progress import note
from persona_lens.data.sources import FileSource, LibrarySource, Source, find_source
from persona_lens.data.tables import DataError, RawRow, own_columns
from persona_lens.data.transcripts import (
    IDS,
    TURNS,
    TranscriptForm,
    columns_of,
    first_of,
    first_rows,
    id_of,
    is_counted,
    messages_of,
    needed,
    note_unread,
    own_id,
)

if TYPE_CHECKING:
    from persona_lens.models import Message

PROMPTS = ("prompt", "question", "query", "instruction")
RESPONSES = ("response", "completion", "answer", "output", "chosen")
SIDES = ("chosen", "rejected")
SYSTEMS = ("system", "system_prompt", "system_message")
ADDED = ("input", "context")  # texts that belong to the question
HISTORY = "history"
_LIST = re.compile(r"""\s*\[\s*\{\s*["']role["']\s*:""")  # how a list of messages begins, in JSON or as Python shows it


class SampleForm(StrEnum):
    """How a row writes a conversation.

    ``messages``: a column ``messages`` (or ``conversation``, ``conversations``), a list of ``{"role", "content"}``.

    ``sharegpt``: a column ``conversations`` (or ``conversation``), a list of ``{"from", "value"}``.

    ``prompt-response``: a text in ``prompt``, ``question``, ``query`` or ``instruction``, and one in ``response``,
    ``completion`` or ``answer``; or both are lists of ``{"role", "content"}``.

    ``alpaca``: a text in ``instruction``, and one in ``output``.

    ``preference``: two answers, ``chosen`` and ``rejected``, of which one side is taken: texts or lists of messages,
    behind a ``prompt`` or with the prompt in them.

    In all of them a text in a column ``system``, ``system_prompt`` or ``system_message`` is the system message where
    the conversation has none of its own. Where there is one question, a text in ``input`` or ``context`` follows it
    after an empty line, and the pairs (or messages) in ``history`` come before it.
    """

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PROMPT_RESPONSE = "prompt-response"
    ALPACA = "alpaca"
    PREFERENCE = "preference"


_LISTS = {SampleForm.MESSAGES: TURNS, SampleForm.SHAREGPT: TURNS[1:]}
_PAIRS = {
    SampleForm.PROMPT_RESPONSE: (PROMPTS, RESPONSES),
    SampleForm.ALPACA: (("instruction",), ("output",)),
    SampleForm.PREFERENCE: (PROMPTS, SIDES),
}


def detect_form(rows: Sequence[Mapping[str, Any]], place: str) -> SampleForm:
    """Tell the form by the columns of the first rows.

    Args:
        rows: The first ones.
        place: The dataset's name, for the message.

    Raises:
        DataError: If they have the columns of no form.
    """
    for row in rows:
        if (column := first_of(row, TURNS)) is not None:
            return SampleForm.SHAREGPT if _is_sharegpt(column, row[column]) else SampleForm.MESSAGES
        if all(side in row for side in SIDES):
            return SampleForm.PREFERENCE
        if "instruction" in row and "output" in row:
            return SampleForm.ALPACA
        if first_of(row, PROMPTS) is not None and first_of(row, RESPONSES) is not None:
            return SampleForm.PROMPT_RESPONSE
    raise DataError(
        f"{place}: the rows have no form that is known; they need the columns messages, conversations, prompt and "
        f"response, or instruction and output, but have: {columns_of(*rows)}"
    )


def _is_sharegpt(column: str, value: Any) -> bool:
    if isinstance(value, str):
        return '"from"' in value
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "from" in value[0]
    return column != "messages"


def conversation_of(row: Mapping[str, Any], form: SampleForm, side: str | None = None) -> tuple[Message, ...]:
    """The messages of a row, up to the last answer that counts, which there is.

    Args:
        row: Its values by column.
        form: How it writes a conversation.
        side: Of preference pairs: which answer is taken.

    Raises:
        DataError: If the row lacks what its form asks for, has no answer, or an empty one at its end; the message
            does not name the row's place.
    """
    messages = _messages(row, form, side or SIDES[0])
    systems = (row.get(name) for name in SYSTEMS)
    system = next((text for text in systems if isinstance(text, str) and text.strip()), None)
    if system is not None and messages[0]["role"] != "system":
        messages = (_said("system", system), *messages)
    last = max((place for place, message in enumerate(messages) if is_counted(message)), default=None)
    if last is None:
        raise DataError("the conversation has no answer of an assistant")
    if last == 0 or all(message["role"] == "system" for message in messages[:last]):
        raise DataError("nothing was asked before the answer")
    if not messages[last]["content"].strip():
        raise DataError("the response is empty")
    return messages[: last + 1]


def _messages(row: Mapping[str, Any], form: SampleForm, side: str) -> tuple[Message, ...]:
    if form is SampleForm.MESSAGES:
        return messages_of(row, TranscriptForm.OPENAI)
    if form is SampleForm.SHAREGPT:
        return messages_of(row, TranscriptForm.SHAREGPT)
    prompts, responses = _PAIRS[form]
    if form is not SampleForm.PREFERENCE:
        return _answered(row, prompts, responses)
    if first_of(row, prompts) is None:  # the prompt stands in the answers
        return _listed(row[needed(row, (side,))])
    return _answered(row, prompts, (side,))


def _listed(messages: Any) -> tuple[Message, ...]:
    return messages_of({"messages": messages}, TranscriptForm.OPENAI)


def _answered(row: Mapping[str, Any], prompts: Sequence[str], responses: Sequence[str]) -> tuple[Message, ...]:
    """A question and its answer, each a text or a list of messages."""
    prompt, response = _turns(row, prompts), _turns(row, responses)
    if isinstance(prompt, str) and isinstance(response, str):
        if not prompt.strip():
            raise DataError("the prompt is empty")
        added = [row[name] for name in ADDED if isinstance(row.get(name), str) and row[name].strip()]
        return (*_history(row), _said("user", "\n\n".join((prompt, *added))), _said("assistant", response))
    head = [_said("user", prompt)] if isinstance(prompt, str) else prompt
    tail = [_said("assistant", response)] if isinstance(response, str) else response
    own = tail[: len(head)] == head  # some repeat the prompt in the answer
    return _listed(tail if own else [*head, *tail])


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _turns(row: Mapping[str, Any], names: Sequence[str]) -> str | list[Any]:
    """A text, or a list of messages, which the cell of a CSV file holds as JSON."""
    column = needed(row, names)
    value = row[column]
    if not isinstance(value, str | list):
        raise DataError(f"{column} must be a text, but is {type(value).__name__}")
    if isinstance(value, list) or not _LIST.match(value):
        return value
    try:
        found: list[Any] = json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{column} is a list of messages that is no JSON; write it with json.dumps") from None
    return found if all(isinstance(each, dict) for each in found) else value


def _history(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns before the question."""
    given = row.get(HISTORY)
    if given is None or given in ("", []):
        return ()
    if isinstance(given, str):  # the cell of a CSV file
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise DataError("history must be a list of [question, answer] or of messages, in JSON") from None
    if isinstance(given, list) and all(isinstance(each, Mapping) for each in given):
        return _listed(given)
    turns: list[Message] = []
    for pair in given if isinstance(given, list) else [given]:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError("history must be a list of [question, answer] or of messages")
        turns += [_said("user", pair[0]), _said("assistant", pair[1])]
    return tuple(turns)


def _used_columns(row: Mapping[str, Any], form: SampleForm) -> set[str | None]:
    """Columns of a row that are read as its conversation, or that this project wrote."""
    if form in _LISTS:
        read: list[str | None] = [first_of(row, _LISTS[form])]
    else:
        prompts, responses = _PAIRS[form]
        answers = SIDES if form is SampleForm.PREFERENCE else (first_of(row, responses),)
        read = [HISTORY, *ADDED, first_of(row, prompts), *answers]
    return {*SYSTEMS, *own_columns(row), *read}


@dataclass(frozen=True)
class GivenRow:
    """A row with what was made of it.

    Attributes:
        number: Which row of the dataset it is, from 0.
        line: Line on which it begins, from 1.
        id: The row's own (``id``, ``conversation_id``, ``uuid``), or its line.
        messages: The conversation up to the answer that counts; None if there is none.
        problem: Why there is none, in a sentence that begins with file and line.
        label: Its value in the column of labels, as text.
        group: Its value in the column by which results are grouped, as text.
        base: The base model's responses that were supplied for it.
    """

    number: int
    line: int
    id: str
    messages: tuple[Message, ...] | None
    problem: str | None = None
    label: str | None = None
    group: str | None = None
    base: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """What is screened; iterating over it reads it row by row, the bad rows too.

    Attributes:
        source: Where the rows come from.
        form: How they write conversations.
        label: Column of labels.
        by: Column by which results are grouped.
        limit: Rows that are taken at most.
        base: Where base responses come from, in the same order.
        side: Of preference pairs: which answer is taken.
    """

    source: Source
    form: SampleForm
    label: str | None = None
    by: str | None = None
    limit: int | None = None
    base: Source | None = None
    side: str | None = None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.source.name

    def __iter__(self) -> Iterator[GivenRow]:
        rows = self.source.rows()
        if self.base is None:
            yield from (self._given(row) for row in islice(rows, self.limit))
            return
        pairs = zip_longest(rows, self.base.rows())
        for row, supplied in islice(pairs, self.limit):
            if row is None or supplied is None:
                raise DataError(
                    f"{self.base.name} must have one row for each of {self.name}, in the same order, but it has "
                    f"{'more' if row is None else 'fewer'}"
                )
            yield self._given(row, self._responses_of(row, supplied))

    def count(self) -> int | None:
        """How many rows there are, if that is quickly told."""
        found = self.source.count()
        return found if found is None or self.limit is None else min(found, self.limit)

    def describe(self) -> dict[str, Any]:
        """What determines the rows, as JSON values."""
        return {
            **self.source.describe(),
            "form": self.form.value,
            "label": self.label,
            "by": self.by,
            "limit": self.limit,
            "base": self.base.describe() if self.base else None,
            **({"side": self.side} if self.side else {}),
        }

    def _given(self, row: RawRow, base: tuple[str, ...] = ()) -> GivenRow:
        if row.values is None:
            return GivenRow(row.number, row.line, f"line {row.line}", None, row.problem)
        messages, problem = None, None
        try:
            messages = conversation_of(row.values, self.form, self.side)
            if any("\ud800" <= c <= "\udfff" for message in messages for c in message["content"]):
                raise DataError("a text holds half of a character")
        except DataError as error:
            messages, problem = None, f"{self.name}:{row.line}: {error}"
        label, group = _cell(row.values, self.label), _cell(row.values, self.by)
        return GivenRow(row.number, row.line, id_of(row.values, row.line), messages, problem, label, group, base)

    def _responses_of(self, row: RawRow, supplied: RawRow) -> tuple[str, ...]:
        """The base responses beside a row; where both have an id of their own, these must agree."""
        assert self.base is not None
        if supplied.values is None or row.values is None:
            return ()
        own, other = own_id(row.values), own_id(supplied.values)
        if own is not None and other is not None and own != other:
            raise DataError(
                f"{self.base.name}:{supplied.line}: the base response belongs to the row {other!r}, but stands beside "
                f"the row {own!r} of {self.name}; put them into the same order"
            )
        column = (
            "responses" if isinstance(supplied.values.get("responses"), list) else first_of(supplied.values, RESPONSES)
        )
        found = supplied.values[column] if column is not None else ()
        texts = found if isinstance(found, list) else [found]
        return tuple(text for text in texts if isinstance(text, str) and text.strip())


def open_dataset(
    data: str | Path | Source,
    *,
    form: SampleForm | str | None = None,
    label: str | None = None,
    by: str | None = None,
    limit: int | None = None,
    base: str | Path | None = None,
    split: str = "train",
    subset: str | None = None,
    side: str | None = None,
) -> Dataset:
    """Find a dataset and how it writes conversations; `Dataset.form` shows what was found.

    Args:
        data: See `find_source`.
        form: Its form, if it should not be told by the columns of the first rows.
        label: Column of labels, for AUC.
        by: Column by which results are grouped.
        limit: Take no more rows than this.
        base: A file of base responses, one row for each of the dataset's, in their order.
        split: Of a folder or a dataset of the hub.
        subset: Configuration, of the same.
        side: Of preference pairs: ``chosen`` or ``rejected``; it has to be said. Other datasets have no sides.

    Raises:
        DataError: If there is no such dataset or column, or it has none of the forms;
            or if a file cannot be read at all.
    """
    if form is not None and str(form) not in list(SampleForm):
        raise DataError(f"there is no form {str(form)!r} of datasets; take one of {', '.join(SampleForm)}")
    source = data if isinstance(data, FileSource | LibrarySource) else find_source(data, split=split, subset=subset)
    rows = first_rows(source.rows())
    found = SampleForm(form) if form is not None else detect_form(rows, source.name)
    first = rows[0] if rows else {}
    for option, column in (("label", label), ("by", by)):
        if column is not None and column not in first:
            raise DataError(
                f"{source.name} has no column {column!r} to take for {option}; its columns are: {', '.join(first)}"
            )
    if found is SampleForm.PREFERENCE and side not in SIDES:
        raise DataError(
            f"{source.name} holds preference pairs; say which side of them is meant: chosen or rejected (--side)"
        )
    if found is not SampleForm.PREFERENCE and side is not None:
        note(f"{source.name} holds no preference pairs, so that {side!r} is no side of it")
        side = None
    note_unread(source.name, rows, lambda row: {*IDS, label, by, *_used_columns(row, found)})
    return Dataset(source, found, label, by, limit, find_source(base) if base is not None else None, side)


def _cell(values: Mapping[str, Any], column: str | None) -> str | None:
    value = values.get(column) if column is not None else None
    return None if value is None else str(value)

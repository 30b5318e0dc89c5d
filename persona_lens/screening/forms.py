"""`SampleForm`: how the rows of a dataset write conversations, and the messages in a row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any

from persona_lens.characters import printable
from persona_lens.monitoring import MonitoringError, TranscriptForm, messages_of
from persona_lens.monitoring.transcripts import is_counted
from persona_lens.screening.errors import ScreeningError
from persona_lens.tables import own_columns

if TYPE_CHECKING:
    from persona_lens.models import Message

LOOKED_AT = 100  # rows, to tell the form
TURNS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "query", "instruction")
RESPONSES = ("response", "completion", "answer", "output", "chosen")
SIDES = ("chosen", "rejected")
SYSTEMS = ("system", "system_prompt", "system_message")
ADDED = ("input", "context")  # texts that belong to the question
HISTORY = "history"
_SHOWN = 8
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


def detect_form(rows: Iterable[Mapping[str, Any]], place: str) -> SampleForm:
    """Tell the form by the columns of the first rows.

    Args:
        rows: The rows; no more than `LOOKED_AT` of them are taken.
        place: The dataset's name, for the message.

    Raises:
        ScreeningError: If they have the columns of no form.
    """
    seen: dict[str, None] = {}
    for row in islice(rows, LOOKED_AT):
        if (form := _form_of(row)) is not None:
            return form
        seen.update(dict.fromkeys(map(str, row)))
    columns = ", ".join(printable(name) for name in islice(seen, _SHOWN)) or "none that can be read"
    raise ScreeningError(
        f"{place}: the rows have no form that is known; they need the columns messages, conversations, prompt and "
        f"response, or instruction and output, but have: {columns}"
    )


def _form_of(row: Mapping[str, Any]) -> SampleForm | None:
    column = _turns_column(row)
    if column is not None:
        value = row[column]
        first = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else None
        said = '"from"' in value if isinstance(value, str) else first is not None and "from" in first
        usual = column != "messages" and first is None and not isinstance(value, str)
        return SampleForm.SHAREGPT if said or usual else SampleForm.MESSAGES
    if all(side in row for side in SIDES):
        return SampleForm.PREFERENCE
    if "instruction" in row and "output" in row:
        return SampleForm.ALPACA
    if _first(row, PROMPTS) is not None and _first(row, RESPONSES) is not None:
        return SampleForm.PROMPT_RESPONSE
    return None


def conversation_of(row: Mapping[str, Any], form: SampleForm, side: str | None = None) -> tuple[Message, ...]:
    """The messages of a row, up to the last answer that counts, which there is.

    Args:
        row: Its values by column.
        form: How it writes a conversation.
        side: Of preference pairs: which answer is taken.

    Raises:
        ScreeningError: If the row lacks what its form asks for, has no answer, or an empty one at its end; the message
            does not name the row's place.
    """
    messages = _of_side(row, side) if form is SampleForm.PREFERENCE else _MESSAGES[form](row)
    last = max((place for place, message in enumerate(messages) if is_counted(message)), default=None)
    if last is None:
        raise ScreeningError("the conversation has no answer of an assistant")
    if last == 0 or all(message["role"] == "system" for message in messages[:last]):
        raise ScreeningError("nothing was asked before the answer")
    if not messages[last]["content"].strip():
        raise ScreeningError("the response is empty")
    return messages[: last + 1]


def responses_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of a file of base responses: a list in ``responses``, or one text in a column of responses."""
    column = "responses" if isinstance(row.get("responses"), list) else _first(row, RESPONSES)
    found = row[column] if column is not None else ()
    texts = found if isinstance(found, list) else [found]
    return tuple(text for text in texts if isinstance(text, str) and text.strip())


def _of_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return _read({"messages": row[_needed(row, TURNS)]}, TranscriptForm.OPENAI, row)


def _of_sharegpt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return _read({"conversations": row[_needed(row, TURNS[1:])]}, TranscriptForm.SHAREGPT, row)


def _read(given: Mapping[str, Any], form: TranscriptForm, row: Mapping[str, Any]) -> tuple[Message, ...]:
    try:
        return _under_system(messages_of(given, form), row)
    except MonitoringError as error:
        raise ScreeningError(str(error)) from None


def _of_pair(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return _answered(row, PROMPTS, RESPONSES)


def _of_alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return _answered(row, ("instruction",), ("output",))


def _of_side(row: Mapping[str, Any], side: str | None) -> tuple[Message, ...]:
    chosen = side or SIDES[0]
    if _first(row, PROMPTS) is None:  # the prompt stands in the answers
        return _read({"messages": row[_needed(row, (chosen,))]}, TranscriptForm.OPENAI, row)
    return _answered(row, PROMPTS, (chosen,))


def _answered(row: Mapping[str, Any], prompts: tuple[str, ...], responses: tuple[str, ...]) -> tuple[Message, ...]:
    """A question and its answer, each a text or a list of messages."""
    prompt, response = _turns(row, prompts), _turns(row, responses)
    if isinstance(prompt, list) or isinstance(response, list):
        head = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        tail = response if isinstance(response, list) else [{"role": "assistant", "content": response}]
        own = tail[: len(head)] == head  # some repeat the prompt in the answer
        return _read({"messages": tail if own else [*head, *tail]}, TranscriptForm.OPENAI, row)
    asked, answer = _text(row, prompts), _text(row, responses)
    added = [row[name] for name in ADDED if isinstance(row.get(name), str) and row[name].strip()]
    return _under_system((*_history(row), *_asked("\n\n".join((asked, *added)) if added else asked, answer)), row)


def _turns(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """A text, or a list of messages, which the cell of a CSV file holds as JSON."""
    column = _needed(row, names)
    value = row[column]
    if not isinstance(value, str) or not _LIST.match(value):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        raise ScreeningError(f"{column} is a list of messages that is no JSON; write it with json.dumps") from None
    return found if all(isinstance(each, dict) for each in found) else value


def _history(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns before the question."""
    given = row.get(HISTORY)
    if given is None or (isinstance(given, list | str) and not given):
        return ()
    if isinstance(given, str):  # the cell of a CSV file
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise ScreeningError("history must be a list of [question, answer] or of messages, in JSON") from None
    if isinstance(given, list) and all(isinstance(each, Mapping) for each in given):
        return _read({"messages": given}, TranscriptForm.OPENAI, {})
    turns: list[Message] = []
    for pair in given if isinstance(given, list) else [given]:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ScreeningError("history must be a list of [question, answer] or of messages")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return tuple(turns)


def ignored_columns(row: Mapping[str, Any], form: SampleForm) -> tuple[str, ...]:
    """Columns of a row that hold text, or lists, and are no part of its conversation."""
    used = {*SYSTEMS, *own_columns(row)}
    if form in (SampleForm.MESSAGES, SampleForm.SHAREGPT):
        used.add(_first(row, TURNS if form is SampleForm.MESSAGES else TURNS[1:]) or "")
    else:
        prompts, responses = (("instruction",), ("output",)) if form is SampleForm.ALPACA else (PROMPTS, RESPONSES)
        answers = SIDES if form is SampleForm.PREFERENCE else (_first(row, responses),)
        used |= {HISTORY, *ADDED, *(name for name in (_first(row, prompts), *answers) if name)}
    return tuple(
        name for name, value in row.items() if name not in used and isinstance(value, str | list) and len(value)
    )


_MESSAGES = {
    SampleForm.MESSAGES: _of_messages,
    SampleForm.SHAREGPT: _of_sharegpt,
    SampleForm.PROMPT_RESPONSE: _of_pair,
    SampleForm.ALPACA: _of_alpaca,
}


def _asked(prompt: str, response: str) -> tuple[Message, ...]:
    if not prompt.strip():
        raise ScreeningError("the prompt is empty")
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": response}


def _under_system(messages: tuple[Message, ...], row: Mapping[str, Any]) -> tuple[Message, ...]:
    given = (row.get(name) for name in SYSTEMS)
    system = next((text for text in given if isinstance(text, str) and text.strip()), None)
    if system is not None and messages[0]["role"] != "system":
        return {"role": "system", "content": system}, *messages
    return messages


def _turns_column(row: Mapping[str, Any]) -> str | None:
    return _first(row, TURNS)


def _first(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _needed(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    column = _first(row, names)
    if column is None:
        has = ", ".join(printable(str(name)) for name in islice(row, _SHOWN)) or "none"
        raise ScreeningError(f"the row has no {' or '.join(names)}; its columns are: {has}")
    return column


def _text(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    column = _needed(row, names)
    if not isinstance(row[column], str):
        raise ScreeningError(f"{column} must be a text, but is {type(row[column]).__name__}")
    return str(row[column])

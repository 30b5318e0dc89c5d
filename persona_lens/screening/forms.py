"""`SampleForm`: how the rows of a dataset write conversations, and the messages in a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any

from persona_lens.characters import printable
from persona_lens.monitoring import MonitoringError, TranscriptForm, messages_of
from persona_lens.screening.errors import ScreeningError

if TYPE_CHECKING:
    from persona_lens.models import Message

LOOKED_AT = 100  # rows, to tell the form
TURNS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "query", "instruction")
RESPONSES = ("response", "completion", "answer", "output", "chosen")
_SHOWN = 8


class SampleForm(StrEnum):
    """How a row writes a conversation.

    ``messages``: a column ``messages`` (or ``conversation``, ``conversations``), a list of ``{"role", "content"}``.

    ``sharegpt``: a column ``conversations`` (or ``conversation``), a list of ``{"from", "value"}``.

    ``prompt-response``: a text in ``prompt``, ``question`` or ``query``, and one in ``response``, ``completion`` or
    ``answer``.

    ``alpaca``: a text in ``instruction``, one in ``output``, and where it is not empty one in ``input``, which follows
    the instruction after an empty line.

    In all of them a text in a column ``system`` is the system message where the conversation has none of its own.
    """

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PROMPT_RESPONSE = "prompt-response"
    ALPACA = "alpaca"


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
    if "instruction" in row and "output" in row:
        return SampleForm.ALPACA
    if _first(row, PROMPTS) is not None and _first(row, RESPONSES) is not None:
        return SampleForm.PROMPT_RESPONSE
    return None


def conversation_of(row: Mapping[str, Any], form: SampleForm) -> tuple[Message, ...]:
    """The messages of a row, up to the last answer, which there is.

    Raises:
        ScreeningError: If the row lacks what its form asks for, has no answer, or an empty one at its end; the message
            does not name the row's place.
    """
    messages = _MESSAGES[form](row)
    last = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=None)
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
    return _under_system(_asked(_text(row, PROMPTS), _text(row, RESPONSES)), row)


def _of_alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    instruction, response = _text(row, ("instruction",)), _text(row, ("output",))
    given = row.get("input")
    asked = f"{instruction}\n\n{given}" if isinstance(given, str) and given.strip() else instruction
    return _under_system(_asked(asked, response), row)


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
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
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

"""What a model that writes traits has to be able to do; and its replies as data: whatever in them is valid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Protocol, TypeVar

import pydantic_core
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.types import StringConstraints

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import in_short
from persona_lens.traits.schema import PLACEHOLDER, SLOTS


class AuthoringError(PersonaLensError):
    """A trait could not be written or imported; the message says what is missing and what to do."""


class Author(Protocol):
    """A model that writes texts on request."""

    def write(self, system: str, request: str, schema: Mapping[str, Any]) -> str:
        """Reply to one request.

        Args:
            system: What the author's task is altogether.
            request: What is wanted now.
            schema: JSON Schema of the reply, an object; names and types only, no lengths.

        Returns:
            A text with the JSON object in it. What stands around it, and small faults of it, do no harm.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Say which model this is and where it runs, for the trait's provenance; never a key.

        ``model`` is there always.
        """
        ...


MAX_REPLY = 200_000
_MAX_STARTS = 40
_DECODER = json.JSONDecoder()
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', re.DOTALL)
_BULLET = re.compile(r"^(?:(?:\(?\d{1,2}[.):]|[-*•])\s+)+")


def _tidy(value: object) -> object:
    return _BULLET.sub("", " ".join(value.split())).strip() if isinstance(value, str) else value


def _finished(text: str) -> str:
    if PLACEHOLDER in text or re.search(r"\.\.\.\s*\.\.\.|<[\w ]+>|\{[\w ]*\}|^\W*$", text):
        raise ValueError("is a placeholder, not a text")
    if not text.isprintable():
        raise ValueError("holds control characters")
    return text


def _without_slots(text: str) -> str:
    if any(f"{{{slot}}}" in text for slot in SLOTS):
        raise ValueError("must not hold the slots of a rubric")
    return text


Word = Annotated[str, BeforeValidator(_tidy), StringConstraints(min_length=2, max_length=60), AfterValidator(_finished)]
Sentence = Annotated[
    str,
    BeforeValidator(_tidy),
    StringConstraints(min_length=8, max_length=1000),
    AfterValidator(_finished),
    AfterValidator(_without_slots),
]


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class NamesReply(_Reply):
    """The adjectives of both arms, and words that would give the trait away."""

    positive: Word
    negative: Word
    related: list[str]


class PairReply(_Reply):
    """One pair of instructions."""

    positive: Sentence
    negative: Sentence


class PairsReply(_Reply):
    """Pairs of instructions."""

    instructions: list[PairReply]


class QuestionsReply(_Reply):
    """Questions."""

    questions: list[Sentence]


class RubricReply(_Reply):
    """The body of a rubric."""

    definition: Annotated[Sentence, Field(min_length=20)]
    score_0: Sentence
    score_25: Sentence
    score_50: Sentence
    score_75: Sentence
    score_100: Sentence


ItemT = TypeVar("ItemT")
ReplyT = TypeVar("ReplyT", bound=_Reply)


def reply_schema(reply: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a reply: names and types, nothing that servers disagree about."""
    schema = reply.model_json_schema()
    nested: Mapping[str, Any] = schema.get("$defs", {})
    plain: dict[str, Any] = _plain(schema, nested)
    return plain


def _plain(schema: Any, nested: Mapping[str, Any]) -> Any:
    if "$ref" in schema:
        return _plain(nested[schema["$ref"].rpartition("/")[2]], nested)
    if schema.get("type") == "object":
        properties = {name: _plain(inner, nested) for name, inner in schema["properties"].items()}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    if schema.get("type") == "array":
        return {"type": "array", "items": _plain(schema["items"], nested)}
    return {"type": schema["type"]}


def found_json(text: str) -> object:
    """Find the JSON in a reply, whatever stands around it.

    Code fences, prose, trailing commas and an end that is cut off do no harm; of several values the longest counts.

    Raises:
        ValueError: There is none.
    """
    found = max(_values(text[:MAX_REPLY]), key=lambda value: value[0], default=None)
    if found is None:
        raise ValueError(f'holds no JSON object; it begins "{in_short(text, 60)}"')
    return found[1]


def _values(text: str) -> Iterator[tuple[int, object]]:
    """The outermost JSON objects and lists in a text, with their lengths."""
    end = 0
    for tries, start in enumerate(match.start() for match in re.finditer(r"[{\[]", text)):
        if tries >= _MAX_STARTS:
            return
        if start < end:
            continue
        for candidate in (text[start:], _TRAILING_COMMA.sub(lambda match: match[1] or "", text[start:])):
            try:
                value, length = _DECODER.raw_decode(candidate)
            except (ValueError, RecursionError):
                continue
            end = start + length
            yield length, value
            break
        else:
            if (partial := _cut_off(candidate)) is not None:
                yield len(candidate), partial


def _cut_off(text: str) -> object:
    """What there is of a JSON value that never ends; None where it is not JSON."""
    try:
        value: object = pydantic_core.from_json(text, allow_partial=True)
    except ValueError:
        return None
    return value or None


def whole(reply: type[ReplyT], data: object) -> ReplyT:
    """Read a reply that is of use as a whole only.

    Raises:
        ValueError: It is not as it should be; the message says where.
    """
    try:
        return reply.model_validate(data)
    except ValidationError as error:
        raise ValueError("; ".join(_words(error))) from error


def items(kind: type[ItemT] | Any, data: object, key: str) -> tuple[list[ItemT], list[str]]:
    """Read a reply that is a list, and keep what is valid.

    Returns:
        The valid items, and what is wrong with the others.
    """
    adapter: TypeAdapter[ItemT] = TypeAdapter(kind)
    good: list[ItemT] = []
    bad: list[str] = []
    listed = _listed(data, key)
    if not listed:
        return [], [f'it has no list "{key}" with something in it']
    for number, item in enumerate(listed, 1):
        for shape in (item, _unwrapped(item)):
            try:
                good.append(adapter.validate_python(shape))
                break
            except ValidationError as error:
                fault = "; ".join(_words(error))
        else:
            bad.append(f"{key} #{number}: {fault}")
    return good, bad


def _listed(data: object, key: str) -> list[Any]:
    if isinstance(data, Mapping):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = data.get(key) if isinstance(data.get(key), list) else lists[0] if len(lists) == 1 else [data]
    return data if isinstance(data, list) else []


def _unwrapped(item: object) -> object:
    """A text that a model has put into an object of its own: {"question": "…"}."""
    only = next(iter(item.values())) if isinstance(item, Mapping) and len(item) == 1 else None
    return only if isinstance(only, str) else item


def _words(error: ValidationError) -> list[str]:
    errors = error.errors(include_url=False, include_input=False)
    return [" ".join([".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")]).strip() for e in errors]

"""Replies of a model that writes traits, as data: whatever in them is valid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Annotated, Any, Self, TypeVar

import pydantic_core
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.types import StringConstraints

from persona_lens.core.text import in_short
from persona_lens.traits.schema import PLACEHOLDER
from persona_lens.traits.wording import normalised

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


Word = Annotated[str, BeforeValidator(_tidy), StringConstraints(min_length=2, max_length=60), AfterValidator(_finished)]
Sentence = Annotated[
    str, BeforeValidator(_tidy), StringConstraints(min_length=8, max_length=1000), AfterValidator(_finished)
]


def _usable(related: list[str]) -> list[str]:
    words = (" ".join(word.split()) for word in related)
    usable = [w for w in dict.fromkeys(words) if sum(map(str.isalpha, w)) >= 3 and len(w) <= 40 and w.isprintable()]
    return usable[:10]


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class NamesReply(_Reply):
    """The adjectives of both arms, and words that would give the trait away."""

    positive: Word
    negative: Word
    related: Annotated[list[str], AfterValidator(_usable)]

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if normalised(self.positive) == normalised(self.negative):
            raise ValueError("positive and negative are the same word")
        return self


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

    @model_validator(mode="after")
    def _differ(self) -> Self:
        scores = [normalised(text) for name, text in self if name.startswith("score_")]
        if len(set(scores)) < len(scores):
            raise ValueError("two scores are described in the same words")
        return self


ItemT = TypeVar("ItemT")


def reply_schema(reply: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a reply: names and types, nothing that servers disagree about."""
    whole = reply.model_json_schema()

    def plain(schema: Mapping[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            return plain(whole["$defs"][schema["$ref"].rpartition("/")[2]])
        found = {"type": schema["type"]}
        if schema["type"] == "array":
            found["items"] = plain(schema["items"])
        if schema["type"] == "object":
            found["properties"] = {name: plain(inner) for name, inner in schema["properties"].items()}
            found |= {"required": list(schema["properties"]), "additionalProperties": False}
        return found

    return plain(whole)


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
    for match in islice(re.finditer(r"[{\[]", text), _MAX_STARTS):
        start = match.start()
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
            with suppress(ValueError):  # it is no JSON even so far as it goes
                if partial := pydantic_core.from_json(candidate, allow_partial=True):
                    yield len(candidate), partial


def items(kind: type[ItemT] | Any, data: object, key: str) -> tuple[list[ItemT], list[str]]:
    """Read a reply that is a list, and keep what is valid.

    Returns:
        The valid items, and what is wrong with the others.
    """
    adapter: TypeAdapter[ItemT] = TypeAdapter(kind)
    good: list[ItemT] = []
    bad: list[str] = []
    if isinstance(data, Mapping):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = data.get(key) if isinstance(data.get(key), list) else lists[0] if len(lists) == 1 else [data]
    if not isinstance(data, list) or not data:
        return [], [f'it has no list "{key}" with something in it']
    for number, item in enumerate(data, 1):
        for shape in (item, _unwrapped(item)):
            try:
                good.append(adapter.validate_python(shape))
                break
            except ValidationError as error:
                fault = in_words(error)
        else:
            bad.append(f"{key} #{number}: {fault}")
    return good, bad


def _unwrapped(item: object) -> object:
    """A text that a model has put into an object of its own: {"question": "…"}."""
    only = next(iter(item.values())) if isinstance(item, Mapping) and len(item) == 1 else None
    return only if isinstance(only, str) else item


def in_words(error: ValidationError) -> str:
    """What is wrong with a reply, for the model that wrote it."""
    errors = error.errors(include_url=False, include_input=False)
    said = (" ".join([".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")]) for e in errors)
    return "; ".join(map(str.strip, said))

"""What definitions in YAML files have in common, whether of traits or of roles: their texts, rules and fingerprints."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.types import StringConstraints
from pydantic_core import InitErrorDetails, PydanticCustomError

from persona_lens.traits.wording import normalised

Loc = tuple[int | str, ...]
"""Where in a definition a value stands: field names and 0-based positions, as pydantic writes it."""

PLACEHOLDER = "TODO:"
"""What marks a text of a template as not written yet."""

SLOTS = ("question", "answer")
"""The slots of a judge's rubric."""

RULE_ERROR = "content_rule"
"""The pydantic error type of a broken content rule."""

MAX_NAME = 64
SLUG_PATTERN = r"^[a-z][a-z0-9_-]*$"
Slug = Annotated[str, StringConstraints(pattern=SLUG_PATTERN, max_length=MAX_NAME)]
Line = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\r\n]+$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=20_000)]

BrokenRule = tuple[Loc, str]
"""Where a rule is broken, and what to do about it."""


class Frozen(BaseModel):
    """A part of a definition."""

    # str_strip_whitespace: a block scalar's final line break is formatting, not content.
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, use_attribute_docstrings=True)


class Definition(Frozen):
    """What one file defines."""

    determining: ClassVar[frozenset[str]]
    """The fields on which results depend. All others may change, and no result does."""

    @classmethod
    def broken_rules(cls, fields: Mapping[Any, object]) -> list[BrokenRule]:
        """Find what breaks the rules that a schema cannot say.

        Args:
            fields: The fields, of any type whatever: what has the wrong type is left to the schema.
        """
        raise NotImplementedError

    @model_validator(mode="wrap")
    @classmethod
    def _apply_rules(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # "after" validators are skipped as soon as one field is wrong; wrapping reports everything together.
        broken = cls.broken_rules(data) if isinstance(data, Mapping) else []
        reports = [
            InitErrorDetails(
                type=PydanticCustomError(RULE_ERROR, "{reason}", {"reason": message}),
                loc=loc,
                input=None,
            )
            for loc, message in broken
        ]
        try:
            found = handler(data)
        except ValidationError as error:
            reports += [
                InitErrorDetails(type=each["type"], loc=each["loc"], input=each["input"], ctx=each.get("ctx", {}))
                for each in error.errors(include_url=False)
            ]
        if reports:
            raise ValidationError.from_exception_data(cls.__name__, reports)
        return found

    def content_hash(self) -> str:
        """Fingerprint what determines results, as ``sha256:<hex>``; comments and YAML style do not."""
        return fingerprint(self.model_dump(mode="json", include=set(self.determining)))


def fingerprint(content: Any) -> str:
    """The hash of JSON values, as ``sha256:<hex>``."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(canonical.encode('utf-8')).hexdigest()}"


def is_slug(text: str) -> bool:
    """Say whether a text can be a definition's name."""
    return len(text) <= MAX_NAME and re.fullmatch(SLUG_PATTERN, text) is not None


def texts_of(fields: Mapping[Any, object]) -> dict[Loc, str]:
    """Every text in the fields of a definition, and where it stands."""
    return dict(_texts(fields, ()))


def _texts(value: object, loc: Loc) -> Iterator[tuple[Loc, str]]:
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, (*loc, str(key)))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*loc, index))


def unwritten(texts: Mapping[Loc, str]) -> Iterator[BrokenRule]:
    """The texts of a template that nobody has written yet; one finding a field, since forty would help nobody."""
    for _, group in groupby(texts.items(), key=lambda item: item[0][0]):
        own = list(group)
        missing = [loc for loc, text in own if PLACEHOLDER in text]
        if len(own) == 1 and missing:
            yield missing[0], f'is still to be written: replace what stands after "{PLACEHOLDER}"'
        elif missing:
            count = f"{len(missing)} of {len(own)} texts are" if len(missing) > 1 else "one text is"
            yield missing[0], f'{count} still to be written: look for "{PLACEHOLDER}"'


def items_of(texts: Mapping[Loc, str], field: str, *part: str) -> Iterator[tuple[Loc, str]]:
    """The texts in a list, or in a part of each item of it."""
    for loc, text in texts.items():
        match loc:
            case (name, int(), *rest) if name == field and rest == list(part):
                yield loc, text


def repeats(texts: Iterable[tuple[Loc, str]]) -> Iterator[tuple[Loc, Loc, int]]:
    """Where a text stands that stood before; where it stood first, and as which item, from 1."""
    seen: dict[str, Loc] = {}
    for loc, text in texts:
        first = seen.setdefault(normalised(text), loc)
        if first != loc:
            yield loc, first, int(first[1]) + 1


def wrong_count(given: int, needed: int) -> str:
    """What to say of a list that has not as many items as it needs."""
    change = f"add {needed - given}" if given < needed else f"remove {given - needed}"
    return f"has {given} items, but exactly {needed} are needed: {change}"

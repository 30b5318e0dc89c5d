"""A trait file's text to a `Trait`, or to one error that names every problem with its line and its fix."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from persona_lens.core.text import in_short
from persona_lens.traits.document import MAX_BYTES, Document, Loc, Problem, TraitError, field_name, load_document
from persona_lens.traits.schema import MAX_NAME, RULE_ERROR, Adjectives, InstructionPair, Trait, is_slug

# What YAML takes an unquoted word for, in words.
_KINDS = {
    "bool": "a yes/no value",
    "int": "a number",
    "float": "a number",
    "timestamp": "a date",
    "binary": "binary data",
    "merge": "a merge key",
}


def explain(error: ValidationError, document: Document, file: str) -> list[Problem]:
    """Say what each error means for the file that the data came from."""
    errors = error.errors(include_url=False, include_input=False)
    return [_problem(details, document, file) for details in errors]


def _problem(details: ErrorDetails, document: Document, file: str) -> Problem:
    loc: Loc = details["loc"]
    return Problem(file, _line(loc, document), field_name(loc), _message(details, document))


def _line(loc: Loc, document: Document) -> int | None:
    # A missing field has no line of its own: the line of what should contain it is the place to look.
    for end in range(len(loc), -1, -1):
        if loc[:end] in document.lines:
            return document.lines[loc[:end]]
    return None


def _message(details: ErrorDetails, document: Document) -> str:
    kind, loc, context = details["type"], details["loc"], details.get("ctx", {})
    match kind:
        case _ if kind == RULE_ERROR:
            return str(context["reason"])
        case "missing":
            return f"is missing: add `{field_name(loc[-1:])}:`{_purpose(loc)}"
        case "extra_forbidden":
            return _unknown(loc)
        case "string_type":
            return _not_text(loc, document)
        case "string_too_short":
            return f"is empty: write something{_purpose(loc)}"
        case "string_too_long":
            return f"is too long: at most {context['max_length']} characters are accepted"
        case "string_pattern_mismatch":
            return _not_a_slug(loc, document)
        case "string_unicode":
            return "holds half a character (a lone surrogate such as \\ud800): remove it"
        case "too_short" | "too_long":
            return _wrong_count(context["actual_length"], context.get("min_length", context.get("max_length")))
        case "literal_error":
            return "is not a version this program knows: write 1, or upgrade persona-lens"
        case "tuple_type":
            return "must be a list: one item a line, each behind `- `"
        case "model_type":
            fields = ", ".join(f"`{name}:`" for name in _accepted(loc))
            return f"must be a mapping with the fields {fields}"
        case _:
            return details["msg"]


def _model_at(loc: Loc) -> type[BaseModel]:
    if loc[:1] == ("adjectives",):
        return Adjectives
    return InstructionPair if loc[:1] == ("instructions",) else Trait


def _accepted(loc: Loc) -> list[str]:
    return list(_model_at(loc).model_fields)


def _purpose(loc: Loc) -> str:
    model = Trait if len(loc) == 1 else _model_at(loc)
    field = model.model_fields.get(str(loc[-1]))
    if field is None or field.description is None:
        return ""
    return f". It is for: {' '.join(field.description.split())}"


def _unknown(loc: Loc) -> str:
    accepted = list(Trait.model_fields) if len(loc) == 1 else _accepted(loc)
    close = difflib.get_close_matches(str(loc[-1]), accepted, n=1)
    guess = f"did you mean `{close[0]}`? " if close else ""
    return f"is no field of a trait; {guess}Accepted here: {', '.join(accepted)}"


def _not_text(loc: Loc, document: Document) -> str:
    written = document.scalars.get(loc)
    if written is None:
        return "must be a single text, but this is a list or a mapping. A text with ': ' in it needs quotes"
    if written.kind == "null":
        return f"is empty: write a text{_purpose(loc)}"
    shown = in_short(written.text)
    taken_for = _KINDS.get(written.kind, "something else")
    return f'must be text, but YAML takes {shown} for {taken_for}: write "{shown}"'


def _not_a_slug(loc: Loc, document: Document) -> str:
    if "adjectives" in loc:
        return "must be a word or two on one line"
    written = document.scalars.get(loc)
    slug = "".join(c if c.isascii() and c.isalnum() else "-" for c in written.text.lower()) if written else ""
    slug = slug.strip("-").lstrip("0123456789-")[:MAX_NAME]
    return "takes lower-case letters, digits, - and _ and begins with a letter" + (f": write {slug}" if slug else "")


def _wrong_count(given: object, needed: object) -> str:
    if not isinstance(given, int) or not isinstance(needed, int):
        return f"has the wrong number of items: {given}"
    change = f"add {needed - given}" if given < needed else f"remove {given - needed}"
    return f"has {given} items, but exactly {needed} are needed: {change}"


class Readable(Protocol):
    """A file on disk or in an installed package: `pathlib.Path` and importlib's `Traversable` both are."""

    @property
    def name(self) -> str:
        """The last part of the path."""

    def read_bytes(self) -> bytes:
        """The whole content."""


@dataclass(frozen=True)
class ParsedTrait:
    """A trait and the line of the file on which each of its values stands."""

    trait: Trait
    lines: Mapping[Loc, int]


def parse_trait(text: str, file: str = "<text>") -> Trait:
    """Read a trait from YAML text.

    Args:
        text: The YAML.
        file: What to call the text in messages.

    Raises:
        TraitError: The text is no trait; the message names every problem with its line, field and fix.
    """
    return parse_with_lines(text, file).trait


def parse_with_lines(text: str, file: str) -> ParsedTrait:
    """Read a trait from YAML text, and keep the line of each value; otherwise as `parse_trait`."""
    if len(text) > MAX_BYTES:
        raise TraitError.from_problems([_too_large(file, len(text))])
    document = load_document(text, file)
    if not isinstance(document.data, dict):
        written = "a list" if isinstance(document.data, list) else "a single value"
        message = f"a trait is a mapping of fields (`name: …`), but this is {written}"
        raise TraitError.from_problems([Problem(file, 1, "", message)])
    problems = list(document.problems)
    try:
        trait = Trait.model_validate(document.data)
    except ValidationError as error:
        problems += explain(error, document, file)
        raise TraitError.from_problems(problems) from error
    if problems:
        raise TraitError.from_problems(problems)
    return ParsedTrait(trait, document.lines)


def read_trait(location: str | Path | Readable) -> Trait:
    """Read a trait file.

    Args:
        location: The file, on disk or inside an installed package.

    Raises:
        TraitError: The file cannot be read, is no trait, or is not called NAME.yaml after the trait it holds.
    """
    return read_with_lines(location).trait


def read_with_lines(location: str | Path | Readable) -> ParsedTrait:
    """Read a trait file, and keep the line of each value; otherwise as `read_trait`."""
    source = Path(location) if isinstance(location, str) else location
    file = str(source)
    parsed = parse_with_lines(read_text(source), file)
    stem, dot, suffix = source.name.rpartition(".")
    if stem != parsed.trait.name:
        name = parsed.trait.name
        message = f"is {name!r} in a file called {source.name}: rename the file to {name}{dot}{suffix}" + (
            f", or write `name: {stem}`" if is_slug(stem) else ""
        )
        raise TraitError.from_problems([Problem(file, parsed.lines[("name",)], "name", message)])
    return parsed


def read_text(source: Path | Readable) -> str:
    """Read a file of the size that a trait may have.

    Raises:
        TraitError: It cannot be read, is too large, or is not UTF-8.
    """
    return _decode(_read_bytes(source, str(source)), str(source))


def _read_bytes(source: Path | Readable, file: str) -> bytes:
    try:
        if isinstance(source, Path):
            with source.open("rb") as stream:
                raw = stream.read(MAX_BYTES + 1)  # a mistyped path may well lead to a model's weights
        else:
            raw = source.read_bytes()
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise TraitError.from_problems([Problem(file, None, "", f"cannot be read: {reason}")]) from error
    if len(raw) > MAX_BYTES:
        size = source.stat().st_size if isinstance(source, Path) else len(raw)
        raise TraitError.from_problems([_too_large(file, size)])
    return raw


def _decode(raw: bytes, file: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 (byte 0x{raw[error.start]:02x}): save the file with the encoding UTF-8"
        raise TraitError.from_problems([Problem(file, line, "", message)]) from error


def _too_large(file: str, size: int) -> Problem:
    message = f"too large for a trait: {size:,} bytes; at most {MAX_BYTES:,} are read. Is it the right file?"
    return Problem(file, None, "", message)

"""Pydantic's errors in the words of someone who writes a trait file."""

from __future__ import annotations

import difflib

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from persona_lens.characters import in_short
from persona_lens.traits.document import Document
from persona_lens.traits.problems import Loc, Problem, field_name
from persona_lens.traits.schema import MAX_NAME, RULE_ERROR, Adjectives, InstructionPair, Trait

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

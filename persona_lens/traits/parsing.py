"""A file's text to what it defines, or to one error that names every problem with its line and its fix."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from persona_lens.core.documents import PlainLoader
from persona_lens.core.text import in_short
from persona_lens.traits.definition import MAX_NAME, RULE_ERROR, Loc, is_slug
from persona_lens.traits.kind import Content, Kind
from persona_lens.traits.problems import Problem, field_name
from persona_lens.traits.schema import TRAITS, Trait

MAX_BYTES = 256 * 1024
"""Largest file that is read; a full trait has about 10 KiB."""

# A trait is four levels deep, a role two. The limit keeps hostile nesting from exhausting Python's stack.
_MAX_DEPTH = 16

# What YAML takes an unquoted word for, in words.
_KINDS = {
    "bool": "a yes/no value",
    "int": "a number",
    "float": "a number",
    "timestamp": "a date",
    "binary": "binary data",
    "merge": "a merge key",
}


Places = Mapping[Loc, tuple[int, yaml.Node]]
"""The 1-based line of each value, and how it was written."""


class Document:
    """The data of a YAML text, with where and how each value was written.

    Args:
        text: The whole text of the file.
        file: What to call the file in messages.
        kind: What it is to define.

    Attributes:
        data: Dictionaries, lists, strings and whole numbers. Anything else YAML knows (booleans, dates, null)
            is None here, since no field can use it.
        places: The 1-based line of each value, and how it was written.
        problems: What is wrong already: fields that stand twice.

    Raises:
        DefinitionError: The text is not YAML, is empty, or uses YAML features that no definition has a use for.
    """

    def __init__(self, text: str, file: str, kind: Kind[Any]) -> None:
        try:
            loader = _Loader(text)
            loader.of_what = kind.a_noun
            try:
                root = loader.get_single_node()
            finally:
                loader.dispose()
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # PyYAML lets ValueError and OverflowError through for escapes such as "\UFFFFFFFF".
            raise kind.failed.from_problems([_syntax_problem(error, text, file, kind)]) from error
        if root is None:
            message = f"the file is empty; {kind.begin}"
            raise kind.failed.at(file, None, message)
        self._file = file
        self.places: dict[Loc, tuple[int, yaml.Node]] = {}
        self.problems: list[Problem] = []
        self.data = self._value(root, (), root.start_mark.line + 1)

    def _value(self, node: yaml.Node, loc: Loc, line: int) -> object:
        self.places[loc] = line, node
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*loc, i), item.start_mark.line + 1) for i, item in enumerate(node.value)]
        read = _reading(node)
        if read == "str":
            return node.value
        try:
            return int(str(node.value)) if read == "int" else None
        except ValueError:  # 0x1f, 1:30, thousands of digits: numbers, but none that a definition has a use for
            return None

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, object]:
        data: dict[str, object] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(Problem(self._file, line, field_name(loc), "a field's name must be plain text"))
                continue
            here = (*loc, key.value)
            if key.value in data:
                message = f"stands twice, first in line {self.places[here][0]}: keep one of the two"
                self.problems.append(Problem(self._file, line, field_name(here), message))
                continue
            data[key.value] = self._value(value, here, line)
        return data


class _Loader(PlainLoader):
    max_depth = _MAX_DEPTH


def _reading(node: yaml.Node) -> str:
    """YAML's reading of a value: ``bool``, ``str``, …."""
    return node.tag.removeprefix("tag:yaml.org,2002:")


def _syntax_problem(error: Exception, text: str, file: str, kind: Kind[Any]) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        message = f"the character {error.character!a} cannot stand in YAML: remove it"
        return Problem(file, line, "", message)
    if not isinstance(error, yaml.error.MarkedYAMLError):
        return Problem(file, None, "", f"not YAML: {in_short(str(error), 200)}")
    mark = error.problem_mark or error.context_mark
    what = in_short(error.problem or error.context or "cannot be read", 200)
    hint = next((fix for symptom, fix in _SYNTAX_FIXES if symptom in what), "").format(noun=kind.noun)
    # The text ends after its last line break; an error "there" belongs to the last line with something on it.
    last = max(len(text.splitlines()) - 1, 0)
    return Problem(file, None if mark is None else min(mark.line, last) + 1, "", f"not YAML: {what}{hint}")


_SYNTAX_FIXES = (
    (
        "mapping values are not allowed",
        ". A text with ': ' in it needs quotes, or `>-` and a line of its own",
    ),
    ("'\\t'", ". Indent with spaces, not tabs"),
    ("cannot start any token", ". A text that begins with a special character needs quotes"),
    ("found unexpected end of stream", ". A quote is not closed"),
    ("expected <block end>", ". Check the indentation here, and that quotes enclose the whole text"),
    ("found another document", ": a {noun} file holds one document, so remove the `---` in its middle"),
    ("found undefined tag", ". A text that begins with `!` needs quotes"),
)


def explain(error: ValidationError, places: Places, file: str, kind: Kind[Any] = TRAITS) -> list[Problem]:
    """Say what each error means for the file that the data came from."""
    return [
        Problem(file, _line(details["loc"], places), field_name(details["loc"]), _message(details, places, kind))
        for details in error.errors(include_url=False, include_input=False)
    ]


def _line(loc: Loc, places: Places) -> int | None:
    # A missing field has no line of its own: the line of what should contain it is the place to look.
    for end in range(len(loc), -1, -1):
        if loc[:end] in places:
            return places[loc[:end]][0]
    return None


def _message(details: ErrorDetails, places: Places, kind: Kind[Any]) -> str:
    error, loc, context = details["type"], details["loc"], details.get("ctx", {})
    match error:
        case _ if error == RULE_ERROR:
            return str(context["reason"])
        case "missing":
            return f"is missing: add `{field_name(loc[-1:])}:`{_purpose(loc, kind)}"
        case "extra_forbidden":
            accepted = _fields_at(loc[:-1], kind)
            close = difflib.get_close_matches(str(loc[-1]), accepted, n=1)
            guess = f"did you mean `{close[0]}`? " if close else ""
            return f"is no field of {kind.a_noun}; {guess}Accepted here: {', '.join(accepted)}"
        case "string_type":
            return _not_text(loc, places, kind)
        case "string_too_short":
            return f"is empty: write something{_purpose(loc, kind)}"
        case "string_too_long":
            return f"is too long: at most {context['max_length']} characters are accepted"
        case "string_pattern_mismatch":
            return _not_a_slug(loc, places)
        case "string_unicode":
            return "holds half a character (a lone surrogate such as \\ud800): remove it"
        case "literal_error":
            return "is not a version this program knows: write 1, or upgrade persona-lens"
        case "tuple_type":
            return "must be a list: one item a line, each behind `- `"
        case "model_type":
            return f"must be a mapping with the fields {', '.join(f'`{name}:`' for name in _fields_at(loc, kind))}"
        case _:
            return details["msg"]


def _model_at(place: Loc, kind: Kind[Any]) -> type[BaseModel]:
    return kind.parts.get(place[0], kind.model) if place else kind.model


def _fields_at(place: Loc, kind: Kind[Any]) -> list[str]:
    return list(_model_at(place, kind).model_fields)


def _purpose(loc: Loc, kind: Kind[Any]) -> str:
    field = _model_at(loc[:-1], kind).model_fields.get(str(loc[-1]))
    if field is None or field.description is None:
        return ""
    return f". It is for: {' '.join(field.description.split())}"


def _not_text(loc: Loc, places: Places, kind: Kind[Any]) -> str:
    _, node = places.get(loc, (0, None))
    if not isinstance(node, yaml.ScalarNode):
        return "must be a single text, but this is a list or a mapping. A text with ': ' in it needs quotes"
    read = _reading(node)
    if read == "null":
        return f"is empty: write a text{_purpose(loc, kind)}"
    written = in_short(node.value)
    return f'must be text, but YAML takes {written} for {_KINDS.get(read, "something else")}: write "{written}"'


def _not_a_slug(loc: Loc, places: Places) -> str:
    if "adjectives" in loc:
        return "must be a word or two on one line"
    _, node = places.get(loc, (0, None))
    written = node.value.lower() if isinstance(node, yaml.ScalarNode) else ""
    slug = "".join(c if c.isascii() and c.isalnum() else "-" for c in written)
    slug = slug.strip("-").lstrip("0123456789-")[:MAX_NAME]
    return "takes lower-case letters, digits, - and _ and begins with a letter" + (f": write {slug}" if slug else "")


def parse_trait(text: str, file: str = "<text>") -> Trait:
    """Read a trait from YAML text.

    Args:
        text: The YAML.
        file: What to call the text in messages.

    Raises:
        TraitError: The text is no trait; the message names every problem with its line, field and fix.
    """
    return parse(TRAITS, text, file)[0]


def parse(kind: Kind[Content], text: str, file: str) -> tuple[Content, Places]:
    """Read a definition from YAML text, and keep the place of each value.

    Raises:
        DefinitionError: Of the kind, if the text is none; the message names every problem with its line, field and fix.
    """
    if len(text) > MAX_BYTES:
        raise kind.failed.at(file, None, _too_large(kind))
    document = Document(text, file, kind)
    if not isinstance(document.data, dict):
        written = "a list" if isinstance(document.data, list) else "a single value"
        raise kind.failed.at(file, 1, f"{kind.a_noun} is a mapping of fields (`name: …`), but this is {written}")
    try:
        found = kind.model.model_validate(document.data)
    except ValidationError as error:
        problems = [*document.problems, *explain(error, document.places, file, kind)]
        raise kind.failed.from_problems(problems) from error
    if document.problems:
        raise kind.failed.from_problems(document.problems)
    return found, document.places


def read_trait(location: str | Path | Traversable) -> Trait:
    """Read a trait file.

    Args:
        location: The file, on disk or inside an installed package.

    Raises:
        TraitError: The file cannot be read, is no trait, or is not called NAME.yaml after the trait it holds.
    """
    return read(TRAITS, location)[0]


def read(kind: Kind[Content], location: str | Path | Traversable) -> tuple[Content, Places]:
    """Read a file, and keep the place of each value.

    Raises:
        DefinitionError: Of the kind, if the file cannot be read, is none, or is not called NAME.yaml after its name.
    """
    source = Path(location) if isinstance(location, str) else location
    file = str(source)
    found, places = parse(kind, read_text(source, kind), file)
    name = getattr(found, "name", None)
    stem, dot, suffix = source.name.rpartition(".")
    if name is not None and stem != name:
        message = f"is {name!r} in a file called {source.name}: rename the file to {name}{dot}{suffix}"
        message += f", or write `name: {stem}`" if is_slug(stem) else ""
        raise kind.failed.at(file, places[("name",)][0], message, "name")
    return found, places


def _too_large(kind: Kind[Any]) -> str:
    return f"too large for {kind.a_noun}: at most {MAX_BYTES:,} bytes are read. Is it the right file?"


def read_text(source: Path | Traversable, kind: Kind[Any] = TRAITS) -> str:
    """Read a file of the size that a definition may have.

    Raises:
        DefinitionError: Of the kind, if it cannot be read, is too large, or is not UTF-8.
    """
    file = str(source)
    try:
        with source.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)  # a mistyped path may well lead to a model's weights
        if len(raw) > MAX_BYTES:
            raise kind.failed.at(file, None, _too_large(kind))
        return raw.decode("utf-8-sig")
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise kind.failed.at(file, None, f"cannot be read: {reason}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 (byte 0x{raw[error.start]:02x}): save the file with the encoding UTF-8"
        raise kind.failed.at(file, line, message) from error

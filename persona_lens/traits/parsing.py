"""A trait file's text to a `Trait`, or to one error that names every problem with its line and its fix."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from persona_lens.core.documents import PlainLoader
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import in_short
from persona_lens.traits.schema import MAX_NAME, RULE_ERROR, Adjectives, InstructionPair, Loc, Trait, is_slug

MAX_BYTES = 256 * 1024
"""Largest trait file that is read; a full trait has about 10 KiB."""

# A trait is four levels deep. The limit keeps hostile nesting from exhausting Python's stack.
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


class Severity(StrEnum):
    """How bad a finding is: an error makes the trait unusable, a warning does not."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Problem:
    """One finding about one trait file.

    Attributes:
        file: The file's path as the user would type it, or a name in angle brackets for text without a file.
        line: 1-based line, or None when the finding is about the file as a whole.
        field: The field as people read it (``instructions #2 positive``), or an empty string.
        message: What is wrong and how to put it right.
        severity: Whether the trait can be used all the same.
    """

    file: str
    line: int | None
    field: str
    message: str
    severity: Severity = Severity.ERROR

    def __str__(self) -> str:
        """``file:line: field: message``, a form that terminals and editors turn into a link."""
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.field, self.message) if part)

    def to_json(self) -> dict[str, int | str | None]:
        """Where in its file it is, and what it says."""
        return {"line": self.line, "field": self.field, "message": self.message}


class TraitError(PersonaLensError):
    """A trait could not be found, read or accepted.

    Args:
        message: The whole message, every problem included.
        problems: The problems one by one, for callers that lay them out themselves.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def at(cls, file: str, line: int | None, message: str, field: str = "") -> TraitError:
        """Build the error for a trait file that has one problem."""
        return cls.from_problems([Problem(file, line, field, message)])

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> TraitError:
        """Build the error for a trait file that has the given problems, in the order of their lines."""
        ordered = sorted(problems, key=lambda problem: problem.line or 0)
        return cls("\n".join(str(problem) for problem in ordered), ordered)


def field_name(loc: Loc) -> str:
    """Write a location the way people count.

    Example:
        >>> field_name(("instructions", 1, "positive"))
        'instructions #2 positive'
    """
    return " ".join(f"#{part + 1}" if isinstance(part, int) else in_short(part) for part in loc)


Places = Mapping[Loc, tuple[int, yaml.Node]]
"""The 1-based line of each value, and how it was written."""


class Document:
    """The data of a YAML text, with where and how each value was written.

    Args:
        text: The whole text of the file.
        file: What to call the file in messages.

    Attributes:
        data: Dictionaries, lists, strings and whole numbers. Anything else YAML knows (booleans, dates, null)
            is None here, since no field of a trait can use it.
        places: The 1-based line of each value, and how it was written.
        problems: What is wrong already: fields that stand twice.

    Raises:
        TraitError: The text is not YAML, is empty, or uses YAML features that a trait has no use for.
    """

    def __init__(self, text: str, file: str) -> None:
        try:
            loader = _Loader(text)
            try:
                root = loader.get_single_node()
            finally:
                loader.dispose()
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # PyYAML lets ValueError and OverflowError through for escapes such as "\UFFFFFFFF".
            raise TraitError.from_problems([_syntax_problem(error, text, file)]) from error
        if root is None:
            message = "the file is empty; `persona-lens traits new NAME` writes a template to start from"
            raise TraitError.at(file, None, message)
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
        kind = _kind(node)
        if kind == "str":
            return node.value
        try:
            return int(str(node.value)) if kind == "int" else None
        except ValueError:  # 0x1f, 1:30, thousands of digits: numbers, but none a trait has a use for
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
    of_what = "a trait"


def _kind(node: yaml.Node) -> str:
    """YAML's reading of a value: ``bool``, ``str``, …."""
    return node.tag.removeprefix("tag:yaml.org,2002:")


def _syntax_problem(error: Exception, text: str, file: str) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        message = f"the character {error.character!a} cannot stand in YAML: remove it"
        return Problem(file, line, "", message)
    if not isinstance(error, yaml.error.MarkedYAMLError):
        return Problem(file, None, "", f"not YAML: {in_short(str(error), 200)}")
    mark = error.problem_mark or error.context_mark
    what = in_short(error.problem or error.context or "cannot be read", 200)
    hint = next((fix for symptom, fix in _SYNTAX_FIXES if symptom in what), "")
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
    ("found another document", ": a trait file holds one document, so remove the `---` in its middle"),
    ("found undefined tag", ". A text that begins with `!` needs quotes"),
)


def explain(error: ValidationError, places: Places, file: str) -> list[Problem]:
    """Say what each error means for the file that the data came from."""
    return [
        Problem(file, _line(details["loc"], places), field_name(details["loc"]), _message(details, places))
        for details in error.errors(include_url=False, include_input=False)
    ]


def _line(loc: Loc, places: Places) -> int | None:
    # A missing field has no line of its own: the line of what should contain it is the place to look.
    for end in range(len(loc), -1, -1):
        if loc[:end] in places:
            return places[loc[:end]][0]
    return None


def _message(details: ErrorDetails, places: Places) -> str:
    kind, loc, context = details["type"], details["loc"], details.get("ctx", {})
    match kind:
        case _ if kind == RULE_ERROR:
            return str(context["reason"])
        case "missing":
            return f"is missing: add `{field_name(loc[-1:])}:`{_purpose(loc)}"
        case "extra_forbidden":
            accepted = _fields_at(loc[:-1])
            close = difflib.get_close_matches(str(loc[-1]), accepted, n=1)
            guess = f"did you mean `{close[0]}`? " if close else ""
            return f"is no field of a trait; {guess}Accepted here: {', '.join(accepted)}"
        case "string_type":
            return _not_text(loc, places)
        case "string_too_short":
            return f"is empty: write something{_purpose(loc)}"
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
            return f"must be a mapping with the fields {', '.join(f'`{name}:`' for name in _fields_at(loc))}"
        case _:
            return details["msg"]


_MODELS: dict[int | str, type[BaseModel]] = {"adjectives": Adjectives, "instructions": InstructionPair}


def _model_at(place: Loc) -> type[BaseModel]:
    return _MODELS.get(place[0], Trait) if place else Trait


def _fields_at(place: Loc) -> list[str]:
    return list(_model_at(place).model_fields)


def _purpose(loc: Loc) -> str:
    field = _model_at(loc[:-1]).model_fields.get(str(loc[-1]))
    if field is None or field.description is None:
        return ""
    return f". It is for: {' '.join(field.description.split())}"


def _not_text(loc: Loc, places: Places) -> str:
    _, node = places.get(loc, (0, None))
    if not isinstance(node, yaml.ScalarNode):
        return "must be a single text, but this is a list or a mapping. A text with ': ' in it needs quotes"
    kind = _kind(node)
    if kind == "null":
        return f"is empty: write a text{_purpose(loc)}"
    written = in_short(node.value)
    return f'must be text, but YAML takes {written} for {_KINDS.get(kind, "something else")}: write "{written}"'


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
    return parse_with_places(text, file)[0]


def parse_with_places(text: str, file: str) -> tuple[Trait, Places]:
    """Read a trait from YAML text, and keep the place of each value; otherwise as `parse_trait`."""
    if len(text) > MAX_BYTES:
        raise TraitError.at(file, None, _TOO_LARGE)
    document = Document(text, file)
    if not isinstance(document.data, dict):
        written = "a list" if isinstance(document.data, list) else "a single value"
        raise TraitError.at(file, 1, f"a trait is a mapping of fields (`name: …`), but this is {written}")
    try:
        trait = Trait.model_validate(document.data)
    except ValidationError as error:
        problems = [*document.problems, *explain(error, document.places, file)]
        raise TraitError.from_problems(problems) from error
    if document.problems:
        raise TraitError.from_problems(document.problems)
    return trait, document.places


def read_trait(location: str | Path | Traversable) -> Trait:
    """Read a trait file.

    Args:
        location: The file, on disk or inside an installed package.

    Raises:
        TraitError: The file cannot be read, is no trait, or is not called NAME.yaml after the trait it holds.
    """
    return read_with_places(location)[0]


def read_with_places(location: str | Path | Traversable) -> tuple[Trait, Places]:
    """Read a trait file, and keep the place of each value; otherwise as `read_trait`."""
    source = Path(location) if isinstance(location, str) else location
    file = str(source)
    trait, places = parse_with_places(read_text(source), file)
    stem, dot, suffix = source.name.rpartition(".")
    if stem != trait.name:
        message = f"is {trait.name!r} in a file called {source.name}: rename the file to {trait.name}{dot}{suffix}"
        message += f", or write `name: {stem}`" if is_slug(stem) else ""
        raise TraitError.at(file, places[("name",)][0], message, "name")
    return trait, places


_TOO_LARGE = f"too large for a trait: at most {MAX_BYTES:,} bytes are read. Is it the right file?"


def read_text(source: Path | Traversable) -> str:
    """Read a file of the size that a trait may have.

    Raises:
        TraitError: It cannot be read, is too large, or is not UTF-8.
    """
    file = str(source)
    try:
        with source.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)  # a mistyped path may well lead to a model's weights
        if len(raw) > MAX_BYTES:
            raise TraitError.at(file, None, _TOO_LARGE)
        return raw.decode("utf-8-sig")
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise TraitError.at(file, None, f"cannot be read: {reason}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 (byte 0x{raw[error.start]:02x}): save the file with the encoding UTF-8"
        raise TraitError.at(file, line, message) from error

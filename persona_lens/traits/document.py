"""YAML text to plain data that remembers its lines, and what is wrong with a trait file, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import yaml

from persona_lens.core.documents import PlainLoader
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import in_short

Loc = tuple[int | str, ...]
"""Where in a trait a value stands: field names and 0-based positions, as pydantic writes it."""


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


MAX_BYTES = 256 * 1024
"""Largest trait file that is read; a full trait has about 10 KiB."""

# A trait is four levels deep. The limit keeps hostile nesting from exhausting Python's stack.
_MAX_DEPTH = 16

_YAML_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Scalar:
    """How a value was written: YAML's reading of it (``bool``, ``str``, …) and the text in the file."""

    kind: str
    text: str


@dataclass(frozen=True)
class Document:
    """The data of a YAML file, with where and how each value was written.

    Attributes:
        data: Dictionaries, lists, strings and whole numbers. Anything else YAML knows (booleans, dates, null)
            is None here, since no field of a trait can use it; ``scalars`` tells what it was.
        lines: The 1-based line of each value, by location.
        scalars: How each single value was written, by location.
        problems: What is wrong already: fields that stand twice.
    """

    data: object
    lines: Mapping[Loc, int]
    scalars: Mapping[Loc, Scalar]
    problems: tuple[Problem, ...]


def load_document(text: str, file: str) -> Document:
    """Read YAML text.

    Args:
        text: The whole text of the file.
        file: What to call the file in messages.

    Raises:
        TraitError: The text is not YAML, is empty, or uses YAML features that a trait has no use for.
    """
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
        raise TraitError.from_problems([Problem(file, None, "", message)])
    walk = _Walk(file)
    data = walk.value(root, (), root.start_mark.line + 1)
    return Document(data, walk.lines, walk.scalars, tuple(walk.problems))


class _Loader(PlainLoader):
    max_depth = _MAX_DEPTH
    of_what = "a trait"


@dataclass
class _Walk:
    file: str
    lines: dict[Loc, int] = field(default_factory=dict)
    scalars: dict[Loc, Scalar] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def value(self, node: yaml.Node, loc: Loc, line: int) -> object:
        self.lines[loc] = line
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*loc, i), item.start_mark.line + 1) for i, item in enumerate(node.value)]
        return self._scalar(node, loc)

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, object]:
        data: dict[str, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                message = "a field's name must be plain text"
                self.problems.append(Problem(self.file, line, field_name(loc), message))
                continue
            key: str = key_node.value
            here = (*loc, key)
            if key in data:
                message = f"stands twice, first in line {self.lines[here]}: keep one of the two"
                self.problems.append(Problem(self.file, line, field_name(here), message))
                continue
            data[key] = self.value(value_node, here, line)
        return data

    def _scalar(self, node: yaml.Node, loc: Loc) -> object:
        kind = node.tag.removeprefix(_YAML_TAG)
        self.scalars[loc] = Scalar(kind, node.value)
        if kind == "str":
            return node.value
        if kind == "int":
            try:
                return int(str(node.value))
            except ValueError:  # 0x1f, 1:30, thousands of digits: numbers, but none a trait has a use for
                return None
        return None


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

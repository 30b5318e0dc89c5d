"""YAML, JSON and tensors with a header, that people and other programs wrote, read within bounds.

Parsers raise a dozen things for text that is cut, nested without end or full of odd numbers, and what they accept may
still be too deep, or hold whole numbers too large, for the code behind them. Here all of it is refused. An `Artifact`
is tensors with one JSON header in a safetensors file, whose bytes depend on the content alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import yaml
from safetensors import SafetensorError, safe_open

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import named, read_bytes, write_bytes
from persona_lens.core.text import in_short, shown

if TYPE_CHECKING:
    from torch import Tensor


MAX_YAML = 256 * 1024  # bytes; the largest that anyone writes by hand have about 10 KiB
MAX_DEPTH = 200  # of lists and mappings in one another: a fifth of what Python's stack holds
MAX_DIGITS = 19  # of a whole number: any more, and no 64 bits hold it
_NO_USE = ("timestamp", "binary", "set", "omap", "pairs")  # kinds of YAML that no field here takes


class Record:
    """A dataclass whose fields are its JSON.

    Attributes:
        unsaid: Fields that are left out where they are at their default, so that what was written before there were
            such fields stays as it is.
    """

    unsaid: ClassVar[frozenset[str]] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """The values by name: tensors and tuples as lists, and None for a number that is none."""
        values = ((each, getattr(self, each.name)) for each in fields(cast(Any, self)))
        return {
            each.name: plain(value) for each, value in values if each.name not in self.unsaid or value != each.default
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The record that `to_json` gave; what else stands there is left out.

        Raises:
            TypeError, ValueError: If a field is missing, of another type, or not finite, naming the first such field.
        """
        from pydantic import ValidationError  # slow to import, and few records are read

        kind: Any = cls
        try:
            found: Self = _reader(kind).validate_json(json.dumps(value, allow_nan=False), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None
        return found


def plain(value: Any) -> Any:
    """A value as JSON has it: see `Record.to_json`."""
    if isinstance(value, Record):
        return value.to_json()
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not isfinite(value) else value


@cache
def _reader(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


class DocumentError(PersonaLensError):
    """A text that is no YAML or JSON, or more of it than is read; the message does not name the place."""


class PlainLoader(yaml.SafeLoader):
    """PyYAML's loader without aliases, which can build cycles and bombs, and with a limit to nesting.

    Attributes:
        max_depth: How many levels are read.
        of_what: What such a document is called in messages.
    """

    max_depth = 32
    of_what = "this file"
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """See PyYAML; raises its error for an alias, or where nesting goes too deep."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it bare
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            message = "aliases (`*name`) are not accepted; write the value out, or quote it"
            raise yaml.composer.ComposerError(None, None, message, mark)
        if self._depth >= self.max_depth:
            raise yaml.composer.ComposerError(None, None, f"nested too deeply for {self.of_what}", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _DataLoader(PlainLoader):
    """Texts, numbers, booleans, null, lists and mappings: what looks like a date is a text."""


_DataLoader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] not in _NO_USE
}
_DataLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Read YAML of plain data.

    Raises:
        DocumentError: If it is not YAML, is too long or too deep, or uses aliases or kinds that no field takes.
    """
    if len(text) > MAX_YAML:
        raise DocumentError(f"too long: {len(text):,} characters; at most {MAX_YAML:,} are read")
    try:
        return checked(yaml.load(text, _DataLoader), finite=False)
    except yaml.YAMLError as error:
        raise DocumentError(f"not YAML: {in_short(str(error), 300)}") from error
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # What PyYAML's constructors let through for `0x_`, "\UFFFFFFFF", `!!int ""` and the like.
        raise DocumentError(f"not YAML: a value cannot be read ({in_short(str(error), 100)})") from error


def parse_json(text: str | bytes) -> Any:
    """Read JSON.

    Raises:
        DocumentError: If it is not JSON, too deep, or holds numbers or halves of characters that nothing could use.
    """
    try:
        return checked(json.loads(text))
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from error
    except json.JSONDecodeError as error:
        raise DocumentError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"not JSON that can be read: {in_short(str(error), 100)}") from error


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as they are written, one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def read_yaml(file: Path | str) -> Any:
    """Read a YAML file; as `parse_yaml`, with the file in the message."""
    path = Path(file)
    with _reading(path), path.open("rb") as stream:
        raw = stream.read(MAX_YAML + 1)  # a mistyped path may well lead to a model's weights
        return parse_yaml(raw.decode("utf-8-sig"))


def read_json(file: Path | str) -> Any:
    """Read a JSON file; as `parse_json`, with the file in the message."""
    path = Path(file)
    with _reading(path):
        return parse_json(path.read_bytes())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise DocumentError(f"{path} cannot be read: {in_short(str(error), 300)}") from error
    except DocumentError as error:
        raise DocumentError(f"{path} is {error}") from error


def checked(value: Any, *, finite: bool = True, bounded: bool = True) -> Any:
    """The value, if no code behind it can fall over its depth, its numbers or its texts.

    Args:
        value: Lists, mappings and what stands in them, `MAX_DEPTH` levels deep at most.
        finite: Whether numbers have to be.
        bounded: Whether whole numbers may have `MAX_DIGITS` digits at most.

    Raises:
        DocumentError: Saying which of them it is.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for each in level for inner in _inside(each, finite, bounded)]
        if not level:
            return value
    raise DocumentError(f"nested more than {MAX_DEPTH} levels deep")


_LARGEST = 10**MAX_DIGITS


def _inside(value: Any, finite: bool, bounded: bool) -> Any:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DocumentError("an escape in it stands for half of a character") from None
    elif bounded and type(value) is int and not -_LARGEST < value < _LARGEST:
        raise DocumentError(f"a whole number in it has more than {MAX_DIGITS} digits")
    elif finite and isinstance(value, float) and not isfinite(value):
        raise DocumentError(f"a number in it is {value}")
    elif isinstance(value, Mapping):
        return (*value, *value.values())
    return value if isinstance(value, list | tuple) else ()


MAX_BYTES = 2**31  # of a file; vectors of the largest models have less than a hundredth


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a file holds.

    Attributes:
        header: JSON values.
        tensors: By name.
    """

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def header_text(header: Mapping[str, Any]) -> str:
    """A header as it is written.

    Raises:
        DocumentError: If it holds what could not be read; see `checked`.
    """
    return json.dumps(checked(dict(header)), sort_keys=True, ensure_ascii=False, allow_nan=False)


def save_tensors(tensors: Mapping[str, Tensor], kind: str, header: str) -> bytes:
    """The bytes of a file; ``kind`` is the name of the header's entry, by which such files know each other."""
    from safetensors.torch import save  # which loads torch, and a run folder has no need of it

    # One metadata entry: safetensors writes several in no fixed order.
    return save({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}, {kind: header})


def write_once(path: Path | str, content: bytes, failed: type[PersonaLensError]) -> Path:
    """Write a file as a whole, or leave one that holds the same.

    Raises:
        PersonaLensError: Of the class ``failed``, if the file exists and holds something else, or cannot be written.
    """
    target = Path(path)
    with named(target, failed):
        there = target.exists()
    if there:
        if target.is_dir() or read_bytes(target, failed) != content:
            raise failed(f"{target} exists and holds something else; choose another name or remove it")
        return target
    return write_bytes(target, content, failed=failed)


def read_artifact(file: Path, kind: str, version: int, *, stranger: str, failed: type[PersonaLensError]) -> Artifact:
    """Read what `save_tensors` made. Nothing is unpickled.

    Args:
        file: The file.
        kind: As it was written.
        version: The format version that its header has to have.
        stranger: What to say of a safetensors file without such a header.
        failed: Class of the errors.

    Raises:
        PersonaLensError: Of the class ``failed``, if the file is damaged, not of that kind, or of another version.
    """
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise failed(
                f"{file} is {size / 1e9:.1f} GB; nothing that this program writes has over {MAX_BYTES / 1e9:.1f} GB"
            )
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(kind)
            if text is None:
                raise failed(f"{file} {stranger}: its header has no {kind!r} entry")
            header = parse_header(text, version, file, failed)
            return Artifact(header, {name: opened.get_tensor(name) for name in sorted(opened.keys())})
    except PersonaLensError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise failed(f"{file} is not a safetensors file, or is damaged: {in_short(str(error), 200)}") from error
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:  # a kind of tensor that torch does not know
        raise failed(f"{file} holds a tensor that cannot be read: {in_short(str(error), 200)}") from error


def parse_header(text: str, version: int, file: Path, failed: type[PersonaLensError]) -> dict[str, Any]:
    """Read what `header_text` wrote.

    Raises:
        PersonaLensError: Of the class ``failed``, if it is damaged, or of another version.
    """
    try:
        header: dict[str, Any] = parse_json(text)
        found = header["format_version"]
    except (KeyError, TypeError, DocumentError) as error:
        raise failed(f"the header of {file} is damaged: {error!r}") from error
    if type(found) is not int or found != version:
        raise failed(
            f"{file} has format version {shown(found)}, this version of persona-lens reads {version}; use the "
            "persona-lens that wrote it, or make it again"
        )
    return header

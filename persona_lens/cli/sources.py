"""What settings of the library say of themselves, read from their source: nothing of the engine is imported for it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from persona_lens.core.text import listed

ROOT = Path(__file__).resolve().parents[2]
PLAIN: Mapping[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
_FIRST = re.compile(r"tuple\(range\((\d+)\)\)")
_SECTION = re.compile(r"(?m)^(Args|Attributes|Returns|Yields|Raises):$")


@dataclass(frozen=True)
class Field:
    """A field of settings.

    Attributes:
        name: Its name.
        type: What its option takes; text where the command line has a notation for it.
        kind: ``layers``, ``numbers`` or ``whole numbers`` in such a notation, ``first`` for so many numbers from 0 on;
            else nothing.
        default: What its option is when nothing is given; an ellipsis where one has to be.
        doc: What it does.
        enumeration: The class of its values, ``module:Class``.
        values: What it takes, in words.
        inner: Settings in settings, ``module:Class``.
        fields: Their fields.
        fixed: What is set of theirs and is no option.
    """

    name: str
    type: Any = str
    kind: str = ""
    default: Any = inspect.Parameter.empty
    doc: str = ""
    enumeration: str = ""
    values: str | None = None
    inner: str = ""
    fields: tuple[Field, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


def prose(text: str | None) -> str:
    """A docstring without its sections."""
    text = inspect.cleandoc(text or "")
    found = _SECTION.search(text)
    return text[: found.start()].rstrip() if found else text


def documented(of: Any) -> dict[str, str]:
    """What the docstring of a function or a class, and those of a class's bases, say of parameters and fields."""
    found: dict[str, str] = {}
    for each in reversed(inspect.getmro(of)) if inspect.isclass(of) else (of,):
        found |= entries(each.__doc__)
    return found


def entries(text: str | None) -> dict[str, str]:
    """What the sections of a docstring say, by name."""
    found: dict[str, str] = {}
    _, *sections = _SECTION.split(inspect.cleandoc(text or ""))
    for section in sections[1::2]:
        for entry in re.finditer(r"(?m)^ {4}(\w+): (.*(?:\n {5,}.*)*)", section):
            found[entry[1]] = " ".join(entry[2].split()).replace("``", "`")
    return found


def fields_of(source: str, without: tuple[str, ...] = ()) -> tuple[Field, ...]:
    """The fields of settings, ``module:Class``, and of the settings in them, without some."""
    module, node = _find(*source.split(":"))
    assert isinstance(node, ast.ClassDef), source
    return tuple(_fields(module, node, without, {}))


def _fields(
    module: str, node: ast.ClassDef, without: tuple[str, ...], fixed: Mapping[str, ast.expr]
) -> Iterator[Field]:
    texts = entries(ast.get_docstring(node))
    for line, below in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        name = line.target.id
        if name in without or name in fixed:
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[name] = " ".join(str(below.value.value).split())
        inner = _inner(module, line.value)
        if inner is None:
            yield _field(module, line, texts.get(name, ""))
            continue
        place, kind, given = inner
        values = {each.arg: each.value for each in given if each.arg}
        own = tuple(_fields(place, kind, without, values))
        known = {each: ast.literal_eval(value) for each, value in values.items()}
        yield Field(name, inner=f"{place}:{kind.name}", fields=own, fixed=known)


def _inner(module: str, value: Any) -> tuple[str, ast.ClassDef, list[ast.keyword]] | None:
    """The class that a default makes settings of, with what it is given."""
    given: list[ast.keyword] = []
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        value = next(each.value for each in value.keywords if each.arg == "default_factory")
        if isinstance(value, ast.Lambda):
            value = value.body
    if isinstance(value, ast.Call):
        value, given = value.func, value.keywords
    if not isinstance(value, ast.Name) or not value.id[0].isupper() or value.id.isupper():
        return None
    place, found = _find(module, value.id)
    return (place, found, given) if isinstance(found, ast.ClassDef) else None


def _field(module: str, line: ast.AnnAssign, doc: str) -> Field:
    assert isinstance(line.target, ast.Name)
    name = line.target.id
    if first := _FIRST.fullmatch(ast.unparse(line.value) if line.value else ""):
        return Field(name, int, "first", int(first[1]), doc)
    default = inspect.Parameter.empty if line.value is None else _value(module, line.value)
    kind, optional = _plain(module, line.annotation)
    text = ast.unparse(kind)
    if text.startswith("tuple["):
        of = text[6:].partition(",")[0]
        if of not in ("int", "float"):
            return Field(name, list[str] | None, default=None, doc=doc)
        notation = "layers" if name == "layers" else "whole numbers" if of == "int" else "numbers"
        if isinstance(default, tuple):
            default = ",".join(f"{each:g}" for each in default)
        return Field(name, str | None if optional else str, notation, default, doc)
    type_ = PLAIN.get(text, str)
    values = enumeration = ""
    if text.startswith("Literal["):
        values = _listed(ast.literal_eval(text[7:]))
    elif text not in PLAIN:
        place, found = _find(module, text)
        assert isinstance(found, ast.ClassDef), f"{module}: {name}"
        enumeration = f"{place}:{found.name}"
        values = _listed([str(_value(place, each.value)) for each in found.body if isinstance(each, ast.Assign)])
    return Field(name, type_ | None if optional else type_, "", default, doc, enumeration, values or None)


def _plain(module: str, node: ast.expr) -> tuple[ast.expr, bool]:
    """An annotation without ``| None``, ``Annotated`` and names for other annotations; and whether it had the first."""
    if isinstance(node, ast.BinOp) and ast.unparse(node.right) == "None":
        return _plain(module, node.left)[0], True
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
        return _plain(module, node.slice.elts[0])
    if isinstance(node, ast.Name) and node.id not in PLAIN:
        place, found = _find(module, node.id)
        if isinstance(found, ast.expr):
            return _plain(place, found)
    return node, False


def _value(module: str, node: ast.expr) -> Any:
    """What an expression of literals, constants and members of enumerations comes to."""
    if isinstance(node, ast.Name):
        place, found = _find(module, node.id)
        assert isinstance(found, ast.expr)
        return _value(place, found)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        place, found = _find(module, node.value.id)
        assert isinstance(found, ast.ClassDef)
        (value,) = (each.value for each in found.body if isinstance(each, ast.Assign) and _named(each, node.attr))
        return _value(place, value)
    return ast.literal_eval(node)


def _named(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def _listed(words: Any) -> str:
    return listed([f"`{each}`" for each in words], "or")


def _find(module: str, name: str) -> tuple[str, ast.ClassDef | ast.expr]:
    """Where a name stands for a class or a value, followed through imports, and that."""
    for node in _body(module):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and _named(node, name):
            return module, node.value
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(node.module, alias.name)
    raise LookupError(f"{module} has no {name}")


@cache
def _body(module: str) -> tuple[ast.stmt, ...]:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return tuple(ast.parse(file.read_text(encoding="utf-8")).body)

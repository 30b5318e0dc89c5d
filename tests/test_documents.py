"""What the documents name is there, and what contributors are told of the house is short and true."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TWO_SCREENS = 90  # lines
GROUPS = {f"persona_lens.{name}" for name in ("traits", "backends", "operations", "formats", "judges")}
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "notebooks/*.ipynb")
    for path in sorted(ROOT.glob(pattern))
]
# - **A trait**, ... 160 lines: `traits/optimistic.yaml`
ADDED = re.findall(r"^- \*\*An? (\w+)\*\*(.*?)(\d+) lines: `([^`]+)`$", CONTRIBUTING, re.MULTILINE | re.DOTALL)


def text_of(document: Path) -> str:
    """What is written in a Markdown file or a notebook."""
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".md":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def names_in(text: str) -> Iterator[str]:
    """The modules of persona-lens that a text names, and what it names or imports of them, dotted."""
    for found in re.finditer(r"\bpersona_lens(?:\.\w+)+", text):
        if found[0] not in GROUPS:
            yield found[0]
    for module, several, single in re.findall(r"^ *from (persona_lens[\w.]*) import (?:\(([^)]*)\)|(.*))$", text, re.M):
        for name in re.findall(r"\w+", re.sub(r"#.*| as \w+", "", several or single)):
            yield f"{module}.{name}"
    for name in re.findall(r"\bpl\.(\w+)", text):
        yield f"persona_lens.{name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_all_that_it_names_is_there(document: Path) -> None:
    text = text_of(document)
    for name in sorted(set(names_in(text))):
        resolve_name(name)
    for path in re.findall(r"(?<![\w/.-])(?:tests|backends|benchmarks|docs)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path


def test_the_house_and_how_to_add_to_it_fit_two_screens() -> None:
    section = CONTRIBUTING.partition("## The house\n")[2].partition("## Style\n")[0]
    assert "## Adding" in section
    assert section.count("\n") < TWO_SCREENS
    kinds = ["trait", "author", "backend", "operation", "experiment", "format", "judge", "command"]
    assert [kind for kind, *_ in ADDED] == kinds
    told = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert re.findall(r"^## An? (\w+)$", told, re.MULTILINE) == kinds


@pytest.mark.parametrize(("said", "example"), [each[2:] for each in ADDED], ids=[each[0] for each in ADDED])
def test_adding_it_takes_as_many_lines_as_is_said(said: str, example: str) -> None:
    place, _, names = example.partition("::")
    if not names:
        path = ROOT / place
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        assert int(said) == sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        return
    lines = {}
    for node in ast.parse((ROOT / place).read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef() | ast.FunctionDef():
                first = min(part.lineno for part in (node, *node.decorator_list))
                lines[node.name] = (node.end_lineno or 0) - first + 1
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(code))):
                lines[name] = len(code.strip().splitlines())
    assert int(said) == sum(lines[name] for name in names.split(", "))

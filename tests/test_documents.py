"""What the documents name is there, and what contributors are told of the house is short and true."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest

from persona_lens.traits import find_traits
from tests.pages import README, ROOT, SITE, blocks_of

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TWO_SCREENS = 90  # lines
GROUPS = {
    f"persona_lens.{name}" for name in ("traits", "roles", "backends", "operations", "formats", "methods", "judges")
}
DOCUMENTS = [
    *SITE,
    *(path for pattern in ("*.md", "benchmarks/*.md", "notebooks/*.ipynb") for path in sorted(ROOT.glob(pattern))),
]
MAX_README = 150  # lines
# Nobody has put persona-lens on an index, where somebody else may take the name.
FROM_AN_INDEX = re.compile(r"(pip|uv|pipx)\b[^\n]*\binstall\b[^\n]*?(?<![\w/.-])persona-lens\b(?!-)")
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
    kinds = ["trait", "role", "author", "backend", "operation", "experiment", "format", "method", "judge", "command"]
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


def test_the_readme_is_short_and_begins_with_two_commands_and_the_environment() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README
    first, second, *_ = blocks_of(README, "bash")
    assert [line.split("#")[0].strip() for line in first.text.splitlines()] == ["make demo", "make test"]
    assert second.text == ". .venv/bin/activate\n"
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test", "docs", "wheel"} <= set(targets)


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Also where the files are read as they are, without the site."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        place, _, anchor = target.partition("#")
        file = document.parent / place if place else document
        if target.startswith("https://") or file.parent.name == "reference":  # which is made: see tests/test_site.py
            continue
        assert file.is_file(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


def test_the_environment_variables_are_those_of_the_code() -> None:
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "persona_lens").rglob("*.py"))
    pattern = r"\bPERSONA_LENS_[A-Z0-9_]+\b"
    told = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(pattern, told)) == set(re.findall(pattern, source))


def test_what_is_said_of_the_demonstration_is_of_its_size() -> None:
    from persona_lens.analysis.demo import DemoSettings

    text = (ROOT / "docs" / "science.md").read_text(encoding="utf-8")
    told = " ".join(text.partition("<!-- demo-numbers -->")[2].partition("<!-- /demo-numbers -->")[0].split())
    settings = DemoSettings()
    rollouts = 2 * 5 * settings.extraction.samples * settings.extraction.questions
    assert f"{rollouts} rollouts, {settings.questions} held-out questions)" in told


def test_every_built_in_trait_is_named() -> None:
    names = {file.name for file in find_traits().files if file.source.kind == "built-in"}
    assert names == {path.stem for path in (ROOT / "traits").glob("*.yaml")}
    told = (ROOT / "docs" / "making.md").read_text(encoding="utf-8")
    for name in names:
        assert f"*{name}*" in told, name


def test_every_built_in_role_is_named() -> None:
    told = (ROOT / "docs" / "roles.md").read_text(encoding="utf-8")
    named = re.findall(r"\*(\w+)\*", told)
    assert sorted(named) == sorted(path.stem for path in (ROOT / "roles").glob("*.yaml"))


def test_nobody_is_told_to_install_it_from_an_index() -> None:
    code = [path for folder in ("persona_lens", "backends") for path in (ROOT / folder).rglob("*.py")]
    for path in [*DOCUMENTS, *code]:
        found = FROM_AN_INDEX.search(text_of(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found}"
    assert FROM_AN_INDEX.search("pip install 'persona-lens[nnsight]'")

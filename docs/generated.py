"""Pages of the site that are made from code: the reference, the notebooks with their outputs, the changelog."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from typer.cli import get_docs_for_click

import persona_lens
from persona_lens.cli.commands import COMMANDS, Group, app_of, summary

ROOT = Path(__file__).resolve().parents[1]
# What the reference is cut into, by the packages that names live in.
SECTIONS = {
    "Results": ("reports", "load"),
    "Models": ("backend", "models"),
    "Traits and data": ("traits", "data", "runs"),
    "Extraction": ("extraction",),
    "Vectors": ("vectors",),
    "Steering": ("steering",),
    "Monitoring": ("monitoring",),
    "Live": ("serve",),
    "Screening": ("screening",),
    "Finetuning": ("finetuning",),
    "Analysis": ("analysis",),
    "Judges": ("judging",),
    "Errors and progress": ("core",),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Names the pages that are made from code in the navigation."""
    notebooks = [{_title(path): f"notebooks/{path.stem}.md"} for path in _notebooks()]
    commands = ["reference/commands/index.md", *({name: f"reference/commands/{name}.md"} for name in COMMANDS)]
    for section in config.nav or []:
        if "Notebooks" in section:
            section["Notebooks"] = notebooks
        if "Reference" in section:
            section["Reference"] = [
                each if "Python" in each else {"Commands": commands} for each in section["Reference"]
            ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for place, content in _pages():
        files.append(File.generated(config, place, content=content))
    return files


def _pages() -> Iterator[tuple[str, str | bytes]]:
    yield "changelog.md", re.sub(r"\]\(docs/", "](", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    yield "reference/python.md", _python()
    yield from _commands()
    for path in _notebooks():
        yield from _notebook(path)


def _python() -> str:
    """What can be imported from `persona_lens`, by what it is for."""
    homes: Mapping[str, str] = persona_lens._HOMES
    of = {part: title for title, parts in SECTIONS.items() for part in parts}
    found: dict[str, list[str]] = {title: [] for title in SECTIONS}
    for name, home in homes.items():
        found[of.get(name) or of[home.partition(".")[0]]].append(name)
    lines = [
        "# Python",
        "Everything public can be imported from `persona_lens`; a name's module is loaded when the name is first used.",
        f"`persona_lens.__version__` is the version, here {persona_lens.__version__}.",
    ]
    for title, names in found.items():
        lines += [f"## {title}", *(f"::: persona_lens.{name}" for name in sorted(names))]
    return "\n\n".join(lines)


def _commands() -> Iterator[tuple[str, str]]:
    rows = [f"| [`persona-lens {name}`]({name}.md) | {summary(entry)} |" for name, entry in COMMANDS.items()]
    start = (
        "# Commands\n\nEvery command has `--help`; those that report something have `--json`, those that run a model "
        "`--dry-run`. With `--backend nnsight --remote` they run on a model that lives on an [NDIF "
        "server](../../remote.md).\n\n| command | what it does |\n|---|---|\n"
    )
    yield "reference/commands/index.md", start + "\n".join(rows) + "\n"
    for name, entry in COMMANDS.items():
        yield f"reference/commands/{name}.md", f"# persona-lens {name}\n\n{_command(name, entry, 'persona-lens')}"


def _command(name: str, entry: str | Group, before: str) -> str:
    """Usage, arguments and options of a command, or of all those behind one word."""
    if isinstance(entry, Group):
        parts = [
            f"## persona-lens {name} {word}\n\n{_command(word, each, f'{before} {name}')}"
            for word, each in entry.commands.items()
        ]
        return f"{entry.help}\n\n" + "\n".join(parts)
    command: Any = typer.main.get_command(app_of(name, entry))
    said = get_docs_for_click(obj=command, ctx=typer.Context(command), name=name, call_prefix=before)
    return re.sub(r"\A#+ .*\n+", "", said)


def _notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def _title(path: Path) -> str:
    return path.stem.partition("_")[2].replace("_", " ").capitalize()


def _notebook(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """A notebook as it is saved, outputs included; nothing is run."""
    library: Any = nbformat  # neither carries types
    exporter: Any = MarkdownExporter
    text, found = exporter().from_notebook_node(library.read(path, as_version=4), {"unique_key": path.stem})
    yield f"notebooks/{path.stem}.md", text
    for name, image in found.get("outputs", {}).items():
        yield f"notebooks/{name}", image

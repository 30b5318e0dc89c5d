"""What ``persona-lens traits`` and ``persona-lens roles`` have in common: files are listed, checked and begun alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from persona_lens.cli import options
from persona_lens.cli.display import print_plain_table, say, say_json
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import write_text
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.traits import Advice, DefinitionFile, Report
    from persona_lens.traits.kind import Content, Kind


class RefusedError(PersonaLensError):
    """A command would have to destroy something, and does not."""


def list_all(
    kind: Kind[Content], folders: Sequence[Path] | None, column: str, summary: Callable[[Content], str], as_json: bool
) -> None:
    """List what is within reach, and where each one comes from.

    Args:
        kind: Of what.
        folders: Those that were named.
        column: The head of a column between name and place.
        summary: What stands in it.
        as_json: Whether everything is told, as JSON.
    """
    from persona_lens.traits.discovery import find

    catalogue = find(kind, folders or ())
    loaded = [(file, *_read(file)) for file in catalogue.files]
    if as_json:
        hidden = [
            {"name": s.used.name, "used": s.used.path, "hidden": s.hidden.path, "identical": s.identical}
            for s in catalogue.shadowed
        ]
        problems = [str(problem) for problem in catalogue.problems]
        found = {kind.plural: [_listed(*row) for row in loaded], "shadowed": hidden, "problems": problems}
        say_json(found, indent=2)
        return
    rows = [
        (file.name, summary(content) if content else _broken(error), file.source.label)
        for file, content, error in loaded
    ]
    print_plain_table(("name", column, "from"), rows)
    for _, _, error in loaded:
        if error:
            say(f"error: {error}", err=True)
    options.say_notes(catalogue.warnings(), "warning")


def show_file(
    file: DefinitionFile[Content], page: Callable[[Content, DefinitionFile[Content]], str], as_json: bool
) -> None:
    """Show what a file defines, as text for people or as JSON."""
    content = file.read()
    if as_json:
        whole = content.model_dump(mode="json")
        say_json({"path": file.path, "content_hash": content.content_hash(), **whole}, indent=2)
    else:
        say(page(content, file))


def check_all(
    kind: Kind[Content],
    named: Sequence[str] | None,
    folders: Sequence[Path] | None,
    check: Callable[[Content], Iterable[Advice]],
    strict: bool,
    as_json: bool,
) -> None:
    """Check files, and say in which line to change what; the exit code is 1 if there are errors.

    Args:
        kind: Of what.
        named: Names or paths; all within reach if none.
        folders: Those that were named.
        check: What to look for beyond the schema.
        strict: Whether warnings are errors.
        as_json: Whether it is told as JSON.
    """
    from persona_lens.traits import check_file
    from persona_lens.traits.discovery import find

    if named:
        files = [options.find_file(kind, each, folders) for each in named]
    else:
        catalogue = find(kind, folders or ())
        files = list(catalogue.files)
        options.say_notes(catalogue.warnings(), "warning")
    reports = [check_file(file, check) for file in files]
    failed = [report for report in reports if report.errors or (strict and report.warnings)]
    if as_json:
        say_json({"ok": not failed, kind.plural: [_reported(report) for report in reports]}, indent=2)
    else:
        for report in reports:
            say("\n".join([_verdict(report), *(f"  {p.severity}: {p}" for p in report.problems)]))
    if failed:
        raise typer.Exit(1)


def begin(kind: Kind[Any], name: str, text: str, folder: Path, as_json: bool) -> None:
    """Write the template of a new file, and say what to do next.

    Raises:
        RefusedError: It is there already, or cannot be written.
    """
    from persona_lens.traits import user_folder
    from persona_lens.traits.discovery import find

    target = folder / f"{name}.yaml"
    existing = [file for file in find(kind).files if file.name == name]
    write_new(target, text)
    options.say_notes([f"there is a {kind.noun} {name} already, {f.path} ({f.source.kind})" for f in existing])
    if as_json:
        say_json({"path": str(target)}, indent=2)
        return
    searched = folder.resolve() in {Path(kind.plural).resolve(), user_folder(kind).resolve()}
    option = "" if searched else f" --{kind.plural}-dir {folder}"
    say(
        f"Wrote {target}\n"
        "Next:\n"
        '  1. Replace every text that says "TODO:".\n'
        f"  2. See what is left:  persona-lens {kind.plural} check {target}\n"
        f"  3. Read it by name:   persona-lens {kind.plural} show {name}{option}"
    )


def write_new(target: Path, text: str) -> None:
    """Write a file that is not there yet.

    Raises:
        RefusedError: It is there, or cannot be written.
    """
    write_text(target, text, new=True, failed=RefusedError)


def _read(file: DefinitionFile[Content]) -> tuple[Content | None, str]:
    from persona_lens.traits import DefinitionError

    try:
        return file.read(), ""
    except DefinitionError as error:
        return None, str(error)


def _broken(error: str) -> str:
    return f"broken: {counted(len(error.splitlines()), 'problem')}"


def _listed(file: DefinitionFile[Any], content: Any, error: str) -> dict[str, Any]:
    return {
        "name": file.name,
        "description": content.description if content else None,
        "content_hash": content.content_hash() if content else None,
        "source": file.source.kind,
        "from": file.source.label,
        "path": file.path,
        "error": error or None,
    }


def _reported(report: Report) -> dict[str, Any]:
    found = {"errors": report.errors, "warnings": report.warnings}
    listed = {name: [each.to_json() for each in problems] for name, problems in found.items()}
    return {"name": report.name, "path": report.path, **listed}


def _verdict(report: Report) -> str:
    if not report.problems:
        return f"{report.name}: ok"
    counts = [(len(report.errors), "error"), (len(report.warnings), "warning")]
    return f"{report.name}: " + ", ".join(counted(n, word) for n, word in counts if n)

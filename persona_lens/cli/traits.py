"""``persona-lens traits``: list, read, check and begin trait files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import options
from persona_lens.cli.authoring import AuthorOptions, author_trait, show_plan, write_new
from persona_lens.cli.display import print_plain_table, say, say_json
from persona_lens.cli.settings import Option, argument, given_options
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.traits import Report, Trait, TraitFile

CHECKED = argument("[TRAIT]...", "Names, or paths of YAML files; every trait if none.")
TraitsDirs = Annotated[
    list[Path] | None,
    Option("Another folder of trait files; it comes before all others. Repeatable, the last one wins.", metavar="DIR"),
]


def list_traits(traits_dir: TraitsDirs = None, as_json: options.AsJson = False) -> None:
    """List the traits within reach and where each one comes from.

    From far to near: built in, installed packages, your own folder (`PERSONA_LENS_TRAITS_DIR` moves it),
    `./traits`, and each `--traits-dir`. The nearest definition of a name wins.

    Example: `persona-lens traits list --traits-dir my-traits`
    """
    from persona_lens.traits import find_traits

    catalogue = find_traits(traits_dir or ())
    loaded = [(file, *_read(file)) for file in catalogue.files]
    if as_json:
        hidden = [
            {"name": s.used.name, "used": s.used.path, "hidden": s.hidden.path, "identical": s.identical}
            for s in catalogue.shadowed
        ]
        problems = [str(problem) for problem in catalogue.problems]
        found = {"traits": [_listed(*row) for row in loaded], "shadowed": hidden, "problems": problems}
        say_json(found, indent=2)
        return
    rows = [(file.name, _summary(trait, error), file.source.label) for file, trait, error in loaded]
    print_plain_table(("name", "contrast", "from"), rows)
    for _, _, error in loaded:
        if error:
            say(f"error: {error}", err=True)
    options.say_notes(catalogue.warnings(), "warning")


def show(trait: options.TraitName, traits_dir: TraitsDirs = None, as_json: options.AsJson = False) -> None:
    """Show a trait: its contrast, its questions and the rubric of its judge.

    Example: `persona-lens traits show optimistic`
    """
    from persona_lens.traits.rendering import page

    file = options.find_trait(trait, traits_dir)
    content = file.read()
    if as_json:
        say_json(
            {"path": file.path, "content_hash": content.content_hash(), **content.model_dump(mode="json")}, indent=2
        )
    else:
        say(page(content, file))


def path(trait: options.TraitName, traits_dir: TraitsDirs = None) -> None:
    """Print the path of the file that defines a trait.

    Example: `cp "$(persona-lens traits path optimistic)" my-traits/`
    """
    say(options.find_trait(trait, traits_dir).path)


def check(
    traits: Annotated[list[str] | None, CHECKED] = None,
    traits_dir: TraitsDirs = None,
    deep: bool = False,
    strict: bool = False,
    as_json: options.AsJson = False,
) -> None:
    """Check trait files, and say in which line to change what.

    The exit code is 1 if there are errors. `--deep` compares words, not meanings: it knows no synonyms.

    Example: `persona-lens traits check my-traits/grumpy.yaml --deep --strict`

    Args:
        deep: Also compare the parts of a trait: paraphrases, leaks, lengths, the rubric.
        strict: Treat warnings as errors.
    """
    from persona_lens.traits import check_deeply, check_file, check_trait, find_traits

    if traits:
        files = [options.find_trait(trait, traits_dir) for trait in traits]
    else:
        catalogue = find_traits(traits_dir or ())
        files = list(catalogue.files)
        options.say_notes(catalogue.warnings(), "warning")
    reports = [check_file(file, check_deeply if deep else check_trait) for file in files]
    failed = [report for report in reports if report.errors or (strict and report.warnings)]
    if as_json:
        say_json({"ok": not failed, "traits": [_reported(report) for report in reports]}, indent=2)
    else:
        for report in reports:
            say("\n".join([_verdict(report), *(f"  {p.severity}: {p}" for p in report.problems)]))
    if failed:
        raise typer.Exit(1)


def new(
    name: Annotated[str, argument("NAME", "The new trait's name, such as grumpy.")],
    description: str = "",
    folder: Annotated[Path, Option(names=("--dir",), metavar="DIR")] = Path("traits"),
    *,
    authored: AuthorOptions,
    dry_run: Annotated[bool, Option("Only say how many requests it would take.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Begin a trait file, NAME.yaml: a commented template, or what an author model writes.

    An author model needs a description. Every reply is checked, and what is missing or weak is asked for again. A run
    that fails or is stopped leaves NAME.partial.json behind, and the same command goes on from it.

    Example: `persona-lens traits new grumpy --description "Complains about everything." --dir my-traits`

    Args:
        description: What the trait is.
        folder: The folder to write to.
    """
    if authored.author_model is not None:
        authored.check()
        show_plan(name, authored, as_json) if dry_run else author_trait(name, description, folder, authored, as_json)
        return
    if useless := [*given_options(authored), *(["--dry-run"] if dry_run else [])]:
        raise PersonaLensError(f"{useless[0]} is for a trait that a model writes: give --author-model too")
    from persona_lens.traits import find_traits, trait_template

    text = trait_template(name, description)
    target = folder / f"{name}.yaml"
    existing = [file for file in find_traits().files if file.name == name]
    write_new(target, text)
    options.say_notes([f"there is a trait {name} already, {file.path} ({file.source.kind})" for file in existing])
    if as_json:
        say_json({"path": str(target)}, indent=2)
        return
    option = "" if _is_searched(folder) else f" --traits-dir {folder}"
    say(
        f"Wrote {target}\n"
        "Next:\n"
        '  1. Replace every text that says "TODO:".\n'
        f"  2. See what is left:  persona-lens traits check {target}\n"
        f"  3. Read it by name:   persona-lens traits show {name}{option}"
    )


def schema() -> None:
    """Print the JSON Schema of trait files, with which an editor completes and checks them.

    Example: `persona-lens traits schema > trait.schema.json`
    """
    from persona_lens.traits import json_schema

    say_json(json_schema(), indent=2)


def _is_searched(folder: Path) -> bool:
    from persona_lens.traits import user_folder

    return folder.resolve() in {Path("traits").resolve(), user_folder().resolve()}


def _read(file: TraitFile) -> tuple[Trait | None, str]:
    from persona_lens.traits import TraitError

    try:
        return file.read(), ""
    except TraitError as error:
        return None, str(error)


def _summary(trait: Trait | None, error: str) -> str:
    if trait is None:
        return f"broken: {counted(len(error.splitlines()), 'problem')}"
    return f"{trait.adjectives.positive} / {trait.adjectives.negative}"


def _listed(file: TraitFile, trait: Trait | None, error: str) -> dict[str, Any]:
    return {
        "name": file.name,
        "description": trait.description if trait else None,
        "content_hash": trait.content_hash() if trait else None,
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

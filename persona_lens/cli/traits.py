"""``persona-lens traits``: list, read, check and begin trait files."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.authoring import AuthorModel, Order, Place, author_trait, import_trait, show_plan, write_new
from persona_lens.cli.display import console, say, say_json
from persona_lens.cli.grouping import given_options, grouped
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.traits import Catalogue, Problem, Report, Trait, TraitFile

# The traits package (pydantic, YAML) is imported inside the commands: `--help` has to be instant.

app = typer.Typer(
    name="traits",
    help="Find, read, check and write character traits.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

TraitsDirs = Annotated[
    list[Path] | None,
    typer.Option(
        "--traits-dir",
        metavar="DIR",
        help="Another folder of trait files; it comes before all others. Repeatable, the last one wins.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]
OneTrait = Annotated[
    str,
    typer.Argument(metavar="TRAIT", help="A trait's name, or the path of a YAML file.", show_default=False),
]


app.command("import")(import_trait)


@app.command("list")
def list_traits(traits_dir: TraitsDirs = None, as_json: AsJson = False) -> None:
    """List the traits within reach and where each one comes from.

    From far to near: built in, installed packages, your own folder (`PERSONA_LENS_TRAITS_DIR` moves it),
    `./traits`, and each `--traits-dir`. The nearest definition of a name wins.

    Example: `persona-lens traits list --traits-dir my-traits`
    """
    from persona_lens.traits import find_traits

    catalogue = find_traits(traits_dir or ())
    loaded = [(file, *_read(file)) for file in catalogue.files]
    if as_json:
        _print_json(
            {
                "traits": [_listed(*row) for row in loaded],
                "shadowed": [
                    {
                        "name": s.used.name,
                        "used": s.used.path,
                        "hidden": s.hidden.path,
                        "identical": s.identical,
                    }
                    for s in catalogue.shadowed
                ],
                "problems": [str(problem) for problem in catalogue.problems],
            }
        )
        return
    rows = [(file.name, _summary(trait, error), file.source.label) for file, trait, error in loaded]
    _print_table(("name", "contrast", "from"), rows)
    for _, _, error in loaded:
        if error:
            say(f"error: {error}", err=True)
    _warn(catalogue)


@app.command("show")
def show(trait: OneTrait, traits_dir: TraitsDirs = None, as_json: AsJson = False) -> None:
    """Show a trait: its contrast, its questions and the rubric of its judge.

    Example: `persona-lens traits show optimistic`
    """
    file = _resolve(trait, traits_dir)
    content = file.read()
    if as_json:
        _print_json({"path": file.path, "content_hash": content.content_hash(), **content.model_dump(mode="json")})
    else:
        say(_page(content, file))


@app.command("path")
def path(trait: OneTrait, traits_dir: TraitsDirs = None) -> None:
    """Print the path of the file that defines a trait.

    Example: `cp "$(persona-lens traits path optimistic)" my-traits/`
    """
    say(_resolve(trait, traits_dir).path)


@app.command("check")
def check(
    traits: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TRAIT]...",
            help="Names, or paths of YAML files; every trait if none.",
            show_default=False,
        ),
    ] = None,
    traits_dir: TraitsDirs = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compare the parts of a trait: paraphrases, leaks, lengths, the rubric.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check trait files, and say in which line to change what.

    The exit code is 1 if there are errors. `--deep` compares words, not meanings: it knows no synonyms.

    Example: `persona-lens traits check my-traits/grumpy.yaml --deep --strict`
    """
    from persona_lens.traits import check_deeply, check_file, check_trait, find_traits

    if traits:
        files = [_resolve(trait, traits_dir) for trait in traits]
    else:
        catalogue = find_traits(traits_dir or ())
        files = list(catalogue.files)
        _warn(catalogue)
    reports = [check_file(file, check_deeply if deep else check_trait) for file in files]
    failed = [report for report in reports if report.errors or (strict and report.warnings)]
    if as_json:
        _print_json({"ok": not failed, "traits": [_reported(report) for report in reports]})
    else:
        for report in reports:
            say("\n".join([_verdict(report), *(f"  {p.severity}: {p}" for p in report.problems)]))
    if failed:
        raise typer.Exit(1)


@app.command("new")
@grouped
def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The new trait's name, such as grumpy.", show_default=False)
    ],
    description: Annotated[str, typer.Option("--description", help="What the trait is.", show_default=False)] = "",
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="The folder to write to.")] = Path("traits"),
    author_model: AuthorModel = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**62, help="Of the author model.", show_default="0")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of the author model; 0 is greedy.", show_default="0.8")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Limit of each of its replies.", show_default="1500")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many requests it would take.")] = False,
    as_json: AsJson = False,
    *,
    place: Place,
) -> None:
    """Begin a trait file, NAME.yaml: a commented template, or what an author model writes.

    An author model needs a description. Every reply is checked, and what is missing or weak is asked for again. A run
    that fails or is stopped leaves NAME.partial.json behind, and the same command goes on from it.

    Example: `persona-lens traits new grumpy --description "Complains about everything." --dir my-traits`
    """
    if author_model is not None:
        sampling = _sampling(temperature, max_new_tokens)
        order = Order(name, description, folder, author_model, seed or 0, *sampling, place)
        show_plan(order, as_json) if dry_run else author_trait(order, as_json)
        return
    sampled = {"--seed": seed, "--temperature": temperature, "--max-new-tokens": max_new_tokens}
    useless = [name for name, given in {**sampled, "--dry-run": dry_run or None}.items() if given is not None]
    if useless := [*useless, *given_options(place)]:
        raise PersonaLensError(f"{useless[0]} is for a trait that a model writes: give --author-model too")
    from persona_lens.traits import find_traits, trait_template

    text = trait_template(name, description)
    target = folder / f"{name}.yaml"
    existing = [file for file in find_traits().files if file.name == name]
    write_new(target, text)
    for file in existing:
        say(f"note: there is a trait {name} already, {file.path} ({file.source.kind})", err=True)
    if as_json:
        _print_json({"path": str(target)})
        return
    option = "" if _is_searched(folder) else f" --traits-dir {folder}"
    say(
        f"Wrote {target}\n"
        "Next:\n"
        '  1. Replace every text that says "TODO:".\n'
        f"  2. See what is left:  persona-lens traits check {target}\n"
        f"  3. Read it by name:   persona-lens traits show {name}{option}"
    )


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of trait files, with which an editor completes and checks them.

    Example: `persona-lens traits schema > trait.schema.json`
    """
    from persona_lens.traits import json_schema

    _print_json(json_schema())


def _sampling(temperature: float | None, max_new_tokens: int | None) -> tuple[float, int]:
    from persona_lens.traits.generate.authors import MAX_NEW_TOKENS, TEMPERATURE

    if temperature is not None and not 0 <= temperature < math.inf:
        raise PersonaLensError(f"--temperature must be 0 or more; got {temperature}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise PersonaLensError(f"--max-new-tokens must be 1 or more; got {max_new_tokens}")
    return TEMPERATURE if temperature is None else temperature, max_new_tokens or MAX_NEW_TOKENS


def _resolve(trait: str, traits_dir: Sequence[Path] | None) -> TraitFile:
    from persona_lens.traits import file_at, find_traits, is_path

    if is_path(trait):
        return file_at(trait)
    catalogue = find_traits(traits_dir or ())
    file = catalogue.find(trait)
    _warn(catalogue, [trait])
    return file


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
        count = len(error.splitlines())
        return f"broken: {count} {'problem' if count == 1 else 'problems'}"
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
    def items(problems: Sequence[Problem]) -> list[dict[str, Any]]:
        return [{"line": p.line, "field": p.field, "message": p.message} for p in problems]

    return {
        "name": report.name,
        "path": report.path,
        "errors": items(report.errors),
        "warnings": items(report.warnings),
    }


def _verdict(report: Report) -> str:
    if not report.problems:
        return f"{report.name}: ok"
    counts = [(len(report.errors), "error"), (len(report.warnings), "warning")]
    return f"{report.name}: " + ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in counts if n)


def _page(trait: Trait, file: TraitFile) -> str:
    import textwrap

    def wrapped(text: str, lead: str) -> str:
        return textwrap.fill(text, 100, initial_indent=lead, subsequent_indent=" " * len(lead))

    lines = [trait.name, wrapped(trait.description, "  "), ""]
    facts = {
        "contrast": f"{trait.adjectives.positive} / {trait.adjectives.negative}",
        "file": f"{file.path} ({file.source.kind})",
        "content": trait.content_hash(),
        "author": trait.author,
        "license": trait.license,
        "tags": ", ".join(trait.tags),
        "references": "; ".join(trait.references),
    }
    lines += [f"  {key + ':':<12}{value}" for key, value in facts.items() if value]
    lines += ["", "Instructions (+ calls the trait forth, - its opposite)"]
    for i, pair in enumerate(trait.instructions, 1):
        lines += [wrapped(pair.positive, f"  {i} + "), wrapped(pair.negative, "    - ")]
    for title, questions in (
        ("Extraction questions", trait.extraction_questions),
        ("Evaluation questions", trait.evaluation_questions),
    ):
        lines += ["", title, *(wrapped(question, f"  {i:>2} ") for i, question in enumerate(questions, 1))]
    if trait.graded_prompts:
        graded = [wrapped(prompt, f"  {i} ") for i, prompt in enumerate(trait.graded_prompts, 1)]
        lines += ["", "Graded prompts (1 holds the trait back, 8 calls it forth)", *graded]
    return "\n".join([*lines, "", "Judge's rubric", textwrap.indent(trait.judge_rubric, "  ")])


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        from rich.table import Table
        from rich.text import Text

        table = Table(*head, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # Text: a folder called [x] is no markup
        console().print(table)
        return
    # Into a file or a pipe: whole lines whatever the width, and nothing but text.
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_json(data: object) -> None:
    say_json(data, indent=2)


def _warn(catalogue: Catalogue, names: Sequence[str] | None = None) -> None:
    for warning in catalogue.warnings(names):
        say(f"warning: {warning}", err=True)

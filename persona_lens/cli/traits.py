"""``persona-lens traits``: list, read, check and begin trait files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from persona_lens.cli import options
from persona_lens.cli.authoring import AuthorOptions, author_file
from persona_lens.cli.definitions import begin, check_all, list_all, show_file
from persona_lens.cli.display import say, say_json
from persona_lens.cli.settings import Option, argument

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
    from persona_lens.traits.schema import TRAITS

    list_all(TRAITS, traits_dir, "contrast", lambda t: f"{t.adjectives.positive} / {t.adjectives.negative}", as_json)


def show(trait: options.TraitName, traits_dir: TraitsDirs = None, as_json: options.AsJson = False) -> None:
    """Show a trait: its contrast, its questions and the rubric of its judge.

    Example: `persona-lens traits show optimistic`
    """
    from persona_lens.traits.rendering import page

    show_file(options.find_trait(trait, traits_dir), page, as_json)


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
    from persona_lens.traits import check_deeply, check_trait
    from persona_lens.traits.schema import TRAITS

    check_all(TRAITS, traits, traits_dir, check_deeply if deep else check_trait, strict, as_json)


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
        from persona_lens.traits.generate import WRITING

        author_file(WRITING, name, description, folder, authored, dry_run, as_json)
        return
    authored.refuse_without_model("trait", dry_run)
    from persona_lens.traits import trait_template
    from persona_lens.traits.schema import TRAITS

    begin(TRAITS, name, trait_template(name, description), folder, as_json)


def schema() -> None:
    """Print the JSON Schema of trait files, with which an editor completes and checks them.

    Example: `persona-lens traits schema > trait.schema.json`
    """
    from persona_lens.traits import json_schema

    say_json(json_schema(), indent=2)

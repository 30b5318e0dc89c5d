"""``persona-lens traits new --author-model`` and ``traits import``: traits that a model or somebody else wrote."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import print_table, say, say_json, showing_progress
from persona_lens.cli.judges import SERVER_URL, Prices, ServerKey, open_server, say_usage
from persona_lens.cli.runner import deliver
from persona_lens.cli.settings import Option, argument, given_options
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import write_text
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.models.server import CompletionServer
    from persona_lens.traits.generate import Author, Draft, Written

EVALUATION = argument("[EVAL.json]", "From `trait_data_eval`; left out if EXTRACT.json holds forty questions.")
HERE = ("--backend", "--dtype", "--device")  # what a model on a server has no use for


class RefusedError(PersonaLensError):
    """A command would have to destroy something, and does not."""


@dataclass(frozen=True)
class Place:
    """Where an author model is, and what it may cost.

    Attributes:
        max_spend: Stop before the author costs more dollars.
        backend: Library to run an author model through here; None for transformers.
        dtype: `float32`, `bfloat16` or `float16`; None for auto.
        device: A torch device such as `cuda:1`; None for auto.
    """

    author_url: Annotated[str | None, Option(SERVER_URL)] = None
    author_key: ServerKey = None
    prices: Prices = None
    max_spend: float | None = None
    backend: str | None = None
    dtype: str | None = None
    device: str | None = None

    def refuse_useless(self, model: str) -> None:
        """Raise an error for options that an author model has no use for."""
        from persona_lens.traits.generate import on_server

        server = on_server(model)
        useless = [name for name in given_options(self) if (name in HERE) is server]
        if useless:
            kind = "a model that runs here" if server else "--author-model openai:NAME"
            raise PersonaLensError(f"{', '.join(useless)}: only for {kind}, this is {model!r}")

    def open_server(self, name: str) -> CompletionServer:
        """The server of a model; nothing is asked of it yet."""
        from persona_lens.traits.generate.authors import TIMEOUT

        return open_server(
            name, self.author_url, self.author_key, prices=self.prices, max_spend=self.max_spend, timeout=TIMEOUT
        )

    def open_model(self, name: str) -> Backend:
        """A model that runs here."""
        backend = self.backend or "transformers"
        return options.open_model(name, backend, revision=None, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Order:
    """What a model is to write, and where to."""

    name: str
    description: str
    folder: Path
    model: str
    seed: int
    temperature: float
    max_new_tokens: int
    place: Place

    @property
    def target(self) -> Path:
        """The trait file."""
        return self.folder / f"{self.name}.yaml"

    @property
    def partial(self) -> Path:
        """What there is while the trait is not finished."""
        return self.folder / f"{self.name}.partial.json"


def show_plan(order: Order, as_json: bool) -> None:
    """Say how many requests a trait takes; nothing is asked, and no model is opened."""
    from persona_lens.traits.generate import plan
    from persona_lens.traits.rendering import check_name

    check_name(order.name)
    order.place.refuse_useless(order.model)
    steps = plan()
    least, most = sum(step.at_least for step in steps), sum(step.at_most for step in steps)
    found = {"model": order.model, "steps": [asdict(step) for step in steps]}
    rows = [*((step.step, str(step.at_least), str(step.at_most)) for step in steps), ("in all", str(least), str(most))]
    deliver(
        {**found, "total": {"at_least": least, "at_most": most}},
        lambda: print_table(f"Requests to {order.model}", ("", "at least", "at most"), rows),
        as_json,
    )


def author_trait(order: Order, as_json: bool) -> None:
    """Let a model write a trait; what there is when it fails stays in a file, from which the same command goes on."""
    from persona_lens.traits.generate import AuthoringError, load_draft, new_draft, open_author

    new_draft(order.name, order.description, {})  # what is wrong with these is said before a model is opened
    order.place.refuse_useless(order.model)
    if order.target.exists():
        raise RefusedError(f"{order.target} exists already: remove it, or choose another name or folder")
    earlier = load_draft(order.partial)
    author = open_author(
        order.model,
        seed=order.seed,
        temperature=order.temperature,
        max_new_tokens=order.max_new_tokens,
        first_request=earlier.requests if earlier else 0,
        open_model=order.place.open_model,
        open_server=order.place.open_server,
    )
    origin = json.loads(json.dumps({**author.describe(), "seed": order.seed, "temperature": order.temperature}))
    draft = new_draft(order.name, order.description, origin)
    if earlier:
        try:
            earlier.continues(draft)
        except AuthoringError as error:
            raise RefusedError(f"{order.partial} {error}") from error
        options.say_notes([f"going on from {order.partial}, after {counted(earlier.requests, 'request')}"])
        draft = earlier
    _finish(order, draft, _write(author, draft, order.partial), as_json)


def _write(author: Author, draft: Draft, file: Path) -> Written:
    """Have a draft finished, with its state in a file all along, and say what that cost."""
    from persona_lens.traits.generate import AuthoringError, ServerAuthor, write_trait

    save = partial(_save, path=file)
    save(draft)  # a folder that cannot be written to is found out before anything is asked
    try:
        with showing_progress() as progress:
            return write_trait(author, draft, save=save, progress=progress)
    except AuthoringError as error:
        save(draft)
        raise AuthoringError(f"{error}. What there is stands in {file}; the same command goes on from there") from error
    finally:
        if isinstance(author, ServerAuthor):
            say_usage(author.server, "author")


def _finish(order: Order, draft: Draft, written: Written, as_json: bool) -> None:
    from persona_lens import __version__
    from persona_lens.traits import check_deeply, check_file, file_at
    from persona_lens.traits.generate import written_text

    write_new(order.target, written_text(draft, __version__))
    order.partial.unlink(missing_ok=True)
    related = draft.names.related if draft.names else ()
    report = check_file(file_at(order.target), partial(check_deeply, related=related))
    if as_json:
        warnings = [{"line": p.line, "field": p.field, "message": p.message} for p in report.warnings]
        content = {"path": str(order.target), "content_hash": written.trait.content_hash(), **draft.origin}
        say_json({**content, "requests": written.requests, "warnings": warnings})
        return
    for problem in report.problems:
        say(f"{problem.severity}: {problem}", err=True)
    warned = counted(len(report.problems), "warning") if report.problems else "no warnings"
    say(
        f"Wrote {order.target} in {counted(written.requests, 'request')}, with {warned}\n"
        "Next:\n"
        "  1. Read it: a model wrote it, and the checks compare words, not meanings.\n"
        f"  2. After changes:  persona-lens traits check {order.target} --deep"
    )


def import_trait(
    extraction: Annotated[Path, argument("EXTRACT.json", "From `trait_data_extract`.")],
    evaluation: Annotated[Path | None, EVALUATION] = None,
    name: Annotated[str | None, Option("The trait's name.", shown="the file's")] = None,
    description: Annotated[str | None, Option("What the trait is.", shown="from the rubric")] = None,
    positive_adjective: Annotated[str | None, Option("Of the positive arm.", shown="the name")] = None,
    negative_adjective: Annotated[str, Option("Of the negative arm, such as the antonym.")] = "helpful",
    out: Annotated[Path, Option("The folder to write to.", metavar="DIR")] = Path("traits"),
    as_json: options.AsJson = False,
) -> None:
    """Take over a trait of the paper's reference implementation, as a YAML file.

    Its traits are JSON files in `data_generation/trait_data_extract` and `trait_data_eval`.

    Example: `persona-lens traits import extract/rude.json eval/rude.json --negative-adjective polite --out my-traits`
    """
    from persona_lens.traits import check_deeply, check_file, file_at
    from persona_lens.traits.generate import import_reference

    imported = import_reference(
        extraction,
        evaluation,
        name=name,
        description=description,
        positive=positive_adjective,
        negative=negative_adjective,
    )
    target = out / f"{imported.trait.name}.yaml"
    write_new(target, imported.text)
    warnings = check_file(file_at(target), check_deeply).warnings
    if as_json:
        content: dict[str, Any] = {"path": str(target), "content_hash": imported.trait.content_hash()}
        content["warnings"] = [{"line": p.line, "field": p.field, "message": p.message} for p in warnings]
        say_json({**content, "notes": imported.notes})
        return
    options.say_notes(imported.notes)
    say(f"Wrote {target}")
    if warnings:
        say(f"{len(warnings)} of its texts could be better:  persona-lens traits check {target} --deep")


def write_new(target: Path, text: str) -> None:
    """Write a file that is not there yet.

    Raises:
        RefusedError: It is there, or cannot be written.
    """
    write_text(target, text, new=True, failed=RefusedError)


def _save(draft: Draft, path: Path) -> None:
    draft.save(path)

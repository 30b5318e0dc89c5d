"""``new --author-model`` of traits and roles, and ``traits import``: what a model or somebody else wrote."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import persona_lens
from persona_lens.cli import options
from persona_lens.cli.definitions import RefusedError, write_new
from persona_lens.cli.display import print_table, say, say_json, showing_progress
from persona_lens.cli.options.judges import SERVER_URL, Prices, ServerKey, open_server, say_usage
from persona_lens.cli.runner import deliver
from persona_lens.cli.settings import Option, argument, given_options
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.progress import keeping
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.models.server import CompletionServer
    from persona_lens.traits.generate import Author, Procedure, Written
    from persona_lens.traits.generate.unfinished import DraftT
    from persona_lens.traits.kind import Content

EVALUATION = argument("[EVAL.json]", "From `trait_data_eval`; left out if EXTRACT.json holds forty questions.")
# What a model on a server has no use for.
HERE = ("--backend", "--backend-option", "--dtype", "--device", "--thinking-budget")
THERE = ("--author-url", "--author-key", "--prices", "--max-spend")  # what one that runs here has none for


@dataclass(frozen=True)
class AuthorOptions:
    """Which model writes a file, where it is, and what it may cost.

    Attributes:
        author_model: Let a model write it: `openai:NAME` on any OpenAI-compatible server, or a model that runs here.
        seed: Of the author model; None for 0.
        temperature: Of the author model, 0 is greedy; None for 0.8.
        max_new_tokens: Limit of each of its replies; None for 1500.
        thinking_budget: How many tokens it may think before each; None for no limit.
        max_spend: Stop before the author costs more dollars.
        backend: Library to run an author model through here; None for transformers.
        dtype: `float32`, `bfloat16` or `float16`; None for auto.
        device: A torch device such as `cuda:1`; None for auto.
    """

    author_model: Annotated[str | None, Option(metavar="MODEL")] = None
    seed: int | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    thinking_budget: int | None = None
    author_url: Annotated[str | None, Option(SERVER_URL)] = None
    author_key: ServerKey = None
    prices: Prices = None
    max_spend: float | None = None
    backend: str | None = None
    backend_option: options.BackendOptions = None
    dtype: str | None = None
    device: str | None = None

    def refuse_without_model(self, noun: str, dry_run: bool) -> None:
        """Raise an error for options that only a model which writes has a use for."""
        if useless := [*given_options(self), *(["--dry-run"] if dry_run else [])]:
            raise PersonaLensError(f"{useless[0]} is for a {noun} that a model writes: give --author-model too")

    def check(self) -> None:
        """Raise an error for options that mean nothing, or that the author model has no use for."""
        from persona_lens.traits.generate import on_server

        model = self.author_model or ""
        server = on_server(model)
        if useless := [name for name in given_options(self) if name in (HERE if server else THERE)]:
            kind = "a model that runs here" if server else "--author-model openai:NAME"
            raise PersonaLensError(f"{', '.join(useless)}: only for {kind}, this is {model!r}")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise PersonaLensError(f"--temperature must be 0 or more; got {self.temperature}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise PersonaLensError(f"--max-new-tokens must be 1 or more; got {self.max_new_tokens}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise PersonaLensError(f"--thinking-budget must be 0 or more; got {self.thinking_budget}")

    def sampled(self) -> dict[str, Any]:
        """How the author writes."""
        from persona_lens.traits.generate.authors import MAX_NEW_TOKENS, TEMPERATURE

        temperature = TEMPERATURE if self.temperature is None else self.temperature
        length = self.max_new_tokens or MAX_NEW_TOKENS
        return {"seed": self.seed or 0, "temperature": temperature, "max_new_tokens": length}

    def open(self, first_request: int) -> Author:
        """The author, who has been asked so many requests before."""
        from persona_lens.traits.generate import open_author

        how = {**self.sampled(), "first_request": first_request}
        how |= {} if self.thinking_budget is None else {"thinking_budget": self.thinking_budget}
        return open_author(self.author_model or "", **how, open_model=self._model, open_server=self._server)

    def _server(self, name: str) -> CompletionServer:
        from persona_lens.traits.generate.authors import TIMEOUT

        return open_server(
            name, self.author_url, self.author_key, prices=self.prices, max_spend=self.max_spend, timeout=TIMEOUT
        )

    def _model(self, name: str) -> Backend:
        given = {"backend": self.backend, "dtype": self.dtype, "device": self.device}
        said: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
        return options.ModelOptions(backend_option=self.backend_option, **said).open(name)


def author_file(
    procedure: Procedure[DraftT, Content],
    name: str,
    description: str,
    folder: Path,
    authored: AuthorOptions,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Let a model write a file; what there is when it fails stays in another, from which the same command goes on.

    Args:
        procedure: How a model writes one.
        name: Of what is written.
        description: What that is.
        folder: Where the file is to be.
        authored: Which model.
        dry_run: Only say how many requests it would take.
        as_json: Whether to say it as JSON.
    """
    from persona_lens.traits.generate import AuthoringError

    authored.check()
    if dry_run:
        _show_plan(procedure, name, authored, as_json)
        return
    procedure.draft.begin(name, description, {})  # what is wrong with these is said before a model is opened
    target, unfinished = folder / f"{name}.yaml", folder / f"{name}.partial.json"
    if target.exists():
        raise RefusedError(f"{target} exists already: remove it, or choose another name or folder")
    earlier = procedure.draft.load(unfinished)
    author = authored.open(earlier.requests if earlier else 0)
    sampled = authored.sampled()
    origin = {**author.describe(), "seed": sampled["seed"], "temperature": sampled["temperature"]}
    draft = procedure.draft.begin(name, description, json.loads(json.dumps(origin)))
    if earlier:
        try:
            earlier.continues(draft)
        except AuthoringError as error:
            raise RefusedError(f"{unfinished} {error}") from error
        options.say_notes([f"going on from {unfinished}, after {counted(earlier.requests, 'request')}"])
        draft = earlier
    written = _write(procedure, author, draft, unfinished)
    _tell(procedure, target, draft, written, unfinished, as_json)


def _show_plan(procedure: Procedure[Any, Any], name: str, authored: AuthorOptions, as_json: bool) -> None:
    """Say how many requests it takes; nothing is asked, and no model is opened."""
    from persona_lens.traits.rendering import check_name

    check_name(name, procedure.kind)
    steps = procedure.plan()
    least, most = sum(step.at_least for step in steps), sum(step.at_most for step in steps)
    found = {"model": authored.author_model, "steps": [asdict(step) for step in steps]}
    rows = [*((step.step, str(step.at_least), str(step.at_most)) for step in steps), ("in all", str(least), str(most))]
    deliver(
        {**found, "total": {"at_least": least, "at_most": most}},
        lambda: print_table(f"Requests to {authored.author_model}", ("", "at least", "at most"), rows),
        as_json,
    )


def _write(procedure: Procedure[DraftT, Content], author: Author, draft: DraftT, file: Path) -> Written[Content]:
    """Have a draft finished, with its state in a file all along, and say what that cost."""
    from persona_lens.traits.generate import AuthoringError, Limits, ServerAuthor
    from persona_lens.traits.generate.session import Session

    def save(draft: DraftT) -> None:
        draft.save(file)

    keeping()
    save(draft)  # a folder that cannot be written to is found out before anything is asked
    try:
        with showing_progress() as progress:
            return procedure.write(Session(author, draft, Limits(), save, progress))
    except AuthoringError as error:
        save(draft)
        raise AuthoringError(f"{error}. What there is stands in {file}; the same command goes on from there") from error
    finally:
        if isinstance(author, ServerAuthor):
            say_usage(author.server, "author")


def _tell(
    procedure: Procedure[DraftT, Content],
    target: Path,
    draft: DraftT,
    written: Written[Content],
    unfinished: Path,
    as_json: bool,
) -> None:
    """Write the file, and say what the checks make of it."""
    from persona_lens.traits import check_file, file_at
    from persona_lens.traits.generate import written_text

    write_new(target, written_text(draft, persona_lens.__version__))
    unfinished.unlink(missing_ok=True)
    report = check_file(file_at(target, procedure.kind), lambda content: procedure.check(content, draft))
    if as_json:
        content = {"path": str(target), "content_hash": written.content.content_hash(), **draft.origin}
        say_json({**content, "requests": written.requests, "warnings": [each.to_json() for each in report.warnings]})
        return
    for problem in report.problems:
        say(f"{problem.severity}: {problem}", err=True)
    warned = counted(len(report.problems), "warning") if report.problems else "no warnings"
    again = f"persona-lens {procedure.kind.plural} check {target}{procedure.checked_by}"
    say(
        f"Wrote {target} in {counted(written.requests, 'request')}, with {warned}\n"
        "Next:\n"
        "  1. Read it: a model wrote it, and the checks compare words, not meanings.\n"
        f"  2. After changes:  {again}"
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
        content = {"path": str(target), "content_hash": imported.trait.content_hash()}
        say_json({**content, "warnings": [each.to_json() for each in warnings], "notes": imported.notes})
        return
    options.say_notes(imported.notes)
    say(f"Wrote {target}")
    if warnings:
        say(f"{len(warnings)} of its texts could be better:  persona-lens traits check {target} --deep")

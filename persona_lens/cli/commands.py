"""The commands: what each is called and which function it is. A command's module is imported when it is used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from persona_lens.core.text import printable


@dataclass(frozen=True)
class Group:
    """Commands that stand behind one word.

    Attributes:
        help: What they are about.
        commands: The function of each, ``module:function`` of this package.
        example: One of them, for those who leave out the second word.
        usual: Which of them it is where the second word is none of them.
    """

    help: str
    commands: Mapping[str, str | Group]
    example: str | None = None
    usual: str | None = None


COMMANDS: Mapping[str, str | Group] = {
    "axis": Group(
        "Find the axis from the roles that a model can play to the default Assistant, and keep the model on its side.",
        {"extract": "axis:axis_command", "cap": "axis:cap_command"},
        usual="extract",
    ),
    "bake": "baking:bake_command",
    "bench-steer": "methods:methods_command",
    "demo": "extraction:demo",
    "extract": "extraction:extract",
    "generate": "generate:generate",
    "responses": "extraction:responses",
    "dissect": "analysis:dissect",
    "finetune": "finetuning:finetune_command",
    "finetune-study": "finetuning:finetune_study_command",
    "shift": "finetuning:shift_command",
    "reproduce": "reproduce:reproduce_command",
    "runs": "runs:runs_command",
    "screen": "screen:screen",
    "serve": "serve:serve_command",
    "steer": Group(
        "Steer along vectors: sweep, tune, compare, and see what it costs and how long it holds.",
        {
            "sweep": "steering:sweep_command",
            "tune": "steering:tune_command",
            "compare": "steering:compare_command",
            "capability": "analysis:capability_command",
            "effects": "steering:effects_command",
            "persist": "persistence:persist_command",
            "methods": "methods:methods_command",
        },
        "persona-lens steer sweep MODEL VECTORS",
    ),
    "vectors": Group(
        "Look into vectors, compare them, make them by other methods, and carry them to other programs.",
        {
            "fit": "fitting:fit_command",
            "methods": "fitting:methods_command",
            "layers": "vectors:layers_command",
            "pca": "vectors:pca_command",
            "agree": "vectors:agree_command",
            "halves": "forecast:halves_command",
            "forecast": "forecast:forecast_command",
            "export": "vectors:export_command",
            "import": "vectors:import_command",
            "push": "vectors:push_command",
            "pull": "vectors:pull_command",
            "lens": "analysis:lens_command",
            "attribute": "analysis:attribute_command",
            "show": "vectors:show",
            "cosines": "vectors:cosines_command",
        },
    ),
    "judge": Group(
        "Have responses rated, and see how far judges agree.",
        {"sample": "judge:sample", "score": "judge:score", "compare": "judge:compare"},
    ),
    "monitor": Group(
        "Know how the model will behave before it answers, and read what it said.",
        {
            "study": "prompts:study_command",
            "baseline": "prompts:baseline_command",
            "prompt": "prompts:prompt_command",
            "transcript": "conversations:transcript_command",
            "chat": "conversations:chat_command",
            "drift": "drift:drift_command",
        },
    ),
    "traits": Group(
        "Find, read, check and write character traits.",
        {
            "import": "authoring:import_trait",
            "list": "traits:list_traits",
            "show": "traits:show",
            "path": "traits:path",
            "check": "traits:check",
            "new": "traits:new",
            "schema": "traits:schema",
        },
    ),
    "roles": Group(
        "Find, read, check and write roles, who a model can be told to be.",
        {
            "list": "roles:list_roles",
            "show": "roles:show",
            "path": "roles:path",
            "check": "roles:check",
            "new": "roles:new",
            "default": "roles:default",
            "schema": "roles:schema",
        },
    ),
    "backends": Group(
        "List the backends, and check that they give the same numbers.",
        {"list": "backends:list_backends", "check": "backends:check"},
    ),
    "remote": Group("See which models a server has.", {"status": "backends:status"}),
}


@contextmanager
def _printable_errors() -> Iterator[None]:
    """What was typed is shown harmlessly where it is quoted as wrong."""
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None)
        if hasattr(error, "format_message") and isinstance(message, str):  # typer's errors have no common public type
            error.message = printable(message)  # type: ignore[attr-defined]
        raise


def lazily(group: Group) -> type[TyperGroup]:
    """The class of a group whose commands are imported when they are used; until then their first lines stand for them.

    Args:
        group: The commands.
    """

    class Lazily(TyperGroup):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            for name, entry in group.commands.items():
                self.add_command(TyperCommand(name, help=summary(entry), rich_markup_mode="markdown"), name)

        def make_context(self, *given: Any, **options: Any) -> Any:
            with _printable_errors():
                return super().make_context(*given, **options)

        def invoke(self, *given: Any, **options: Any) -> Any:
            with _printable_errors():
                return super().invoke(*given, **options)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            if group.usual and args and args[0] not in group.commands:
                args = [group.usual, *args]
            if args and args[0] in group.commands:
                app = app_of(args[0], group.commands[args[0]])
                self.add_command(typer.main.get_command(app), args[0])
            elif args and group.example and not args[0].startswith("-"):
                listed = ", ".join(group.commands)
                ctx.fail(f"there is no command {args[0]!r} but {listed}; for example `{group.example}`")
            return super().resolve_command(ctx, args)

    return Lazily


def summary(entry: str | Group) -> str:
    """What a command does, in one line: the first paragraph of its function's docstring, read from the source."""
    if isinstance(entry, Group):
        return entry.help
    module, _, function = entry.partition(":")
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    found = re.search(rf'(?ms)^def {function}\(.*?^    """(.*?)(?:\n\n|""")', source)
    assert found is not None, entry
    return " ".join(found[1].split())


def app_of(name: str, entry: str | Group) -> typer.Typer:
    """A command, or a group of lazy ones, as an application of its own."""
    is_group = isinstance(entry, Group)
    app = typer.Typer(
        name=name, help=summary(entry), no_args_is_help=is_group, rich_markup_mode="markdown", add_completion=False
    )
    if isinstance(entry, Group):
        app.callback(cls=lazily(entry))(lambda: None)
    else:
        from persona_lens.cli.options.ray import ending_workers
        from persona_lens.cli.settings import command

        app.command(name)(command(ending_workers()(resolve_name(f"persona_lens.cli.{entry}"))))
    return app

"""``persona-lens steer``: what steering along vectors does, and how strongly to."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from persona_lens.cli.capability import capability_command
from persona_lens.cli.compare import compare_command
from persona_lens.cli.effects import effects_command
from persona_lens.cli.sweep import sweep_command
from persona_lens.cli.tune import tune_command


class _Commands(TyperGroup):
    """Says which command was meant where a model stands in its place."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            listed = ", ".join(self.commands)
            ctx.fail(
                f"there is no command {args[0]!r} but {listed}; for example `persona-lens steer sweep MODEL VECTORS`"
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="steer",
    help="Steer along vectors: sweep, tune, compare, and see what it costs.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    cls=_Commands,
)
app.command("sweep")(sweep_command)
app.command("tune")(tune_command)
app.command("compare")(compare_command)
app.command("capability")(capability_command)
app.command("effects")(effects_command)

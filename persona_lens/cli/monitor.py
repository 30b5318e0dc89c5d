"""``persona-lens monitor``: how a model will behave before it answers, and how it did."""

from __future__ import annotations

import typer

from persona_lens.cli.chat import chat_command
from persona_lens.cli.prompt import prompt_command
from persona_lens.cli.study import study_command
from persona_lens.cli.transcripts import transcript_command

app = typer.Typer(
    name="monitor",
    help="Know how the model will behave before it answers, and read what it said.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.command("study")(study_command)
app.command("prompt")(prompt_command)
app.command("transcript")(transcript_command)
app.command("chat")(chat_command)

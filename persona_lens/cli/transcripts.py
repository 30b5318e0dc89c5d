"""``persona-lens monitor transcript``: finished conversations, read token by token and turn by turn."""

from __future__ import annotations

import json
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import READINGS, console, say, say_json, show_rows
from persona_lens.cli.settings import Option, argument
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import write_text, writing
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.monitoring.scoring import ScoredTranscript

TRANSCRIPTS = argument("TRANSCRIPTS", "Conversations: OpenAI messages or ShareGPT as JSONL, or plain text.")


def transcript_command(
    subject: options.Subject,
    transcripts: Annotated[Path, TRANSCRIPTS],
    vectors: options.SeveralVectors,
    layers: options.PanelLayers = None,
    form: str | None = None,
    out: Annotated[Path | None, Option("Write every reading here, a conversation a line.", metavar="FILE")] = None,
    tokens: bool = False,
    html: Annotated[Path | None, Option(metavar="DIR")] = None,
    show: bool = False,
    limit: Annotated[int | None, Option(least=1)] = None,
    allow_other_model: options.AllowOtherModel = False,
) -> None:
    """Read traits off finished conversations.

    The value of a token is the projection of its residual on the trait's unit vector. Conversations that cannot be read
    are reported by line, and the rest is done.

    Example: `persona-lens monitor transcript smollm2-135m chats.jsonl runs/tuned-evil --html heatmaps`

    Args:
        form: `openai`, `sharegpt` or `plain`; None is what it looks like.
        tokens: With --out: every token's value too.
        html: Write a heat map of each conversation here.
        show: Show the heat maps in the terminal.
        limit: Conversations at most.
    """
    from persona_lens.data.transcripts import CALLS_TOOLS, open_transcripts
    from persona_lens.monitoring import Panel
    from persona_lens.monitoring.scoring import ScoredTranscript, score_transcripts

    if tokens and out is None:
        raise PersonaLensError("--tokens adds to what --out writes; name a file with --out")
    for path in (out, html):
        if path is not None and path.exists() and (path.is_file() or any(path.iterdir())):
            raise PersonaLensError(f"{path} is already there; name another, or remove it")
    file = open_transcripts(transcripts, form)
    say(f"{transcripts}: conversations in the form {file.form}", err=True)
    panel = Panel.of(*options.open_layers(vectors, layers))
    opened, chat = subject.open()
    good, bad, tools = 0, 0, 0
    if html is not None:
        html.mkdir(parents=True, exist_ok=True)
    with nullcontext() if out is None else writing(out) as stream:
        given = islice(file, limit)
        for found in score_transcripts(opened, given, panel, chat, allow_other_model=allow_other_model):
            if not isinstance(found, ScoredTranscript):
                bad += 1
                tools += CALLS_TOOLS in found.problem
                say(f"not read: {found.problem}", err=True)
                continue
            good += 1
            if stream is not None:
                stream.write((json.dumps(found.to_json(tokens=tokens), ensure_ascii=False) + "\n").encode())
            if html is not None:
                name = f"conversation-{found.transcript.line:06d}.html"
                write_text(html / name, found.heatmap(opened.tokenizer).html())
            _show(found, opened.tokenizer if show else None, subject.as_json)
    called = f" ({tools} call tools)" if tools else ""
    say(f"{counted(good, 'conversation')} read, {bad} not{called}", err=True)
    if not good:
        raise PersonaLensError(f"no conversation of {transcripts} could be read")


def _show(found: ScoredTranscript, tokenizer: Any, as_json: bool) -> None:
    if as_json:
        say_json(found.to_json())
        return
    title = f"Conversation {found.transcript.id}: projections of the assistant's turns"
    show_rows(title, found.turns, {"turn": lambda turn: turn.turn, **READINGS})
    if tokenizer is not None:
        console().print(found.heatmap(tokenizer))

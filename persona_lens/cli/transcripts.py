"""``persona-lens monitor transcript``: finished conversations, read token by token and turn by turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from persona_lens.cli import options
from persona_lens.cli.display import console, say, say_json
from persona_lens.cli.effects import SeveralVectors
from persona_lens.cli.grouping import grouped
from persona_lens.cli.sweep import AllowOtherModel
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import write_text, writing
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.data.transcripts import BadTranscript
    from persona_lens.monitoring.scoring import ScoredTranscript


@grouped
def transcript_command(
    model: options.Model,
    transcripts: Annotated[
        Path,
        typer.Argument(
            metavar="TRANSCRIPTS",
            help="Conversations: OpenAI messages or ShareGPT as JSONL, or plain text.",
            show_default=False,
        ),
    ],
    vectors: SeveralVectors,
    layers: Annotated[
        str | None, typer.Option("--layers", help="`18`, `12,18` or `all`.", show_default="where each was tuned")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--form", help="`openai`, `sharegpt` or `plain`.", show_default="what it looks like")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write every reading here, a conversation a line.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="With --out: every token's value too.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="DIR", help="Write a heat map of each conversation here.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show the heat maps in the terminal.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Conversations at most.")] = None,
    allow_other_model: AllowOtherModel = False,
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
) -> None:
    """Read traits off finished conversations.

    The value of a token is the projection of its residual on the trait's unit vector. Conversations that cannot be read
    are reported by line, and the rest is done.

    Example: `persona-lens monitor transcript smollm2-135m chats.jsonl runs/tuned-evil --html heatmaps`
    """
    from persona_lens.data.transcripts import CALLS_TOOLS, open_transcripts
    from persona_lens.monitoring import Panel
    from persona_lens.monitoring.scoring import ScoredTranscript, score_transcripts
    from persona_lens.vectors import load_vectors

    if tokens and out is None:
        raise PersonaLensError("--tokens adds to what --out writes; name a file with --out")
    for path in (out, html):
        if path is not None and path.exists() and (path.is_file() or any(path.iterdir())):
            raise PersonaLensError(f"{path} is already there; name another, or remove it")
    file = open_transcripts(transcripts, form)
    say(f"{transcripts}: conversations in the form {file.form}", err=True)
    loaded = [load_vectors(path) for path in vectors]
    chosen = options.layer_numbers(layers, loaded[0].model.n_layers) if layers else None
    panel = Panel.of(loaded, chosen)
    opened = opening.open(model)
    chat = opening.chat(opened)
    good, bad, tools = 0, 0, 0
    if html is not None:
        html.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stream = _opened(out, stack)
        given = _first(file, limit)
        for found in score_transcripts(opened, given, panel, chat, allow_other_model=allow_other_model):
            if not isinstance(found, ScoredTranscript):
                bad += 1
                tools += CALLS_TOOLS in found.problem
                _report(found)
                continue
            good += 1
            if stream is not None:
                stream.write((json.dumps(found.to_json(tokens=tokens), ensure_ascii=False) + "\n").encode())
            if html is not None:
                name = f"conversation-{found.transcript.line:06d}.html"
                write_text(html / name, found.heatmap(opened.tokenizer).html())
            _show(found, opened.tokenizer if show else None, as_json)
    called = f" ({tools} call tools)" if tools else ""
    say(f"{counted(good, 'conversation')} read, {bad} not{called}", err=True)
    if not good:
        raise PersonaLensError(f"no conversation of {transcripts} could be read")


def _opened(out: Path | None, stack: ExitStack) -> BinaryIO | None:
    return stack.enter_context(writing(out)) if out is not None else None


def _first(file: Any, limit: int | None) -> Iterator[Any]:
    for number, transcript in enumerate(file):
        if limit is not None and number >= limit:
            return
        yield transcript


def _report(bad: BadTranscript) -> None:
    say(f"not read: {bad.problem}", err=True)


def _show(found: ScoredTranscript, tokenizer: Any, as_json: bool) -> None:
    if as_json:
        say_json(found.to_json())
        return
    from persona_lens.cli.display import print_table

    print_table(
        f"Conversation {found.transcript.id}: projections of the assistant's turns",
        ("turn", "trait", "layer", "tokens", "before it", "mean", "highest"),
        [
            (
                str(turn.turn),
                turn.trait,
                str(turn.layer),
                str(turn.tokens),
                *(f"{value:+.2f}" for value in (turn.prompt_last, turn.mean, turn.highest)),
            )
            for turn in found.turns
        ],
    )
    if tokenizer is not None:
        console().print(found.heatmap(tokenizer))

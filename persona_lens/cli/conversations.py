"""``persona-lens monitor chat`` and ``transcript``: conversations whose traits are read, as they go or afterwards."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.chat import Chat, check_free
from persona_lens.cli.display import console, readings_columns, say, say_json, show_rows
from persona_lens.cli.options.steerings import SteeringOptions
from persona_lens.cli.runner import say_traffic
from persona_lens.cli.settings import Option, argument, choice
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import write_text, writing
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.monitoring import Alarm, Alert, Panel, TokenReading, Turn
    from persona_lens.monitoring.scoring import ScoredTranscript
    from persona_lens.steering import Steering
    from persona_lens.vectors import PersonaVectors


def chat_command(
    subject: Annotated[options.Subject, options.Here],
    traits: options.TraitsRead,
    written: SteeringOptions,
    alarms: Annotated[list[str] | None, Option(names=("--alarm",), metavar="SPEC")] = None,
    alarm_on: str = "token",
    stop: bool = False,
    history: str | None = None,
    system: options.System = None,
    show: bool = False,
    max_new_tokens: options.MaxNewTokens = 200,
    temperature: options.Temperature = 0.0,
    thinking_budget: options.ThinkingBudget = None,
    seed: options.Seed = 0,
    save: Annotated[Path | None, Option(metavar="FILE")] = None,
    load: Annotated[Path | None, Option(metavar="FILE")] = None,
) -> None:
    """Talk with a model, line by line, and see where its traits stand as it answers.

    Messages come from standard input, one a line, until it ends (Ctrl-D). With `--edits` the model answers steered, and
    values are those after the edits. `--json` writes a line for every turn. Lines that begin with a slash are commands:
    `/again` answers once more, `/edits` steers, `/help` lists all.

    Example: `persona-lens monitor chat smollm2-135m runs/baseline-optimistic-smollm2-135m --layer 18
    --alarm "optimistic>2sd"`

    Args:
        alarms: Say so when a trait goes too far: `evil>3` in residual-stream units, `evil@18<-2` at one layer,
            `evil>2sd` in standard deviations from the model's own neutral replies (`monitor baseline`). Repeatable.
        alarm_on: What alarms listen to: `prompt_last`, `token`, `running_mean` or `turn_mean`.
        stop: An alarm ends the reply.
        history: With --edits: how a reply finds the turns before it, `steered` as they were, or `clean`, as if they
            never had been. None is the usual one, which `/history` says.
        show: Show each reply's tokens coloured by their values.
        save: Keep the conversation and its branches in this file, after every reply.
        load: Go on with a conversation from a file that was kept, or of OpenAI messages.
    """
    from persona_lens.monitoring import Panel
    from persona_lens.serve.session import Session
    from persona_lens.serve.talk import Talk
    from persona_lens.steering.history import DEFAULT_HISTORY, History

    found = DEFAULT_HISTORY if history is None else choice(History, history, "--history")
    session = None if load is None else Session.load(load)
    check_free(save, load)
    loaded, chosen = traits.open()
    panel = Panel.of(loaded, chosen)
    listening = [_alarm(text, alarm_on, stop) for text in alarms or ()]
    opened, chat = subject.open()
    steering = _steering(written, loaded, opened, traits.allow_other_model)
    says = _Speaker(opened.tokenizer)
    talk = Talk(
        opened,
        panel,
        session=session,
        chat=chat,
        system=system,
        alarms=listening,
        on_token=None if subject.as_json else says,
        allow_other_model=traits.allow_other_model,
    )
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "thinking_budget": thinking_budget}
    known = {each.trait: each for each in loaded} | dict(steering.vectors if steering is not None else {})
    parse = partial(_parsed, known, opened, traits.allow_other_model)
    asking = Chat(talk, how, seed, steering, found, parse, save, load)
    first = talk.session.path[0] if talk.session.path else None
    _say_alarms(listening, panel, first.content if first is not None and first.role == "system" else None)
    for turn in chain([asking.answer()], map(asking.take, _messages())):
        if turn is not None and subject.as_json:
            readings = [reading.to_json() for reading in turn.readings]
            say_json({"turn": turn.number, "text": turn.text, "stopped": turn.stopped, "readings": readings})
        elif turn is not None:
            _show_turn(turn, says, coloured=show)
    say_traffic(opened)


def _show_turn(turn: Turn, says: _Speaker, *, coloured: bool) -> None:
    """End a reply that was written as it came, with its readings, and its tokens once more in colour."""
    says.end()
    ended = ", ended by an alarm" if turn.stopped else ""
    show_rows(f"Turn {turn.number}: projections{ended}", turn.readings, readings_columns(turn.readings))
    if coloured:
        says.show(turn)


def _messages() -> Iterator[str]:
    """Lines of standard input; empty ones are passed over."""
    asking = sys.stdin.isatty()
    while True:
        if asking:
            say("you> ", bold=True, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _alarm(text: str, kind: str, stop: bool) -> Alarm:
    from persona_lens.backend import StopGeneration
    from persona_lens.monitoring import Alarm, AlarmKind

    def tell(alert: Alert) -> None:
        where = "" if alert.token is None else f" at token {alert.token}"
        counted_in = "" if alert.sds is None else f" ({alert.sds:+.1f} SD)"
        sign = ">" if alert.alarm.above else "<"
        beyond = f"{alert.alarm.threshold:g}{'sd' if alert.alarm.in_sd else ''}"
        said = f"{alert.alarm.trait}@{alert.layer} {alert.value:+.2f}{counted_in} {sign} {beyond}{where}"
        say(f"\nALARM {said}", fg="red", err=True)
        if stop:
            raise StopGeneration

    return Alarm.parse(text, tell, choice(AlarmKind, kind, "--alarm-on"))


def _say_alarms(alarms: Sequence[Alarm], panel: Panel, system: str | None) -> None:
    """What alarms that count from a baseline come to, and where that was measured under another system prompt."""
    from persona_lens.monitoring.alarms import described

    for alarm in (each for each in alarms if each.in_sd):
        gauge = panel.gauges[panel.find(alarm.trait, alarm.layer)]
        say(f"alarm {described(alarm, gauge)}", err=True)
        stored = gauge.vectors.baseline
        if stored is not None and stored.system != system:
            options.say_notes([f"the baseline of {alarm.trait} was measured under another system prompt than this one"])


def _steering(
    written: SteeringOptions, loaded: Sequence[PersonaVectors], backend: Backend, allow_other_model: bool
) -> Steering | None:
    steerings = list(written.open(*loaded).values())
    if len(steerings) > 1:
        raise PersonaLensError("a chat is steered in one way; put the terms into one --edits, with commas between them")
    for steering in steerings if not allow_other_model else ():
        steering.check_model(backend)
    return steerings[0] if steerings else None


def _parsed(known: Mapping[str, PersonaVectors], backend: Backend, allow_other_model: bool, text: str) -> Steering:
    """A steering that is typed while the chat goes on: its notation, or a file."""
    from persona_lens.steering.given import read_steering

    steering = read_steering(text, known)
    if not allow_other_model:
        steering.check_model(backend)
    return steering


class _Speaker:
    """Writes the reply as it comes, whole characters at a time, and what the model thinks before it dimly."""

    def __init__(self, tokenizer: Any) -> None:
        from persona_lens.data.growing_text import GrowingText

        self._tokenizer, self._growing = tokenizer, GrowingText
        self._text = GrowingText(self._tokenizer)
        self._ids: list[int] = []
        self._last: list[int] = []

    def __call__(self, reading: TokenReading) -> None:
        self._ids.append(reading.id)
        thinking = reading.part is not None and reading.part.name == "THINKING"
        say(self._text.add(reading.id), nl=False, dim=thinking or None)

    def end(self) -> None:
        """The reply is over."""
        say(self._text.end())
        self._text = self._growing(self._tokenizer)
        self._ids, self._last = [], self._ids

    def show(self, turn: Turn) -> None:
        """The reply's heat map."""
        from persona_lens.data.pieces import token_pieces
        from persona_lens.monitoring import Strip, TokenHeatmap

        assert turn.token_values is not None
        if not self._last:
            return
        strips = [
            Strip(tuple(column.tolist()), reading.trait, reading.layer)
            for reading, column in zip(turn.readings, turn.token_values.T, strict=True)
        ]
        strips.sort(key=lambda strip: (strip.trait, strip.layer))
        pieces = token_pieces(self._tokenizer, self._last)
        console().print(TokenHeatmap(pieces, tuple(strips), parts=turn.parts))


TRANSCRIPTS = argument("TRANSCRIPTS", "Conversations: OpenAI messages or ShareGPT as JSONL, or plain text.")


def transcript_command(
    subject: options.Subject,
    transcripts: Annotated[Path, TRANSCRIPTS],
    traits: options.TraitsRead,
    form: str | None = None,
    out: Annotated[Path | None, Option("Write every reading here, a conversation a line.", metavar="FILE")] = None,
    tokens: bool = False,
    html: Annotated[Path | None, Option(metavar="DIR")] = None,
    show: bool = False,
    limit: Annotated[int | None, Option(least=1)] = None,
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
    _check_free(out, html)
    file = open_transcripts(transcripts, form)
    say(f"{transcripts}: conversations in the form {file.form}", err=True)
    panel = Panel.of(*traits.open())
    opened, chat = subject.open()
    good, bad, tools = 0, 0, 0
    if html is not None:
        html.mkdir(parents=True, exist_ok=True)
    with nullcontext() if out is None else writing(out) as stream:
        given = islice(file, limit)
        for found in score_transcripts(opened, given, panel, chat, allow_other_model=traits.allow_other_model):
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
            if subject.as_json:
                say_json(found.to_json())
            else:
                _show_readings(found, opened.tokenizer if show else None)
    called = f" ({tools} call tools)" if tools else ""
    say(f"{counted(good, 'conversation')} read, {bad} not{called}", err=True)
    if not good:
        raise PersonaLensError(f"no conversation of {transcripts} could be read")


def _check_free(*places: Path | None) -> None:
    """Refuse a file that is there, and a folder that holds anything."""
    for path in places:
        if path is not None and path.exists() and (path.is_file() or any(path.iterdir())):
            raise PersonaLensError(f"{path} is already there; name another, or remove it")


def _show_readings(found: ScoredTranscript, tokenizer: Any | None) -> None:
    """The readings of a conversation as a table, and with a tokenizer its heat map."""
    title = f"Conversation {found.transcript.id}: projections of the assistant's turns"
    show_rows(title, found.turns, {"turn": "turn", **readings_columns(found.turns)})
    if tokenizer is not None:
        console().print(found.heatmap(tokenizer))

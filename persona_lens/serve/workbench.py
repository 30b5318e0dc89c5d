"""`Workbench`: a model to talk with while its traits are read and moved; the server and notebooks are faces of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Backend, Edit, Sampling, StopGeneration, TokenScore
from persona_lens.backend.batches import context_length
from persona_lens.backend.continuous import ROWS, continuous
from persona_lens.backend.differences import Point
from persona_lens.backend.parts import Part
from persona_lens.backend.parts.asked import limited_for
from persona_lens.backend.tokens import TokenIds
from persona_lens.backend.verification import require, tolerance_of, verify
from persona_lens.core.errors import PersonaLensError
from persona_lens.data.growing_text import GrowingText, StopTexts
from persona_lens.models import ChatFormat, Message
from persona_lens.models.chat import chat_format
from persona_lens.monitoring import Alarm, AlarmKind, Alert, Gauge, MonitoringError, Panel, TokenReading
from persona_lens.monitoring.calibration import monitor_calibration
from persona_lens.monitoring.reply import TurnMeter, listening, watched_reply
from persona_lens.serve.said import Apart, Foretold, GaugeName, Sounded, decimals
from persona_lens.serve.shelf import Shelf
from persona_lens.steering.history import DEFAULT_HISTORY, History, conversation_edits


class TooLongError(PersonaLensError):
    """A prompt with what is to follow does not fit the model."""


@dataclass(frozen=True)
class Asked:
    """One reply that is asked for.

    Attributes:
        prompt: Token ids, see `Workbench.encode`.
        max_new_tokens: Length limit in tokens; None for as many as the model takes.
        temperature: 0 is greedy.
        top_p: Nucleus of the sampling.
        seed: Of the sampling.
        edits: A steering's notation, or the name of a preset; empty for none.
        watch: What is read, such as ``evil@20``; None for every trait where the shelf reads it.
        alarms: Such as ``evil>2sd``.
        alarm_on: What alarms listen to, see `AlarmKind`.
        stop_on_alarm: An alarm ends the reply.
        stop: Texts that the reply ends before.
        top: Tell how likely tokens were, with so many of the likeliest; None does not.
        messages: The conversation that the prompt was made of; empty for a text that is none.
        history: What the edits do to its finished turns.
        top_of_prompt: And of the prompt's tokens.
        thinking_budget: How many tokens the model may think before it has to answer; None does not limit it.
    """

    prompt: TokenIds
    max_new_tokens: int | None = 200
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    edits: str = ""
    watch: tuple[str, ...] | None = None
    alarms: tuple[str, ...] = ()
    alarm_on: str = AlarmKind.TOKEN
    stop_on_alarm: bool = False
    stop: tuple[str, ...] = ()
    top: int | None = None
    messages: tuple[Message, ...] = ()
    history: History = DEFAULT_HISTORY
    top_of_prompt: bool = False
    thinking_budget: int | None = None


@dataclass(frozen=True, eq=False)
class Begun:
    """The prompt has been read.

    Attributes:
        prompt_last: float32 [gauges], values at the last prompt token.
        forecast: What it foretells, where vectors carry a calibration.
    """

    prompt_last: Float[Tensor, " gauges"]
    forecast: tuple[Foretold, ...]


@dataclass(frozen=True, eq=False)
class Said:
    """A token of the reply.

    Attributes:
        id: The token.
        text: What it added to the reply's text: whole characters, and nothing that may be the beginning of a stop.
        values: float32 [gauges].
        score: How likely it was, where that was asked for.
        part: Of a token that is not of the answer, whether it is ``thinking``, or a ``mark`` that sets thinking apart;
            line feeds that follow a mark are of it.
        content: What it added to the answer's text.
    """

    id: int
    text: str
    values: Float[Tensor, " gauges"]
    score: TokenScore | None = None
    part: Apart | None = None
    content: str = ""


@dataclass(frozen=True, eq=False)
class Answer:
    """A whole reply.

    Attributes:
        ids: Its tokens.
        text: Its text, up to what stopped it.
        content: The same without the thinking before the answer, its marks, and the line feeds in front.
        reasoning: The thinking; None where the model never thought.
        rest: What of the text was not told with a token.
        rest_of: Whether that is thinking or a mark; None where it is of the answer.
        content_rest: What of the content was not told with a token.
        ended: ``stop`` (the model, or a text, ended it), ``length``, or ``alarm``.
        means: float32 [gauges], over its tokens, or those of the answer where the model thought before; NaN for none.
        alerts: Alarms that sounded.
        scores: How likely tokens were, where that was asked for, see `persona_lens.backend.Generation`.
    """

    ids: TokenIds
    text: str
    content: str
    reasoning: str | None
    rest: str
    ended: str
    means: Float[Tensor, " gauges"]
    alerts: tuple[Alert, ...]
    scores: tuple[TokenScore, ...] | None = None
    rest_of: Apart | None = None
    content_rest: str = ""


@dataclass(frozen=True, eq=False)
class Planned:
    """A reply that can be given: everything about it was looked at.

    Attributes:
        asked: What was asked.
        panel: What is read.
        edits: What is written.
        steering: The canonical notation of it; empty for none.
        sampling: How.
        history: What the edits do to finished turns; None where there are none, of either.
    """

    asked: Asked
    panel: Panel
    edits: tuple[Edit, ...]
    steering: str
    sampling: Sampling
    history: History | None = None


class Workbench:
    """A model, its vectors, and replies under any of them. Safe to use from several threads; they run together.

    Args:
        backend: The model.
        shelf: Its vectors, at least one.
        chat: Chat format; the model's own by default.
        rows: How many replies run together at most.
    """

    def __init__(self, backend: Backend, shelf: Shelf, chat: ChatFormat | None = None, rows: int = ROWS) -> None:
        self.backend = continuous(backend, rows)
        self.shelf = shelf
        self.chat = chat or chat_format(backend)
        self.rows = rows
        if not shelf.vectors:
            raise MonitoringError("there is nothing to watch; give at least one trait's vectors")

    @property
    def thinks(self) -> bool:
        """Whether replies may begin with thinking, and how much can be limited."""
        return self.chat.may_reason and bool(self.chat.parts.closing)

    def encode(self, messages: Sequence[Message]) -> TokenIds:
        """The prompt that asks for the next message of a conversation.

        Raises:
            ModelError: If they are no conversation, or the template refuses them.
        """
        return tuple(self.chat.encode_messages(messages))

    def plan(self, asked: Asked) -> Planned:
        """Look at everything about a reply before it runs.

        Raises:
            TooLongError: If it does not fit the model.
            PersonaLensError: If anything else about it cannot be.
        """
        room = self._room(asked)
        seeds = (asked.seed,) if asked.temperature else None
        limited_for(self.backend.tokenizer, asked.thinking_budget)  # raises for thinking that the model never does
        top_p = asked.top_p if seeds else 1.0
        sampling = Sampling(room, asked.temperature, top_p, seeds, thinking_budget=asked.thinking_budget)
        panel = Panel(tuple(self.shelf.gauges(asked.watch)))
        listening(panel, self._alarms(asked, []), self.backend)
        steering = self.shelf.steering(asked.edits)
        if steering is None:
            return Planned(asked, panel, (), "", sampling)
        edits = tuple(conversation_edits(steering, self.chat, asked.messages, asked.history))
        over = any(message["role"] == "assistant" for message in asked.messages)
        return Planned(asked, panel, edits, str(steering), sampling, asked.history if over else None)

    def answer(
        self,
        planned: Planned,
        on_begun: Callable[[Begun], None] = lambda begun: None,
        on_said: Callable[[Said], None] = lambda said: None,
    ) -> Answer:
        """Give a reply.

        Args:
            planned: What `plan` made.
            on_begun: Told once the prompt was read.
            on_said: Told of every token. Both may raise `StopGeneration`, which ends the reply.

        Raises:
            PersonaLensError: If the model cannot.
        """
        asked, panel = planned.asked, planned.panel
        alerts: list[Alert] = []
        meter = TurnMeter(panel, listening(panel, self._alarms(asked, alerts), self.backend), 0)
        growing, stops = GrowingText(self.backend.tokenizer), StopTexts(asked.stop)
        said = _SaidText(self.chat.parts.thinks)

        def on_token(reading: TokenReading) -> None:
            text, part, content = said.add(stops.add(growing.add(reading.id)), apart(reading.part))
            on_said(Said(reading.id, text, reading.values, reading.score, part, content))
            if stops.met:
                raise StopGeneration

        reply = watched_reply(
            self.backend,
            meter,
            asked.prompt,
            planned.sampling,
            planned.edits,
            on_prompt=lambda values: on_begun(Begun(values, foretold(panel.gauges, values))),
            on_token=on_token,
            top=asked.top,
            top_of_prompt=asked.top_of_prompt,
        )
        meter.finish()
        rest = stops.add(growing.end()) + stops.end()
        ended = "alarm" if reply.stopped else "stop" if reply.ended or stops.met else "length"
        means = meter.answer_means if meter.said else torch.full((len(panel.gauges),), torch.nan)
        _, rest_of, content_rest = said.add(rest, said.last)
        what = (said.text, said.content, said.reasoning, rest)
        return Answer(reply.ids, *what, ended, means, tuple(alerts), reply.scores, rest_of, content_rest)

    def verify(self) -> None:
        """Make sure that replies are steered: that edits act on the model, and that they reach it from a conversation.

        Raises:
            VerificationError: If they do not.
        """
        verify(self.backend)
        gauge = self.shelf.gauges()[0]
        name = f"{gauge.trait}@{gauge.layer}"
        steering = self.shelf.steering(f"{name}:+1")
        assert steering is not None
        (edit,) = steering.edits()
        direction = gauge.direction / gauge.direction.norm()
        expected = float(edit.coefficient) * float(edit.direction.float() @ direction)
        turns = (("user", "Hello."), ("assistant", "Hello!"), ("user", "How are you?"))
        messages = tuple({"role": role, "content": content} for role, content in turns)
        values: list[float] = []
        for edits in ("", f"{name}:+1"):
            asked = Asked(self.encode(messages), 1, edits=edits, watch=(name,), messages=messages)
            self.answer(self.plan(asked), lambda begun: values.append(float(begun.prompt_last[0])))
        moved, plain = values[1] - values[0], values[0]
        what = f"the reply to a conversation is steered along {name}"
        error, allowed = abs(moved - expected) / abs(expected), tolerance_of(self.backend).error
        require(self.backend, [Point(what, expected, moved, "residual units", error, allowed, f"{plain:.4g} without")])

    def _room(self, asked: Asked) -> int:
        limit = context_length(self.backend)
        left = None if limit is None else limit - len(asked.prompt)
        if left is not None and left < (asked.max_new_tokens or 1):
            room = "" if asked.max_new_tokens is None else f" and up to {asked.max_new_tokens} new ones"
            raise TooLongError(f"the prompt has {len(asked.prompt)} tokens{room}, and the model takes {limit}")
        return asked.max_new_tokens or left or DEFAULT_TOKENS

    @staticmethod
    def _alarms(asked: Asked, alerts: list[Alert]) -> list[Alarm]:
        def tell(alert: Alert) -> None:
            alerts.append(alert)
            if asked.stop_on_alarm:
                raise StopGeneration

        return [Alarm.parse(text, tell, asked.alarm_on) for text in asked.alarms]


class _SaidText:
    """What a reply has said, and which of it is content.

    Content does not begin with line feeds, which models write behind their thinking.

    Args:
        thinks: Whether the model may think; else content is the whole text.
    """

    def __init__(self, thinks: bool) -> None:
        self._begun = not thinks
        self._told: list[tuple[str, Apart | None]] = []
        self.content = ""

    @property
    def last(self) -> Apart | None:
        """What the last token was."""
        return self._told[-1][1] if self._told else None

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for text, _ in self._told)

    @property
    def reasoning(self) -> str | None:
        """The thinking; None where there was none."""
        found = [text for text, part in self._told if part == "thinking"]
        return "".join(found) if found else None

    def add(self, text: str, part: Apart | None) -> tuple[str, Apart | None, str]:
        """What comes next, and which of it is content: line feeds between a mark and the answer are of the mark."""
        content = text if part is None else ""
        if not self._begun:
            content = content.lstrip("\n")
            self._begun = bool(content)
            if text and part is None and not content and any(part for _, part in self._told):
                part = "mark"
        self._told.append((text, part))
        self.content += content
        return text, part, content


def apart(part: Part | None) -> Apart | None:
    """What a token is that is not of the answer."""
    return "thinking" if part is Part.THINKING else "mark" if part is Part.NEITHER else None


DEFAULT_TOKENS = 1024  # where neither the request nor the model says how many


def foretold(gauges: Sequence[Gauge], values: Float[Tensor, " gauges"]) -> tuple[Foretold, ...]:
    """What the last prompt token tells of the reply, by the calibrations that the gauges' vectors carry."""
    found = []
    for number, gauge in enumerate(gauges):
        stored = gauge.vectors.monitor
        if stored is None or gauge.layer not in stored.layers or stored.reduction != gauge.reduction:
            continue
        calibration = monitor_calibration(gauge.vectors, gauge.layer)
        found.append(Foretold(number, round(calibration.probability(float(values[number])), 5), calibration.caveat))
    return tuple(found)


def gauge_names(gauges: Sequence[Gauge]) -> list[GaugeName]:
    """What gauges are called, in their order."""
    return [GaugeName(str(gauge), gauge.trait, gauge.layer) for gauge in gauges]


def sounded(panel: Panel, alert: Alert) -> Sounded:
    """An alarm that sounded, as it is told and kept."""
    (value,) = decimals([alert.value])
    gauge = panel.find(alert.alarm.trait, alert.layer)
    return Sounded(str(alert.alarm), gauge, alert.alarm.trait, alert.layer, value, alert.sds, alert.token)


def drawn_seed() -> int:
    """A seed for those who name none."""
    return secrets.randbelow(2**31)

"""`Talk`: a conversation with a model that is read and steered, reply by reply, and kept as a `Session`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from persona_lens.backend import Backend
from persona_lens.data.pieces import whole_pieces
from persona_lens.models import ChatFormat
from persona_lens.monitoring import Alarm, Alert, ConversationMonitor, Panel, TokenReading, Turn
from persona_lens.serve.said import Apart, Made, Past, ReplyReadings, SessionError, SessionMessage, TokenSaid, decimals
from persona_lens.serve.session import Session
from persona_lens.serve.workbench import foretold, gauge_names, sounded
from persona_lens.steering import Steering
from persona_lens.steering.given import GivenVectors, given_steering
from persona_lens.steering.history import DEFAULT_HISTORY, History


class Talk:
    """A conversation with a model: what it says is read while it says it, and kept with what it was made with.

    Args:
        backend: The model.
        panel: What is read.
        session: The conversation so far, to be gone on with; a new one by default.
        chat: Chat format; the model's own by default.
        system: System prompt of a new conversation.
        alarms: Who is told when a value goes too far; what sounded is kept too.
        on_token: Told of every token as it comes.
        allow_other_model: Use vectors that belong to another model.

    Attributes:
        session: The conversation with its branches.
        panel: What is read.

    Raises:
        SessionError: If a system prompt is given for a conversation that has begun.
        VectorsError: If vectors belong to another model.
        MonitoringError: If an alarm listens to what is not monitored, or counts from a baseline that is not there.
    """

    def __init__(
        self,
        backend: Backend,
        panel: Panel,
        *,
        session: Session | None = None,
        chat: ChatFormat | None = None,
        system: str | None = None,
        alarms: Sequence[Alarm] = (),
        on_token: Callable[[TokenReading], None] | None = None,
        allow_other_model: bool = False,
    ) -> None:
        self.panel = panel
        self.session = Session() if session is None else session
        if system is not None:
            if len(self.session):
                raise SessionError("a system prompt begins a conversation, and this one has begun; leave it out")
            self.session.add("system", system)
        self.session.model = backend.info.model
        self._gauges = gauge_names(panel.gauges)
        self._backend, self._allow = backend, allow_other_model
        self._on_token = on_token
        self._alerts: list[Alert] = []
        self._ids: list[int] = []
        heard = [replace(alarm, callback=self._hearing(alarm.callback)) for alarm in alarms]
        self._monitor = ConversationMonitor(
            backend, panel, chat=chat, alarms=heard, on_token=self._take, allow_other_model=allow_other_model
        )

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens of the last reply."""
        return tuple(self._ids)

    @property
    def waits(self) -> bool:
        """Whether the conversation stands at a message of the user that nobody has answered."""
        path = self.session.path
        return bool(path) and path[-1].role == "user"

    def say(
        self,
        text: str,
        *,
        edits: Steering | str = "",
        vectors: GivenVectors = None,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        history: History | str = DEFAULT_HISTORY,
        thinking_budget: int | None = None,
    ) -> Turn:
        """Say something, and let the model answer; where an error ends the reply the session is as it was.

        Args:
            text: Message of the user.
            edits: A steering or its notation, which the reply is made under; empty for none.
            vectors: Those that a notation names; by default those that are read.
            max_new_tokens: Length limit in tokens.
            temperature: 0 is greedy.
            top_p: Nucleus of the sampling.
            seed: Of the sampling.
            history: What the edits do to earlier turns, see `persona_lens.steering.history.History`.
            thinking_budget: How many tokens the model may think before it has to answer; None does not limit it.

        Raises:
            PersonaLensError: If the edits cannot be written, or the conversation is too long for the model.
        """
        own = {gauge.trait: gauge.vectors for gauge in self.panel.gauges}
        steering = given_steering(edits, own if vectors is None else vectors) if edits else None
        if isinstance(steering, Steering) and not self._allow:
            steering.check_model(self._backend)
        self._monitor.stand(self.session.messages)
        over = steering is not None and any(each.role == "assistant" for each in self.session.path)
        self._ids, self._alerts = [], []
        turn = self._monitor.reply(
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            edits=steering.edits() if isinstance(steering, Steering) else (),
            history=history,
            thinking_budget=thinking_budget,
        )
        past: Past | None = None if not over else "clean" if History(history) is History.CLEAN else "steered"
        sampled = float(temperature), float(top_p), max_new_tokens, seed
        made = Made(str(steering or ""), *sampled, past, thinking_budget)
        same = [each for each in self.session.children(self.session.current) if each.role == "user"]
        asked = next((each for each in same if each.content == text), None) or self.session.add("user", text)
        self.session.go(asked.id)
        self.session.add("assistant", turn.text, made=made, readings=self._readings(turn), gauges=self._gauges)
        return turn

    def again(self, **how: Any) -> Turn:
        """The last message of the user answered once more, as another branch; or answered, where nobody has.

        Args:
            how: As `say` takes it: other edits, another seed.

        Raises:
            SessionError: If the user has said nothing yet.
            PersonaLensError: As `say`.
        """
        here = self.session.current
        asked = self.session.back()
        if asked is None:
            raise SessionError("nothing has been said that could be answered again")
        try:
            return self.say(asked.content, **how)
        except BaseException:
            self.session.go(here)
            raise

    def back(self) -> SessionMessage | None:
        """See `Session.back`."""
        return self.session.back()

    def _take(self, reading: TokenReading) -> None:
        self._ids.append(reading.id)
        if self._on_token is not None:
            self._on_token(reading)

    def _hearing(self, tell: Callable[[Alert], None]) -> Callable[[Alert], None]:
        def heard(alert: Alert) -> None:
            self._alerts.append(alert)
            tell(alert)

        return heard

    def _readings(self, turn: Turn) -> ReplyReadings:
        assert turn.token_values is not None  # the monitor keeps them unless it is told not to
        texts = [""] * len(self._ids)
        for piece in whole_pieces(self._backend.tokenizer, self._ids):
            texts[piece.stop - 1] = "" if piece.special else piece.text
        before = [each.prompt_last for each in turn.readings]
        parts: list[Apart | None] = ["thinking" if part == "thinking" else None for part in turn.parts]
        tokens = zip(texts, turn.token_values.tolist(), self._ids, parts or [None] * len(texts), strict=True)
        return ReplyReadings(
            decimals(before),
            decimals(each.answered for each in turn.readings),
            tuple(TokenSaid(text, decimals(values), token, part) for text, values, token, part in tokens),
            tuple(sounded(self.panel, alert) for alert in self._alerts),
            foretold(self.panel.gauges, torch.tensor(before)),
        )

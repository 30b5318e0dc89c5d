"""A reply that is read while it is generated: `watched_reply`, and the `TurnMeter` that gathers it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import (
    Backend,
    Edit,
    Sampling,
    StopGeneration,
    TokenScore,
    Watch,
    WatchedTokens,
    watched_generation,
)
from persona_lens.backend.parts import Part, Parts
from persona_lens.backend.tokens import TokenIds
from persona_lens.core.text import shown
from persona_lens.monitoring.alarms import Alarm, AlarmKind, Alert, Scale
from persona_lens.monitoring.gauges import Gauge, MonitoringError, Panel
from persona_lens.vectors import VectorsError

Listening: TypeAlias = tuple[int, Alarm, Scale]
"""The number of a gauge, an alarm on it, and what that counts in."""


@dataclass(frozen=True, eq=False)
class TokenReading:
    """One token of a reply, as it is generated.

    Attributes:
        turn: Number of the assistant's turn, from 0.
        index: Number of the token within the reply, from 0.
        id: Token id.
        values: float32 [gauges], in residual-stream units.
        means: float32 [gauges], over the reply so far.
        score: How likely it was, where that is asked for.
        part: Whether it is thinking or answer.
    """

    turn: int
    index: int
    id: int
    values: Float[Tensor, " gauges"]
    means: Float[Tensor, " gauges"]
    score: TokenScore | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Reply:
    """What the model said.

    Attributes:
        ids: Its tokens.
        ended: Whether it ended the turn itself.
        stopped: Whether an alarm ended it.
        scores: How likely tokens were, where that is asked for, see `persona_lens.backend.Generation`.
    """

    ids: TokenIds
    ended: bool
    stopped: bool
    scores: tuple[TokenScore, ...] | None = None


def listening(
    panel: Panel, alarms: Sequence[Alarm], backend: Backend, *, allow_other_model: bool = False
) -> list[Listening]:
    """Alarms at the gauges that they are for.

    Raises:
        MonitoringError: If one listens to what is not monitored, or counts from a baseline that is not there.
    """
    if stranger := next((each for each in alarms if not isinstance(each, Alarm)), None):
        raise MonitoringError(f"alarms are such as Alarm.parse('evil>2sd', print) makes; got {shown(stranger)}")
    found = [(panel.find(alarm.trait, alarm.layer), alarm) for alarm in alarms]
    for gauge, alarm in found if allow_other_model else ():
        _check_baseline(alarm, panel.gauges[gauge], backend)
    return [(gauge, alarm, Scale.of(alarm, panel.gauges[gauge])) for gauge, alarm in found]


def _check_baseline(alarm: Alarm, gauge: Gauge, backend: Backend) -> None:
    """Raise if an alarm counts from the replies of another model, which stand elsewhere."""
    try:
        if alarm.in_sd:
            gauge.vectors.check_model(backend, allowable=False)
    except VectorsError as error:
        raise MonitoringError(
            f"{alarm} counts from replies of the model that the vectors belong to, and {backend.info.model} is "
            "another one; give a threshold in residual-stream units"
        ) from error


class TurnMeter:
    """Gathers one turn token by token, and sounds alarms.

    An alarm whose baseline is of a part of replies (see `persona_lens.monitoring.alarms.Scale`) hears that part alone.

    Args:
        panel: What is read.
        alarms: Who listens, see `listening`.
        turn: Number of the assistant's turn, from 0.

    Attributes:
        said: The values of each token so far.
        before: Those of the last prompt token.
    """

    def __init__(self, panel: Panel, alarms: Sequence[Listening], turn: int) -> None:
        self._alarms = alarms
        self.panel, self.turn = panel, turn
        self._beyond: set[int] = set()
        self.said: list[Tensor] = []
        self._sums: dict[Part | None, Tensor] = {
            part: torch.zeros(len(panel.gauges), dtype=torch.float64) for part in (None, *Part)
        }
        self._counts: Counter[Part | None] = Counter()
        self.before = torch.full((len(panel.gauges),), torch.nan)

    @property
    def tells_parts(self) -> bool:
        """Whether an alarm has to know what is thinking and what is answer."""
        return any(scale.part is not None for _, _, scale in self._alarms)

    @property
    def means(self) -> Float[Tensor, " gauges"]:
        """Mean of each gauge over the tokens so far."""
        return self._mean(None)

    @property
    def answer_means(self) -> Float[Tensor, " gauges"]:
        """The same over those of the answer, where any was said to be thinking; NaN without any."""
        return self._mean(Part.ANSWER if self._counts[Part.THINKING] else None)

    def _mean(self, part: Part | None) -> Float[Tensor, " gauges"]:
        return (self._sums[part] / self._counts[part]).float()

    def prompt(self, values: Float[Tensor, " gauges"]) -> bool:
        """Take the last prompt token; returns whether an alarm wants the reply stopped."""
        self.before = values.clone()
        return self._sound(AlarmKind.PROMPT_LAST)

    def token(self, values: Float[Tensor, " gauges"], part: Part | None = None) -> bool:
        """Take the next token of the reply; returns whether an alarm wants the reply stopped.

        Args:
            values: Of each gauge.
            part: Whether it is thinking or answer, where that is told.
        """
        index = len(self.said)
        self.said.append(values.clone())
        for each in {None, part}:
            self._sums[each] += values
            self._counts[each] += 1
        stop = self._sound(AlarmKind.TOKEN, index, part)
        return self._sound(AlarmKind.RUNNING_MEAN, index, part) or stop

    def finish(self) -> None:
        """The reply is whole. There is nothing left to stop."""
        self._sound(AlarmKind.TURN_MEAN)

    def _values(self, kind: AlarmKind, scale: Scale, part: Part | None) -> Float[Tensor, " gauges"] | None:
        """What an alarm of a kind hears when a token of a part has come, or none; None for nothing."""
        if kind is AlarmKind.PROMPT_LAST:
            return self.before
        if scale.part not in (None, part) and kind is not AlarmKind.TURN_MEAN:
            return None
        if kind is AlarmKind.TOKEN:
            return self.said[-1]
        return self._mean(scale.part) if self._counts[scale.part] else None

    def _sound(self, kind: AlarmKind, token: int | None = None, part: Part | None = None) -> bool:
        """Let every alarm of a kind sound, also those after one that wants to stop."""
        stop = False
        for number, (gauge, alarm, scale) in enumerate(self._alarms):
            if alarm.kind != kind or (values := self._values(kind, scale, part)) is None:
                continue
            value = float(values[gauge])
            stands = scale.count(value, max(1, self._counts[scale.part]))
            if not alarm.is_beyond(stands):
                self._beyond.discard(number)
            elif number not in self._beyond:
                self._beyond.add(number)
                try:
                    counted = stands if alarm.in_sd else None
                    alarm.callback(Alert(alarm, self.panel.gauges[gauge].layer, value, self.turn, token, counted))
                except StopGeneration:
                    stop = True
        return stop


def watched_reply(
    backend: Backend,
    meter: TurnMeter,
    prompt: Sequence[int],
    sampling: Sampling,
    edits: Sequence[Edit] = (),
    *,
    on_prompt: Callable[[Float[Tensor, " gauges"]], None] | None = None,
    on_token: Callable[[TokenReading], None] | None = None,
    top: int | None = None,
    top_of_prompt: bool = False,
) -> Reply:
    """Let the model answer one prompt, and read while it does.

    Args:
        backend: The model.
        meter: Who gathers it.
        prompt: Token ids.
        sampling: How, of one row.
        edits: Applied throughout; values are those after them.
        on_prompt: Told of the values of the last prompt token, before anything is said.
        on_token: Told of every token as it comes. Both may raise `StopGeneration`.
        top: As `Watch` takes it, and the next.
        top_of_prompt: Of this one prompt.

    Raises:
        WatchError: If the backend cannot be watched.
    """
    panel, stopped = meter.panel, False

    def on_tokens(tokens: WatchedTokens) -> None:
        nonlocal stopped
        values, part = panel.values(tokens.projections[0])[-1], None if tokens.parts is None else tokens.parts[0]
        stopped = meter.token(values, part) if tokens.step else meter.prompt(values)
        if tokens.step and on_token is not None:
            score = None if tokens.scores is None else tokens.scores[0]
            token = int(tokens.ids[0, -1])
            on_token(TokenReading(meter.turn, len(meter.said) - 1, token, values, meter.means, score, part))
        elif on_prompt is not None and not tokens.step:
            on_prompt(values)
        if stopped:
            raise StopGeneration

    parts = Parts.of(backend.tokenizer) if meter.tells_parts or on_token is not None else None
    watch = Watch(panel.directions, on_tokens, panel.layers, top, top_of_prompt, parts)
    found = watched_generation(backend, [prompt], sampling, watch, edits)
    scores = None if found.scores is None else found.scores[0]
    return Reply(found.responses[0], found.ended[0], stopped, scores)

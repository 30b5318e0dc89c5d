"""`Gauge`: a trait read at a layer; and the `Alarm` that sounds when its value goes too far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import isfinite

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Read, StopGeneration
from persona_lens.core.documents import Record
from persona_lens.core.statistics import percentile_interval, resampled_rows
from persona_lens.monitoring.calibration import MonitorCalibration, Observations, Share
from persona_lens.monitoring.curves import MonitoringError
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors


@dataclass(frozen=True)
class Threshold(Record):
    """An alarm is raised by projections of at least ``value``.

    Attributes:
        false_alarm_rate: The rate asked for: of the responses that do not show the trait, the share whose prompts raise
            an alarm.
        value: In residual-stream units.
        low: Lower end of its percentile bootstrap interval over questions; None if there are too few responses for one.
            A percentile is no smooth statistic, so that the jackknife does not serve it: of simulated studies this held
            the truth in 80% to 88% at 5 questions, 87% to 91% at 8 to 12, 92% to 95% at 20.
        high: Upper end.
        probability: The curve's, there.
        false_alarms: The rate on questions that a threshold found in the same way has not seen; None if there is no
            such response.
        detected: Of the responses that show the trait, the share whose prompts raise an alarm, likewise.
    """

    false_alarm_rate: float
    value: float
    low: float | None
    high: float | None
    probability: float
    false_alarms: Share | None
    detected: Share | None


def threshold_for(calibration: MonitorCalibration, false_alarm_rate: float, *, seed: int = 0) -> Threshold:
    """The lowest threshold whose false alarms are no more than a stated rate.

    Args:
        calibration: As a study stored it.
        false_alarm_rate: Above 0 and below 1. Below one over the number of responses that do not show the trait, the
            threshold is above all of them.
        seed: Of the bootstrap.

    Raises:
        MonitoringError: If the rate is none.
    """
    if not 0 < false_alarm_rate < 1:
        raise MonitoringError(f"a false-alarm rate is above 0 and below 1, such as 0.05; got {false_alarm_rate:g}")
    observations = calibration.observations
    value = _threshold(observations, false_alarm_rate)
    assert value is not None  # a calibration has responses of both kinds
    several = len(np.unique(observations.questions)) > 1
    resampled = [
        math.nan if (found := _threshold(observations.rows(rows), false_alarm_rate)) is None else found
        for rows in resampled_rows(observations.questions.tolist(), seed)
    ]
    interval = percentile_interval(np.array(resampled)) if several else None
    low, high = interval or (None, None)
    false_alarms, detected = _held_out(observations, false_alarm_rate)
    return Threshold(false_alarm_rate, value, low, high, calibration.probability(value), false_alarms, detected)


def _threshold(observations: Observations, rate: float) -> float | None:
    """The smallest projection seen from which on the share of false alarms is at most the rate."""
    places, where = np.unique(observations.projections, return_inverse=True)
    harmless = np.bincount(where, weights=observations.responses - observations.shown)
    total = harmless.sum()
    if total == 0:
        return None
    at_least = harmless[::-1].cumsum()[::-1]
    allowed = at_least <= rate * total + 1e-9  # 29% of 100 are 29
    return float(places[allowed][0]) if allowed.any() else math.nextafter(float(places[-1]), math.inf)


def _held_out(observations: Observations, rate: float) -> tuple[Share | None, Share | None]:
    """False alarms and detections of thresholds on questions that they were not made from."""
    counts = np.zeros((2, 2), dtype=np.int64)  # shown or not; raised, all
    for held_out, others in observations.folds():
        value = _threshold(others, rate)
        if value is None:
            continue
        tested = observations.rows(held_out)
        raised = tested.projections >= value
        for kind, found in enumerate((tested.responses - tested.shown, tested.shown)):
            counts[kind] += int(found[raised].sum()), int(found.sum())
    false_alarms, detected = (Share.of(int(k), int(n)) if n else None for k, n in counts)
    return false_alarms, detected


@dataclass(frozen=True)
class Gauge:
    """A trait, read at one layer: the projection on its direction, in residual-stream units.

    Attributes:
        vectors: The trait's vectors.
        layer: Block index, 0-based.
        reduction: Which of the vectors.

    Raises:
        VectorsError: If there is no such layer or reduction.
    """

    vectors: PersonaVectors
    layer: int
    reduction: str = DEFAULT_REDUCTION

    def __post_init__(self) -> None:
        if not bool(self.direction.any()):
            raise MonitoringError(f"the vector of {self.trait!r} at layer {self.layer} is zero: nothing points there")

    @staticmethod
    def of(vectors: PersonaVectors, layer: int | None = None, reduction: str | None = None) -> Gauge:
        """A gauge at a layer; left out, at the layer, and of the reduction, that were tuned for the vectors.

        Raises:
            VectorsError: If there is no such layer or reduction, or nothing was tuned.
        """
        if layer is None:
            tuned = vectors.tuned_choice()
            return Gauge(vectors, tuned.layer, reduction or tuned.reduction)
        return Gauge(vectors, layer, reduction or DEFAULT_REDUCTION)

    @property
    def trait(self) -> str:
        """The trait's name."""
        return self.vectors.trait

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """What is projected on, float32, not normalised."""
        return self.vectors.vector(self.layer, self.reduction)

    def __str__(self) -> str:
        return f"{self.trait}@{self.layer}"


@dataclass(frozen=True)
class Panel:
    """Gauges that are read together, in one pass.

    Attributes:
        gauges: At least one; no trait twice at one layer.

    Raises:
        MonitoringError: If there is none, or one twice.
    """

    gauges: tuple[Gauge, ...]

    def __post_init__(self) -> None:
        if not self.gauges:
            raise MonitoringError("there is nothing to monitor; give at least one trait's vectors")
        names = [str(gauge) for gauge in self.gauges]
        if twice := [name for name in names if names.count(name) > 1]:
            raise MonitoringError(f"{twice[0]} is monitored twice; name each trait once a layer")

    @staticmethod
    def of(vectors: PersonaVectors | Iterable[PersonaVectors], layers: int | Sequence[int] | None = None) -> Panel:
        """Every trait at every one of the layers; without layers, each where it was tuned.

        Raises:
            VectorsError: If a layer does not exist, or nothing was tuned.
        """
        each = (vectors,) if isinstance(vectors, PersonaVectors) else tuple(vectors)
        chosen: Sequence[int | None] = (layers,) if layers is None or isinstance(layers, int) else layers
        return Panel(tuple(Gauge.of(one, layer) for one in each for layer in chosen))

    def find(self, trait: str, layer: int | None = None) -> int:
        """Number of a gauge; the layer may be left out where the trait is read at one only.

        Raises:
            MonitoringError: If there is none, or several.
        """
        found = [n for n, g in enumerate(self.gauges) if g.trait == trait and layer in (None, g.layer)]
        if len(found) != 1:
            asked = trait if layer is None else f"{trait}@{layer}"
            why = "is read at several layers; name one" if found else "is not monitored"
            raise MonitoringError(f"{asked} {why}: there are {', '.join(map(str, self.gauges))}")
        return found[0]

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read, ascending."""
        return tuple(sorted({gauge.layer for gauge in self.gauges}))

    @cached_property
    def directions(self) -> Float[Tensor, "layers k d_model"]:
        """The directions at each of `layers`; where a layer has fewer than another, its last one stands again."""
        at = [[gauge.direction for gauge in self.gauges if gauge.layer == layer] for layer in self.layers]
        most = max(map(len, at))
        return torch.stack([torch.stack(rows + [rows[-1]] * (most - len(rows))) for rows in at])

    @property
    def read(self) -> Read:
        """What brings the values of a finished text."""
        return Read.projections(self.directions, self.layers)

    def values(self, projections: Float[Tensor, "layers tokens k"]) -> Float[Tensor, "tokens gauges"]:
        """One row's projections, gauge by gauge."""
        rows, slots = self._places
        return projections[rows, :, slots].T

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        rows = [self.layers.index(gauge.layer) for gauge in self.gauges]
        slots = [rows[:number].count(row) for number, row in enumerate(rows)]
        return torch.tensor(rows), torch.tensor(slots)


class AlarmKind(StrEnum):
    """What an alarm listens to."""

    PROMPT_LAST = "prompt_last"  # the last prompt token, before anything is said
    TOKEN = "token"  # each token of the reply
    RUNNING_MEAN = "running_mean"  # mean over the reply so far
    TURN_MEAN = "turn_mean"  # mean over the whole reply, once it is there


@dataclass(frozen=True)
class Alarm:
    """Calls back when a trait's value goes beyond a threshold, and again only after it was back.

    Attributes:
        trait: Name of the trait.
        threshold: In residual-stream units.
        callback: Given an `Alert`. While a reply is generated it may raise `persona_lens.backend.StopGeneration`, which
            ends the reply after the token; it must not ask the model anything.
        layer: Where the trait is read; may be left out if that is one layer only.
        kind: A value of `AlarmKind`.
        above: Whether values above the threshold are beyond it, or below.

    Raises:
        MonitoringError: If the kind does not exist, or the threshold is not finite.
    """

    trait: str
    threshold: float
    callback: Callable[[Alert], None]
    layer: int | None = None
    kind: AlarmKind | str = AlarmKind.TOKEN
    above: bool = True

    def __post_init__(self) -> None:
        if self.kind not in tuple(AlarmKind):
            raise MonitoringError(f"an alarm listens to {', '.join(AlarmKind)}; got {self.kind!r}")
        if not isfinite(self.threshold):
            raise MonitoringError(f"the threshold of an alarm must be finite, got {self.threshold}")

    def is_beyond(self, value: float) -> bool:
        """Whether the value is on the wrong side of the threshold."""
        return value > self.threshold if self.above else value < self.threshold


@dataclass(frozen=True)
class Alert:
    """What an alarm tells.

    Attributes:
        alarm: The alarm.
        layer: Where the trait was read.
        value: What went beyond the threshold.
        turn: Number of the assistant's turn, from 0.
        token: Index of the token within the reply; None at the last prompt token, and once the turn is over.
    """

    alarm: Alarm
    layer: int
    value: float
    turn: int
    token: int | None


@dataclass(frozen=True, eq=False)
class TokenReading:
    """One token of a reply, as it is generated.

    Attributes:
        turn: Number of the assistant's turn, from 0.
        index: Number of the token within the reply, from 0.
        id: Token id.
        values: float32 [gauges], in residual-stream units.
        means: float32 [gauges], over the reply so far.
    """

    turn: int
    index: int
    id: int
    values: Float[Tensor, " gauges"]
    means: Float[Tensor, " gauges"]


class TurnMeter:
    """Adds up one turn token by token, and sounds alarms.

    Args:
        panel: What is read.
        alarms: Who listens.
        turn: Number of the turn.
        keep_tokens: Whether to keep the values of every token.
    """

    def __init__(self, panel: Panel, alarms: Sequence[Alarm], turn: int, keep_tokens: bool) -> None:
        self._alarms = [(panel.find(alarm.trait, alarm.layer), alarm) for alarm in alarms]
        self._gauges, self._turn = panel.gauges, turn
        self._beyond: set[int] = set()
        self._kept: list[Tensor] | None = [] if keep_tokens else None
        self._sum = torch.zeros(len(panel.gauges), dtype=torch.float64)
        self.tokens = 0
        self.prompt_last = torch.full((len(panel.gauges),), torch.nan)
        self.highest = torch.full((len(panel.gauges),), torch.nan)

    @property
    def means(self) -> Float[Tensor, " gauges"]:
        """Mean of each gauge over the tokens so far; NaN before the first."""
        return (self._sum / self.tokens if self.tokens else self._sum * torch.nan).float()

    @property
    def values(self) -> Float[Tensor, "tokens gauges"] | None:
        """The values of every token, if they are kept."""
        if self._kept is None:
            return None
        return torch.stack(self._kept) if self._kept else torch.empty(0, len(self._gauges))

    def prompt(self, values: Float[Tensor, " gauges"]) -> bool:
        """Take the last prompt token; returns whether an alarm wants the reply stopped."""
        self.prompt_last = values.clone()
        return self._sound(AlarmKind.PROMPT_LAST, values, None)

    def token(self, values: Float[Tensor, " gauges"]) -> bool:
        """Take the next token of the reply; returns whether an alarm wants the reply stopped."""
        index, self.tokens = self.tokens, self.tokens + 1
        self._sum += values
        self.highest = torch.fmax(self.highest, values)
        if self._kept is not None:
            self._kept.append(values.clone())
        stop = self._sound(AlarmKind.TOKEN, values, index)
        return self._sound(AlarmKind.RUNNING_MEAN, self.means, index) or stop

    def finish(self) -> None:
        """The reply is whole. There is nothing left to stop."""
        if self.tokens:
            self._sound(AlarmKind.TURN_MEAN, self.means, None)

    def _sound(self, kind: AlarmKind, values: Float[Tensor, " gauges"], token: int | None) -> bool:
        """Let every alarm of a kind sound, also those after one that wants to stop."""
        stop = False
        for number, (gauge, alarm) in enumerate(self._alarms):
            if alarm.kind != kind:
                continue
            value = float(values[gauge])
            if not alarm.is_beyond(value):
                self._beyond.discard(number)
            elif number not in self._beyond:
                self._beyond.add(number)
                try:
                    alarm.callback(Alert(alarm, self._gauges[gauge].layer, value, self._turn, token))
                except StopGeneration:
                    stop = True
        return stop

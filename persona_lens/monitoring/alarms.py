"""`Alarm`: told when a trait goes too far; and the `Scale` that it counts in, which may be the model's own replies'.

A fixed threshold says little: ordinary replies of one model stand at +10 on one trait and at -3 on another. So an alarm
may count standard deviations from where replies stand that nobody steered, to questions that ask for nothing special.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite, sqrt
from statistics import fmean, stdev

from persona_lens.backend import Part
from persona_lens.core.statistics import few
from persona_lens.core.text import in_short
from persona_lens.monitoring.gauges import PART_OF, Gauge, MonitoringError
from persona_lens.vectors.provenance import StoredBaseline

FORMS = (
    "evil>3 (in residual-stream units), evil@20>3 (at one of several layers), evil<-2, or evil>2sd (standard "
    "deviations from the model's own neutral replies, which `persona-lens monitor baseline` measures)"
)
_FORM = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)(?:@(\d{1,15}))?\s*([<>])\s*([-+]?[0-9.]+(?:e[-+]?\d+)?)\s*(sd)?", re.I)


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
        threshold: In residual-stream units, or in standard deviations of the baseline.
        callback: Given an `Alert`. While a reply is generated it may raise `persona_lens.backend.StopGeneration`, which
            ends the reply after the token; it must not ask the model anything.
        layer: Where the trait is read; may be left out if that is one layer only.
        kind: A value of `AlarmKind`.
        above: Whether values above the threshold are beyond it, or below.
        in_sd: Whether the threshold counts standard deviations from the mean of the model's own neutral replies, which
            the vectors then carry (`measure_baseline`): see `Scale`.

    Raises:
        MonitoringError: If the kind does not exist, or the threshold is not finite.
    """

    trait: str
    threshold: float
    callback: Callable[[Alert], None]
    layer: int | None = None
    kind: AlarmKind | str = AlarmKind.TOKEN
    above: bool = True
    in_sd: bool = False

    def __post_init__(self) -> None:
        if self.kind not in tuple(AlarmKind):
            raise MonitoringError(f"an alarm listens to {', '.join(AlarmKind)}; got {self.kind!r}")
        if not isfinite(self.threshold):
            raise MonitoringError(f"the threshold of an alarm must be finite, got {self.threshold}")

    @staticmethod
    def parse(text: str, callback: Callable[[Alert], None], kind: AlarmKind | str = AlarmKind.TOKEN) -> Alarm:
        """An alarm as it is written in one line.

        >>> str(Alarm.parse("evil@18>2sd", print))
        'evil@18>2sd'

        Raises:
            MonitoringError: If it is written in no such way, naming those that there are.
        """
        found = _FORM.fullmatch(text.strip().replace("\N{MINUS SIGN}", "-"))  # as pages write numbers
        try:
            trait, layer, sign, threshold, unit = found.groups() if found else ("",) * 5
            value = float(threshold)
        except ValueError:
            raise MonitoringError(f"an alarm is written {FORMS}; got {in_short(text)!r}") from None
        return Alarm(trait, value, callback, int(layer) if layer else None, kind, sign == ">", bool(unit))

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"@{self.layer}"
        return f"{self.trait}{layer}{'>' if self.above else '<'}{self.threshold:g}{'sd' if self.in_sd else ''}"

    def is_beyond(self, value: float) -> bool:
        """Whether a value, in the unit of the threshold, is on the wrong side of it."""
        return value > self.threshold if self.above else value < self.threshold


@dataclass(frozen=True)
class Alert:
    """What an alarm tells.

    Attributes:
        alarm: The alarm.
        layer: Where the trait was read.
        value: What went beyond the threshold, in residual-stream units.
        turn: Number of the assistant's turn, from 0.
        token: Index of the token within the reply; None at the last prompt token, and once the turn is over.
        sds: Standard deviations from the baseline's mean; None where the alarm does not count in them.
    """

    alarm: Alarm
    layer: int
    value: float
    turn: int
    token: int | None
    sds: float | None = None


@dataclass(frozen=True)
class Scale:
    """What an alarm's threshold counts: from where, and in what.

    A single token strays further than the mean of a reply. So an alarm on tokens counts the standard deviation of
    tokens, one on the last prompt token that of such tokens, and one on a mean over k tokens what such a mean strays
    by: the standard deviation s of tokens at the first, that of replies' means r in a long reply, and
    sqrt(r² + (s² - r²) / k) between, as if tokens strayed independently around their reply's mean.

    Attributes:
        mean: Where it counts from.
        first: Unit at the first token.
        last: Unit in a long reply.
        part: What of a reply the alarm listens to: what its baseline is of, since thinking stands elsewhere than an
            answer. None for all of it.
    """

    mean: float = 0.0
    first: float = 1.0
    last: float = 1.0
    part: Part | None = None

    @staticmethod
    def of(alarm: Alarm, gauge: Gauge) -> Scale:
        """The scale of an alarm where its trait is read.

        Raises:
            MonitoringError: If it counts from a baseline and the vectors carry none for this place, or a flat one.
            VectorsError: If theirs is damaged.
        """
        if not alarm.in_sd:
            return Scale()
        stored = baseline_of(gauge, str(alarm))
        found, part = stored.layers[gauge.layer], PART_OF.get(stored.mean)
        if alarm.kind == AlarmKind.TOKEN:
            scale = Scale(found.mean, found.sd, found.sd, part)
        elif alarm.kind == AlarmKind.PROMPT_LAST:
            scale = Scale(fmean(found.prompts), stdev(found.prompts), stdev(found.prompts), part)
        else:
            scale = Scale(fmean(found.means), found.sd, stdev(found.means), part)
        if not scale.last:
            raise MonitoringError(
                f"{alarm} counts standard deviations, and on {gauge} the baseline has none: all values are the same; "
                "give a threshold in residual-stream units"
            )
        return scale

    def unit(self, tokens: int) -> float:
        """What is counted in, once there are so many tokens, at least one."""
        return sqrt(max(self.last**2, self.last**2 + (self.first**2 - self.last**2) / tokens))

    def count(self, value: float, tokens: int) -> float:
        """How many units a value is from the mean."""
        return (value - self.mean) / self.unit(tokens)


def baseline_of(gauge: Gauge, asker: str) -> StoredBaseline:
    """The baseline that a gauge's vectors carry, with its layer among the layers.

    Args:
        gauge: Where the trait is read.
        asker: What needs it, for the message.

    Raises:
        MonitoringError: If there is none, saying how to make it.
        VectorsError: If it is damaged.
    """
    stored = gauge.vectors.baseline
    if stored is None or stored.reduction != gauge.reduction or gauge.layer not in stored.layers:
        there = "" if stored is None else f" for {gauge.reduction} at layer {gauge.layer}"
        raise MonitoringError(
            f"{asker} counts from the model's own neutral replies, and the vectors of {gauge.trait!r} carry no such "
            f"baseline{there}; measure it once with `persona-lens monitor baseline MODEL VECTORS`, and use the "
            "vectors.safetensors in its folder"
        )
    return stored


_OF: dict[Part | None, str] = {
    None: "neutral answers",
    Part.ANSWER: "neutral answers, without the thinking before them",
    Part.THINKING: "the thinking before neutral answers",
}


def described(alarm: Alarm, gauge: Gauge) -> str:
    """What an alarm that counts from a baseline comes to, and how often neutral replies raise it."""
    scale, stored, sign = Scale.of(alarm, gauge), baseline_of(gauge, str(alarm)), 1 if alarm.above else -1
    found, of = stored.layers[gauge.layer], _OF[scale.part]
    extremes = found.highest if alarm.above else found.lowest
    values, what = {
        AlarmKind.TOKEN: (extremes, "have such a token"),
        AlarmKind.PROMPT_LAST: (found.prompts, "come after such a prompt"),
    }.get(AlarmKind(alarm.kind), (found.means, "have such a mean"))
    limit = scale.mean + alarm.threshold * scale.last
    raised = sum(sign * value > sign * limit for value in values)
    said = few(len(values), "neutral answer")
    return (
        f"{alarm}: {'above' if alarm.above else 'below'} {limit:+.2f} on {gauge} ({of}: mean "
        f"{scale.mean:+.2f}, SD {scale.last:.2f}); {raised} of {len(values)} of them {what}"
        + (f"; it rests on {said}" if said else "")
    )

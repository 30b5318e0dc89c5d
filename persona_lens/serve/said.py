"""`SessionMessage`: a message of a session, what a reply was made with, and what was read of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal, cast, get_args

from persona_lens.core.documents import Record, plain
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted, shown

Role = Literal["system", "user", "assistant"]
Past = Literal["steered", "clean"]
"""The values of `persona_lens.steering.history.History`."""


class SessionError(PersonaLensError):
    """A session that cannot be read, or a message that it does not have."""


@dataclass(frozen=True)
class GaugeName(Record):
    """What a gauge is called: a trait at a layer.

    Attributes:
        name: Such as ``evil@20``.
        trait: The trait.
        layer: Block index, 0-based.
    """

    name: str
    trait: str
    layer: int


@dataclass(frozen=True)
class Made(Record):
    """What a reply was made with.

    Attributes:
        edits: In the notation; empty where the model was left as it is.
        temperature: 0 is greedy.
        top_p: Nucleus of the sampling.
        max_tokens: Length limit in tokens; None where it is not known.
        seed: Of the sampling; None where it is not known.
        history: How a steered reply found the turns before it, ``steered`` or ``clean``, see
            `persona_lens.steering.history.History`; None in a first turn, and where it is not known.
        thinking_budget: How many tokens it could think; None where that was not limited.
    """

    unsaid = frozenset({"thinking_budget"})

    edits: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    history: Past | None = None
    thinking_budget: int | None = None

    def __str__(self) -> str:
        sampled = f"temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"
        steered = f"{self.edits or 'not steered'}{f', {self.history} history' if self.history else ''}"
        limit = "" if self.thinking_budget is None else f", thinking up to {counted(self.thinking_budget, 'token')}"
        return f"{steered}; {sampled if self.temperature else 'greedy'}{limit}"


Values = tuple[float | None, ...]
Apart = Literal["thinking", "mark"]
"""What a token of a reply is that is not of the answer."""


@dataclass(frozen=True)
class TokenSaid(Record):
    """A token of a reply.

    Attributes:
        text: What it added to the reply; empty where a character was not whole yet.
        values: One for each gauge, in residual-stream units; None where there is none.
        id: Token id, where it is known.
        part: Of a token that is not of the answer, whether it is ``thinking``, or a ``mark`` that sets thinking apart.
    """

    unsaid = frozenset({"part"})

    text: str
    values: Values
    id: int | None = None
    part: Apart | None = None


@dataclass(frozen=True)
class Sounded(Record):
    """An alarm that sounded.

    Attributes:
        alarm: As it was given, such as ``evil>2sd``.
        gauge: Number of the gauge.
        trait: The trait.
        layer: Block index, 0-based.
        value: What the gauge showed.
        sds: The same in standard deviations; None where it does not count in them.
        token: Number of the token; None where the alarm is not about one.
    """

    alarm: str
    gauge: int
    trait: str
    layer: int
    value: float | None
    sds: float | None = None
    token: int | None = None


@dataclass(frozen=True)
class Foretold(Record):
    """What the last prompt token tells of the reply.

    Attributes:
        gauge: Number of the gauge.
        probability: That the reply shows the trait.
        says: What is to be known of it, in words, if anything.
    """

    gauge: int
    probability: float
    says: str | None = None


@dataclass(frozen=True)
class ReplyReadings(Record):
    """What was read while a reply came; all lists are in the order of the session's gauges.

    Attributes:
        prompt_last: Values at the last prompt token.
        means: Over the reply, or over the answer where there was thinking before it.
        tokens: The reply's tokens, where they were kept.
        alarms: Those that sounded.
        forecast: By gauge, where the vectors can tell.
    """

    prompt_last: Values = ()
    means: Values = ()
    tokens: tuple[TokenSaid, ...] = ()
    alarms: tuple[Sounded, ...] = ()
    forecast: tuple[Foretold, ...] = ()

    def checked(self, gauges: int) -> ReplyReadings:
        """The readings, if they are of so many gauges.

        Raises:
            SessionError: If they are not.
        """
        for values in (self.prompt_last, self.means, *(token.values for token in self.tokens)):
            if values and len(values) != gauges:
                raise SessionError(f"readings have {len(values)} values for {counted(gauges, 'gauge')}")
        numbers = [alarm.gauge for alarm in self.alarms] + [each.gauge for each in self.forecast]
        if any(not 0 <= number < gauges for number in numbers):
            raise SessionError(f"an alarm or a forecast is of a gauge beyond the {counted(gauges, 'gauge')}")
        return self

    def placed(self, places: Sequence[int], gauges: int) -> ReplyReadings:
        """The same among more gauges; ``places`` says where each of the own ones stands there."""

        def spread(values: Values) -> Values:
            found: list[float | None] = [None] * gauges if values else []
            for place, value in zip(places, values, strict=bool(values)):
                found[place] = value
            return tuple(found)

        return replace(
            self,
            prompt_last=spread(self.prompt_last),
            means=spread(self.means),
            tokens=tuple(replace(token, values=spread(token.values)) for token in self.tokens),
            alarms=tuple(replace(each, gauge=places[each.gauge]) for each in self.alarms),
            forecast=tuple(replace(each, gauge=places[each.gauge]) for each in self.forecast),
        )


@dataclass(frozen=True)
class SessionMessage(Record):
    """A message of the tree.

    Attributes:
        id: Unique in the session.
        parent: The message it answers; None of a first one.
        role: Who said it.
        content: What was said.
        made: What a reply was made with, where that is known.
        readings: What was read of it, where anything was.
    """

    id: str
    parent: str | None
    role: Role
    content: str
    made: Made | None = None
    readings: ReplyReadings | None = None

    def to_json(self) -> dict[str, Any]:
        """See `Record.to_json`; what is not there is left out."""
        found = {"id": self.id, "parent": self.parent, "role": self.role, "content": self.content}
        more = {"made": plain(self.made), "readings": plain(self.readings)}
        for token in (more["readings"] or {}).get("tokens", ()):
            if token["id"] is None:
                del token["id"]
        return found | {name: value for name, value in more.items() if value is not None}


def decimals(values: Iterable[float]) -> Values:
    """As files and answers have numbers: in five decimals, and nothing for what is no number."""
    return tuple(round(value, 5) if isfinite(value) else None for value in values)


def role_of(given: str) -> Role:
    """A role, if it is one; raises SessionError if not."""
    if given not in get_args(Role):
        raise SessionError(f"a message is of system, user or assistant, not of {shown(given)}")
    return cast(Role, given)

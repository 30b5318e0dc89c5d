"""Where an edit applies: `Positions` and `Span` by kind of token, `Condition` by projection, `Schedule` by time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.core.errors import PersonaLensError

FURTHEST = 2**31


class PositionsError(PersonaLensError):
    """Positions that name no tokens, or tokens that cannot be known."""


class Positions(StrEnum):
    """Tokens of a row by kind; padding is never among them."""

    ALL = "all"
    PROMPT = "prompt"
    RESPONSE = "response"
    GENERATING = "generating"  # the last prompt token and the response: every position that predicts a response token


@dataclass(frozen=True)
class Span:
    """A part of the tokens of a kind, written ``response[5:]``.

    Attributes:
        kind: Tokens that are counted, from 0 in each row.
        start: First token; negative numbers count from the end of a prompt.
        stop: One past the last token; None for all that follow, however long the response becomes.

    Raises:
        PositionsError: If no token is in it, or it counts from the end of what is still being generated.
    """

    kind: Positions
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if any(abs(bound or 0) >= FURTHEST for bound in (self.start, self.stop)):
            raise PositionsError(f"no text has {FURTHEST:,} tokens to count")
        if self.kind is not Positions.PROMPT and (self.start < 0 or (self.stop or 0) < 0):
            raise PositionsError(
                f"{self} counts from the end, which only a prompt has before it is generated; use prompt[-3:], or "
                "count from the beginning"
            )
        same_end = self.stop is not None and (self.start < 0) == (self.stop < 0)
        if same_end and self.stop is not None and self.start >= self.stop:
            raise PositionsError(f"{self} holds no token: it must end after it begins")

    def __str__(self) -> str:
        return f"{self.kind}[{self.start}:{'' if self.stop is None else self.stop}]"


class ConditionError(PersonaLensError):
    """A condition that can never be decided."""


@dataclass(frozen=True, eq=False)
class Condition:
    """True at a token whose projection on a direction is above (or below) a threshold.

    It is decided token by token, on the residual stream after the edits of its layer; at the edit's own layer, on the
    residual as that edit finds it.

    Attributes:
        layer: Where the projection is taken, 0-based; at or before the layer of the edit.
        direction: float [d_model]; its length does not matter.
        threshold: In residual-stream units.
        above: Whether the projection has to be above the threshold, or below.

    Raises:
        ConditionError: If the direction is no direction, or the threshold is not finite.
    """

    layer: int
    direction: Float[Tensor, " d_model"]
    threshold: float
    above: bool = True

    def __post_init__(self) -> None:
        if self.direction.ndim != 1 or not bool(torch.isfinite(self.direction).all() & self.direction.any()):
            raise ConditionError("the direction of a condition must be float [d_model], finite and not zero everywhere")
        if not isfinite(self.threshold):
            raise ConditionError(f"the threshold of a condition must be finite, got {self.threshold}")
        object.__setattr__(self, "direction", self.direction.detach().clone())

    def plain(self) -> dict[str, Any]:
        """The condition as a dictionary that needs no class of this package; its direction is of length one."""
        wide = self.direction.float()
        return {
            "layer": self.layer,
            "direction": wide / wide.norm(),
            "threshold": float(self.threshold),
            "above": self.above,
        }


class ScheduleError(PersonaLensError):
    """A schedule that does not say how strong an edit is at some token."""


@dataclass(frozen=True)
class Schedule:
    """A factor on an edit's coefficient, as a function of the token's index; data, so that it can travel and be kept.

    Between the points the factor is interpolated linearly; before the first and after the last it stays as it is there.
    The index counts, from 0 in each row, the tokens of the kind that the edit's positions name: for ``response`` and
    ``response[5:]`` the tokens of the response, for ``generating`` the last prompt token is number 0.

    Attributes:
        points: Pairs of a token index and a factor, in ascending order; at least two.

    Raises:
        ScheduleError: If there are fewer points, or they are out of order, negative in their index or not finite.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        places = [place for place, _ in self.points]
        if len(places) < 2:
            raise ScheduleError("a schedule needs at least two points, such as 0:1 20:0; one is only a coefficient")
        if places[-1] >= FURTHEST:
            raise ScheduleError(f"no text has {FURTHEST:,} tokens to count")
        if places != sorted(set(places)) or places[0] < 0:
            raise ScheduleError(f"the token indices of a schedule must ascend from 0 or more, got {places}")
        if not all(isfinite(factor) for _, factor in self.points):
            raise ScheduleError("the factors of a schedule must be finite")

    @staticmethod
    def of(factor: Callable[[int], float], tokens: int) -> Schedule:
        """The schedule of a function, which is asked for the first ``tokens`` tokens; the last value stays."""
        return Schedule(tuple((index, float(factor(index))) for index in range(tokens)))

    def __str__(self) -> str:
        return " ".join(f"{place}:{factor:g}" for place, factor in self.points)

"""`Schedule`: how the strength of an edit goes on from token to token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

from persona_lens.backend.positions import FURTHEST
from persona_lens.errors import PersonaLensError


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

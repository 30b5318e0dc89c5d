"""What ways to steer come to, turn by turn, and held against one another conversation by conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from persona_lens.analysis.persistence.ways import COMPARED, Aim, Way
from persona_lens.core.statistics import CHANGES, SCORES, SHARE_CHANGES, SHARES, Ends
from persona_lens.extraction.experiment import Answer, averaged, estimated, json_of
from persona_lens.steering.arms import beside_null, minus

MEASURES: Mapping[str, Ends | None] = {
    "score": SCORES,
    "nll": None,
    "coherence": SCORES,
    "capability": SHARES,
    "projection": None,
}
"""What is measured of a reply, with the ends of its scale."""
DIFFERENCES: Mapping[str, Ends | None] = {
    "score": CHANGES,
    "nll": None,
    "coherence": CHANGES,
    "capability": SHARE_CHANGES,
}
"""What ways are held against one another by."""


@dataclass(frozen=True)
class TurnRow(Answer):
    """One reply; ``question`` is the number of its conversation's user, ``nll`` is given what was said before it.

    Attributes:
        trait: The trait scored.
        way: How the conversation was steered.
        turn: Counted from 1.
        user: Name of who talks.
        domain: What about.
        projection: Of the mean response token, or of a model that thinks the mean token of its answer, on the trait's
            unit vector, as the model was steered, in residual-stream units; None for an empty reply.
        capability: Probability of a token of the right answers to known questions after this turn, a geometric mean;
            None where none is asked.
    """

    trait: str
    way: str
    turn: int
    user: str
    domain: str
    projection: float | None
    capability: float | None


def by_conversation(rows: Iterable[TurnRow], measure: str, turns: Sequence[int]) -> dict[int, float]:
    """The mean of a measure over some turns, for each conversation that has any."""
    return averaged((row.question, getattr(row, measure)) for row in rows if row.turn in turns)


@dataclass(frozen=True)
class Outcome:
    """What came of steering towards one trait.

    Attributes:
        aim: The trait.
        rows: Every reply that its judge scored, those of unsteered conversations included.
        turns: How many turns there were.
        last: How many of the last count as the end.
    """

    aim: Aim
    rows: Sequence[TurnRow]
    turns: int
    last: int

    @property
    def ways(self) -> list[Way]:
        """In which ways conversations were held."""
        there = {row.way for row in self.rows}
        return [way for way in Way if way in there]

    @property
    def end(self) -> range:
        """The turns that count as the end."""
        return range(self.turns - self.last + 1, self.turns + 1)

    @property
    def whole(self) -> range:
        """All turns."""
        return range(1, self.turns + 1)

    def values(self, way: Way, measure: str, turns: Sequence[int]) -> dict[int, float]:
        """See `by_conversation`."""
        return by_conversation((row for row in self.rows if row.way == way), measure, turns)

    def curve(self, way: Way) -> list[dict[str, Any]]:
        """Turn by turn every measure, with its interval over conversations; None for one without values."""
        return [
            {
                "turn": turn,
                **{name: json_of(estimated(self.values(way, name, [turn]), ends)) for name, ends in MEASURES.items()},
            }
            for turn in self.whole
        ]

    def to_json(self, way: Way) -> dict[str, Any]:
        """What a way comes to: its curve, its end, how far that is from its first turn, and its effect on the score."""
        at_end = {name: self.values(way, name, self.end) for name in MEASURES}
        first = {name: self.values(way, name, [1]) for name in DIFFERENCES}
        plain, random = (self.values(other, "score", self.end) for other in (Way.NONE, Way.RANDOM))
        moved, null = minus(at_end["score"], plain), minus(random, plain)
        return {
            "turns": self.curve(way),
            "end": {name: json_of(estimated(at_end[name], ends)) for name, ends in MEASURES.items()},
            "drift": {
                name: json_of(estimated(minus(at_end[name], first[name]), ends)) for name, ends in DIFFERENCES.items()
            },
            "change": None if way is Way.NONE else json_of(beside_null(moved, null, CHANGES)),
        }

    def differences(self, one: Way, other: Way, measure: str, turns: Sequence[int]) -> dict[int, float]:
        """One way minus another, conversation by conversation."""
        return minus(self.values(one, measure, turns), self.values(other, measure, turns))


def pairs_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every two ways: the one minus the other, at the ``end`` and over the ``whole``.

    Over several traits a conversation's difference is the mean of its differences; scores count towards where a trait
    was steered, so that more is always better.
    """
    first = outcomes[0]
    compared = [way for way in first.ways if way in COMPARED]
    return [
        {
            "one": str(one),
            "other": str(other),
            **{
                part: {
                    name: json_of(estimated(_together(outcomes, one, other, name, turns), ends))
                    for name, ends in DIFFERENCES.items()
                }
                for part, turns in (("end", first.end), ("whole", first.whole))
            },
        }
        for one, other in combinations(compared, 2)
    ]


def _together(
    outcomes: Sequence[Outcome], one: Way, other: Way, measure: str, turns: Sequence[int]
) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for each in outcomes:
        sign = each.aim.towards if measure == "score" else 1
        for number, value in each.differences(one, other, measure, turns).items():
            found.setdefault(number, []).append(sign * value)
    return {number: fmean(values) for number, values in sorted(found.items()) if len(values) == len(outcomes)}

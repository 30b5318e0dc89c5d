"""`Claim`: what the paper says, where it is read from, what stands beside it, and the rule by which it is shown.

Rules compare intervals, never numbers alone, and were written before anything was measured. Of a claim that one thing
is more than another the difference counts: taken question by question where both answered the same ones, else what is
left between the two intervals. Where what stands beside ours is what chance gives, and no estimate of anything, ours is
compared with that as in a test: its interval with the middle of chance, and itself with the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from persona_lens.core.documents import Record
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import in_short

Verdict = Literal["shown", "not shown", "refuted", "missing"]


class MissingError(PersonaLensError):
    """Figures that there are none of; the message says what they would need."""


@dataclass(frozen=True)
class Number(Record):
    """A number with its 95% interval.

    Attributes:
        mean: The number.
        low: Lower end; None without an interval.
        high: Upper end; None likewise.
        n: What it rests on; None where that is not told.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @staticmethod
    def of(found: Mapping[str, Any] | None, what: str = "it") -> Number:
        """What a result says of a number: its ``mean`` or ``value``, ``low``, ``high`` and ``n``.

        Raises:
            MissingError: If there is none.
        """
        value = None if found is None else found.get("mean", found.get("value"))
        if found is None or value is None or not isfinite(value):
            raise MissingError(f"{what} could not be measured: too few responses, or too little variation in them")
        return Number(float(value), found.get("low"), found.get("high"), found.get("n"))

    @staticmethod
    def exactly(value: float) -> Number:
        """A number that is known."""
        return Number(value, value, value)

    @property
    def ends(self) -> tuple[float, float] | None:
        """The ends of the interval; None without one, or where one unit makes it."""
        if self.low is None or self.high is None or self.n == 1:
            return None
        return self.low, self.high

    def mapped(self, factor: float, offset: float = 0.0) -> Number:
        """It times a factor and plus an offset, with its interval."""
        if self.low is None or self.high is None:
            return Number(factor * self.mean + offset, n=self.n)
        low, high = sorted((factor * self.low + offset, factor * self.high + offset))
        return Number(factor * self.mean + offset, low, high, self.n)

    def __sub__(self, other: Number) -> Number:
        """What is left between two intervals, each end against the other's far one."""
        if self.ends is None or other.ends is None:
            return Number(self.mean - other.mean)
        (low, high), (below, above) = self.ends, other.ends
        return Number(self.mean - other.mean, low - above, high - below)


@dataclass(frozen=True)
class Finding:
    """What was measured of a claim.

    Attributes:
        value: Ours.
        null: What stands beside it.
        apart: The one minus the other, question by question; None where they are of different ones.
        note: What else there is to know, such as the layer.
    """

    value: Number
    null: Number
    apart: Number | None = None
    note: str = ""


@dataclass(frozen=True)
class Rule:
    """By which a finding shows a claim.

    Attributes:
        side: 1 where ours is claimed to be more than what stands beside it, -1 where less.
        margin: The difference has to be more than this, on the side that is claimed; below 0 it may be a little on the
            other.
        own: Whether ours itself has to lie on that side of 0 too.
        paired: Whether only a difference question by question will do.
        chance: Whether what stands beside ours is the middle 95% of what chance gives. Two intervals taken from each
            other would count that spread as if it were doubt about a number, and show hardly anything of six datasets.
        unit: Of the margin.
    """

    side: Literal[1, -1]
    margin: float = 0.0
    own: bool = False
    paired: bool = False
    chance: bool = False
    unit: str = ""

    def verdict(self, finding: Finding) -> Verdict:
        """What the finding says of the claim."""
        apart = self.apart(finding)
        if self.chance:
            return self._beyond_chance(apart, finding)
        compared = [
            (None if self.paired and finding.apart is None else apart, self.margin),
            *([(finding.value, 0.0)] if self.own else []),
        ]
        sides = [self._side(number, margin) for number, margin in compared]
        return "refuted" if -1 in sides else "shown" if all(side == 1 for side in sides) else "not shown"

    def apart(self, finding: Finding) -> Number:
        """How far ours and what stands beside it are apart."""
        if self.chance:
            return finding.value.mapped(1, -finding.null.mean)
        return finding.apart or finding.value - finding.null

    def _beyond_chance(self, apart: Number, finding: Finding) -> Verdict:
        side, ends, mean = self._side(apart, 0.0), finding.null.ends, finding.value.mean
        if not side or ends is None:
            return "not shown"
        beyond = mean > ends[1] if side * self.side == 1 else mean < ends[0]
        return ("shown" if side == 1 else "refuted") if beyond else "not shown"

    def _side(self, number: Number | None, margin: float) -> int:
        """1 if the whole interval is beyond the margin on the side that is claimed, -1 if it is before it, else 0."""
        if number is None or number.ends is None:
            return 0
        low, high = sorted(self.side * end for end in number.ends)
        return 1 if low > margin else -1 if high < margin else 0

    @property
    def words(self) -> str:
        """The rule in a sentence."""
        more, less = ("above", "below") if self.side == 1 else ("below", "above")
        limit = f"{self.side * self.margin:+g}{self.unit}" if self.margin else "0"
        if self.chance:
            return (
                f"Shown if the whole interval of ours lies {more} the middle of what chance gives, and ours itself "
                f"{more} the middle 95% of it; refuted if both lie {less} it."
            )
        if self.own:
            return (
                f"Shown if ours, and its difference from what stands beside it, lie {more} 0 as a whole; refuted if "
                f"either lies {less} 0."
            )
        what = "the difference, question by question," if self.paired else "the difference between both intervals"
        return f"Shown if {what} lies {more} {limit} as a whole; refuted if it lies {less} it."


@dataclass(frozen=True)
class Claim:
    """One statement of the paper.

    Attributes:
        name: Unique.
        table: Of the report.
        says: It, in a few words.
        paper: The paper's number; by trait where it gives one for each.
        beside: What stands beside ours.
        steps: The steps that it is read from.
        read: Reads it, of a trait.
        rule: How it is judged.
        digits: Of the numbers.
        each: Whether there is one for each trait.
    """

    name: str
    table: str
    says: str
    paper: str | Mapping[str, str]
    beside: str
    steps: tuple[str, ...]
    read: Callable[[Found, str], Finding]
    rule: Rule
    digits: int = 1
    each: bool = True

    def number_of(self, trait: str | None) -> str:
        """The paper's number, of this trait where it has one."""
        if isinstance(self.paper, str):
            return self.paper
        return self.paper.get(trait or "") or ", ".join(f"{name} {number}" for name, number in self.paper.items())


@dataclass(frozen=True)
class Found:
    """The figures of the steps.

    Attributes:
        traits: The plan's.
        look: Of a step for a trait, or once; raises `MissingError`.
    """

    traits: Sequence[str]
    look: Callable[[str, str | None], Any]

    def __call__(self, step: str, trait: str | None = None) -> Any:
        """The figures of a step.

        Raises:
            MissingError: If there are none.
        """
        return self.look(step, trait)

    def layer(self, trait: str) -> int:
        """The layer that was tuned for a trait."""
        return int(self("tune", trait)["chosen"]["layer"])


def outcome_of(claim: Claim, found: Found, trait: str | None) -> dict[str, Any]:
    """A row of the report, as JSON values."""
    row: dict[str, Any] = {
        "table": claim.table,
        "claim": claim.name,
        "trait": trait,
        "says": claim.says,
        "paper": claim.number_of(trait),
        "beside": claim.beside,
        "rule": claim.rule.words,
        "digits": claim.digits,
    }
    nothing = {"verdict": "missing", "value": None, "null": None, "apart": None, "note": ""}
    try:
        finding = claim.read(found, trait or "")
    except MissingError as error:
        return {**row, **nothing, "note": str(error)}
    except Exception as error:  # noqa: BLE001 - a plan of one's own may leave other figures than the claim reads
        return {**row, **nothing, "note": f"the steps have no such figure ({in_short(repr(error))})"}
    apart = claim.rule.apart(finding)
    measured = {"value": finding.value.to_json(), "null": finding.null.to_json(), "apart": apart.to_json()}
    return {**row, "verdict": claim.rule.verdict(finding), **measured, "note": finding.note}

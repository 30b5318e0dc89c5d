"""Figures of a run that has several parts, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.ratios import Ratio


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        name: What was measured.
        value: The median, where it was measured several times.
        unit: Of the value; empty for a ratio, a share or an error.
        low: The smallest.
        high: The largest.
        runs: How often it was measured; of a ratio, how many pairs.
        limit: What it may be at most; None where nothing is asked of it.
        detail: What it is made of.
    """

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    runs: int = 1
    limit: float | None = None
    detail: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is within its limit; no number is not."""
        return self.limit is None or self.value <= self.limit

    @staticmethod
    def of_ratio(ratio: Ratio, pairs: int, limit: float | None) -> Figure:
        """A comparison in turn."""
        took = f"{ratio.seconds:.3g} s and {ratio.baseline_seconds:.3g} s"
        return Figure(ratio.name, ratio.ratio, "", ratio.low, ratio.high, pairs, limit, took)

    @staticmethod
    def of_runs(name: str, values: Sequence[float], unit: str, detail: str = "") -> Figure:
        """The same thing measured several times."""
        return Figure(name, median(values), unit, min(values), max(values), len(values), detail=detail)

    def __str__(self) -> str:
        verdict = "    " if self.limit is None else "ok  " if self.holds else "FAIL"
        spread = "" if self.low is None or self.high is None else f"{_short(self.low)} to {_short(self.high)}"
        asked = "" if self.limit is None else f"at most {_short(self.limit)}"
        runs = f"{self.runs} runs" if self.runs > 1 else ""
        more = "; ".join(filter(None, (asked, spread, runs, self.detail)))
        return (
            f"{verdict} {_short(self.value)}{f' {self.unit}' if self.unit else ''} {self.name}"
            + f" ({more})" * bool(more)
        )


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        part: Its name.
        status: ``done``, ``failed`` or ``skipped``.
        why: What went wrong, or why it was left out.
        seconds: How long it took.
        figures: What it measured, up to where it failed.
        notes: What could not be measured here, and other remarks.
    """

    part: str
    status: str = "done"
    why: str = ""
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing failed; what was left out has not."""
        return self.status != "failed" and all(figure.holds for figure in self.figures)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        figures = [{**asdict(figure), "holds": figure.holds} for figure in self.figures]
        return {**asdict(self), "figures": figures, "holds": self.holds}


def table(outcomes: Iterable[Outcome]) -> str:
    """All parts, a line for each figure."""
    lines = []
    for outcome in outcomes:
        lines.append(
            f"{outcome.part}: {outcome.status}, {outcome.seconds:.1f} s" + f"; {outcome.why}" * bool(outcome.why)
        )
        lines += [f"  {figure}" for figure in outcome.figures]
        lines += [f"       {note}" for note in outcome.notes]
    return "\n".join(lines)


def markdown(record: Mapping[str, Any]) -> str:
    """What a run recorded, as the table of a page."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"{record['device']}; {versions}.", "", "| part | what | measured | lowest to highest | limit |"]
    lines.append("|---|---|---|---|---|")
    for part in record["parts"]:
        if part["status"] != "done":
            lines.append(f"| {part['part']} | {part['status']}: {_cell(part['why'])} | | | |")
        lines += [_row(part["part"], each) for each in part["figures"]]
    return "\n".join(lines)


def _row(part: str, figure: Mapping[str, Any]) -> str:
    value = " ".join(filter(None, (_short(figure["value"]), figure["unit"])))
    if not figure["holds"]:
        value = f"**{value}**"
    spread = ""
    if figure["low"] is not None:
        spread = f"{_short(figure['low'])} to {_short(figure['high'])} ({figure['runs']})"
    limit = "" if figure["limit"] is None else _short(figure["limit"])
    what = _cell(figure["name"] + (f" ({figure['detail']})" if figure["detail"] else ""))
    return f"| {part} | {what} | {value} | {spread} | {limit} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _short(value: float) -> str:
    """Four digits, and no more places than say something."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"

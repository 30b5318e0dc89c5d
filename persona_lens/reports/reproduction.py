"""The page of a reproduction: what of the paper is shown, not shown or refuted, row by row, by the rule of each."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import capital, counted, listed
from persona_lens.reports import svg
from persona_lens.reports.page import NONE, Headline, number, over, resting_on, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
SHOWN, NOT_SHOWN, REFUTED, MISSING = "shown", "not shown", "refuted", "missing"
_CLASSES = {SHOWN: "good", REFUTED: "bad"}
_STYLES: tuple[Mapping[str, Any], ...] = (
    {"color": svg.THIRD, "marker": "^"},
    {"color": svg.INK, "marker": "v"},
    {"color": svg.MUTED, "marker": "P"},
    {"color": svg.RANDOM, "marker": "X"},
)
_THIN = {"elinewidth": 1, "capsize": 2, "capthick": 1, "markersize": 6}


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary, which is JSON values as in the run's ``summary.json``."""
    return {
        "titles": {name: _title(name) for name in figures(summary)},
        "reports": {step["name"]: step["report"] for step in summary["steps"]},
        "steps_of": [{**step, "command": shlex.join(step["words"])} for step in summary["steps"]],
        "classes": _CLASSES,
    }


def groups(rows: Iterable[Summary]) -> list[tuple[str, list[Summary]]]:
    """Rows that follow each other and are of one claim, under it."""
    return [(claim, list(own)) for claim, own in groupby(rows, key=lambda row: str(row["claim"]))]


@resting_on(over("claim", "rows"))
def headline(summary: Summary) -> Headline:
    """How many claims are shown, and which are refuted.

    It is ``clear`` where some are shown and none refuted, ``reversed`` where some are refuted and none shown.
    """
    counts, rows = summary["counts"], summary["rows"]
    measured = len(rows) - counts[MISSING]
    if not measured:
        return Headline("unclear", "No result: no claim could be measured", (_missing(summary),))
    shown, refuted, unsaid = counts[SHOWN], counts[REFUTED], counts[NOT_SHOWN]
    title = f"{shown} of {counted(measured, 'claim')} of the paper {_is(shown)} shown on {summary['model']}"
    sentences = [
        f"{capital(counted(unsaid, 'claim'))} {_is(unsaid)} not shown: the intervals hold what the null gives. "
        f"{refuted} {_is(refuted)} refuted{_which(summary, REFUTED)}."
    ]
    if counts[MISSING]:
        sentences.append(_missing(summary))
    traits = f"{counted(len(summary['traits']), 'trait')}: {listed(summary['traits'])}"
    sentences.append(
        f"Plan {summary['scale']}, {traits}. Each claim has a rule of its own, fixed beforehand; of claims that do not "
        "hold, about one in forty looks shown by chance."
    )
    verdict = "unclear" if bool(counts[SHOWN]) == bool(counts[REFUTED]) else "clear" if counts[SHOWN] else "reversed"
    return Headline(verdict, title, tuple(sentences))


def _missing(summary: Summary) -> str:
    count = summary["counts"][MISSING]
    where = "its row says" if count == 1 else "their rows say"
    return f"{counted(count, 'claim')} could not be measured; {where} what that would need."


def _which(summary: Summary, verdict: str) -> str:
    own = [row for row in summary["rows"] if row["verdict"] == verdict]
    names = [row["says"] + (f" ({row['trait']})" if row["trait"] else "") for row in own]
    return f": {'; '.join(names)}" if names else ""


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def cell_of(found: Summary | None, digits: int = 1) -> str:
    """A number with its interval in brackets, for a table."""
    if found is None:
        return NONE
    middle = number(found["mean"], digits)
    if found["low"] is None or found["n"] == 1:
        return f"{middle} (no interval)"
    if found["low"] == found["high"] == found["mean"]:
        return middle
    return f"{middle} ({number(found['low'], digits)} to {number(found['high'], digits)})"


def rows_of(_: Path | None, summary: Summary) -> Iterator[dict[str, Any]]:
    """One row a claim and trait."""
    for row in summary["rows"]:
        yield {name: value for name, value in row.items() if name != "digits"}


# Figures


def figures(summary: Summary) -> svg.Wanted:
    """Curves of steering by layer, and datasets before and after finetuning, of each trait."""
    found: svg.Wanted = {}
    for trait, each in summary["figures"]["steering"].items():
        if each["layers"]:
            found[f"steering-{trait}"] = (steering_figure, each)
    for trait, rows in summary["figures"]["datasets"].items():
        known = [row for row in rows if row["change"] is not None]
        if known:
            found[f"datasets-{trait}"] = (datasets_figure, known)
    return found


def _title(name: str) -> str:
    kind, _, trait = name.partition("-")
    if kind == "steering":
        return f"Mean score of {trait} at each coefficient, by the layer that is steered"
    return f"Datasets before finetuning and models after it, along {trait}"


def steering_figure(found: Summary, width: int) -> Figure:
    """Score against coefficient, a line a layer; the layer that was tuned beside its random directions."""
    figure, axes = svg.panel(width, 380)
    others = [each for each in found["layers"] if each["layer"] != found["layer"]]
    for place, each in enumerate(others):
        style = {"linewidth": 1, "linestyle": "-", "zorder": 3, **_THIN, **_STYLES[place % len(_STYLES)]}
        _line(axes, each["curves"]["vector"], style, f"layer {each['layer']}")
    for each in found["layers"]:
        if each["layer"] == found["layer"]:
            svg.line_with_intervals(axes, each["curves"]["vector"], "score", svg.LINE, f"layer {each['layer']}, tuned")
            if points := each["curves"].get("random"):
                svg.line_with_intervals(axes, points, "score", svg.NULL, svg.RANDOM_LABEL)
    coefficients = sorted({point["coefficient"] for each in found["layers"] for point in each["curves"]["vector"]})
    axes.set(title="Mean trait score, 0 to 100", xlabel="steering coefficient", ylim=(0, 100), yticks=range(0, 101, 20))
    axes.set_xticks(coefficients, [signed(each) for each in coefficients])
    svg.legend(figure, axes)
    return figure


def _line(axes: Axes, points: Any, style: Mapping[str, Any], label: str) -> None:
    svg.dots(axes, [(point["coefficient"], point["score"]) for point in points], style, label)


def datasets_figure(rows: Any, width: int) -> Figure:
    """Change of the score against the shift, and against the projection difference, a point a dataset."""
    wide = width == svg.WIDE
    figure, panels = svg.panels(width, 330, 560, *((1, 2) if wide else (2, 1)), sharey=True)
    for axes, before, label in zip(
        panels, ("shift", "difference"), ("shift after finetuning", "projection difference before"), strict=True
    ):
        places = [(row[before], row["change"]) for row in rows if row.get(before) is not None]
        if places:
            svg.dots(axes, places, {**svg.LINE, "linestyle": ""})
        axes.axhline(0, **svg.ZERO)
        axes.set(xlabel=label)
        axes.grid(True, axis="both")
        axes.margins(x=0.12, y=0.12)
        axes.xaxis.set_major_formatter(lambda value, _: signed(round(value, 6)))
        axes.yaxis.set_major_formatter(lambda value, _: signed(round(value, 6)))
    panels[0].set(title="Change of the trait score, points")
    return figure

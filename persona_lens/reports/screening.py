"""The page of a screening: what datasets would do to a model's character, and which of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_lens.core.text import counted
from persona_lens.reports.drawing import (
    BAR,
    DASHES,
    GRID,
    INK,
    MUTED,
    RANDOM,
    THIRD,
    VECTOR,
    WIDE,
    Drawing,
    draw,
    drawing_style,
    legend,
    new_figure,
    reach,
)
from persona_lens.reports.page import environment
from persona_lens.reports.wording import bounds, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
QUANTITIES = {
    "raw": "raw projection",
    "difference": "difference to base responses",
    "prompt_difference": "difference to the last prompt token",
}
_COLOURS = (VECTOR, RANDOM, THIRD, MUTED)
_MOST_DRAWN = 8  # gauges
_NAME = 26


def render_screening(summary: Summary, version: str = "") -> str:
    """A page on one screening, complete in itself: no scripts, and nothing is loaded from anywhere.

    The same summary gives the same bytes.

    Args:
        summary: As `persona_lens.screening.screen` has it, or as JSON read from ``summary.json``.
        version: Of persona-lens, to be named on the page.

    Raises:
        KeyError, jinja2.UndefinedError: If the summary lacks a part, naming it.

    Returns:
        HTML, to be written as UTF-8.
    """
    env = environment()
    env.filters["share"] = lambda part, whole: f"{number(100 * part / whole)}%" if whole else number(None)
    env.filters["random"] = _random
    drawn = summary["gauges"][:_MOST_DRAWN]
    return env.get_template("screening.html.j2").render(
        **summary,
        quantities=QUANTITIES,
        measured=[name for name in QUANTITIES if any(_means(summary, name))],
        screened=[dataset for dataset in summary["datasets"] if not dataset["reference"]],
        references=[dataset for dataset in summary["datasets"] if dataset["reference"]],
        drawn={gauge: place for place, gauge in enumerate(drawn)},
        lines=list(_conclusions(summary)),
        figures=_draw_figures(summary, drawn),
        version=version,
    )


def _means(summary: Summary, quantity: str) -> Iterator[Any]:
    for dataset in summary["datasets"]:
        for means in dataset["means"].values():
            yield means[quantity]


def _random(values: Sequence[float]) -> str:
    if not values:
        return number(None)
    return f"{number(float(np.mean(values)), 2)} ({number(min(values), 2)} to {number(max(values), 2)})"


def _conclusions(summary: Summary) -> Iterator[str]:
    """A sentence on each dataset and trait, no stronger than the interval allows."""
    score = summary["score"]
    for dataset in summary["datasets"]:
        if dataset["reference"]:
            continue
        for gauge, means in dataset["means"].items():
            found = means["difference"] or means["prompt_difference"]
            if found is None:
                continue
            what = QUANTITIES["difference" if means["difference"] else "prompt_difference"]
            side = "above" if found["low"] > 0 else "below" if found["high"] < 0 else "not clearly on either side of"
            flagged = dataset["flagged"]
            ending = ""
            if flagged is not None:
                kept = dataset["rows"] - dataset["rejected"]
                ending = f"; {flagged[gauge]:,} of {counted(kept, 'row')} flagged by the {QUANTITIES[score]}"
            yield f"{dataset['name']}, {gauge}: the {what} is {bounds(found, 3, sign=True)}, {side} 0{ending}."


def _draw_figures(summary: Summary, gauges: Sequence[str]) -> dict[str, Drawing]:
    found = {}
    with drawing_style():
        for place, gauge in enumerate(gauges):
            found[f"rows-{place}"] = draw(
                f"rows-{place}",
                f"Rows by value, {gauge}",
                f"Shares of the rows of each dataset by their {QUANTITIES[summary['score']]} on {gauge}.",
                histogram_figure,
                summary,
                gauge,
            )
            if summary["labels"]:
                found[f"roc-{place}"] = draw(
                    f"roc-{place}",
                    f"ROC curves, {gauge}",
                    f"Labelled rows found against clean rows found, as the threshold on {gauge} goes down.",
                    roc_figure,
                    summary["labels"],
                    summary["score"],
                    gauge,
                )
        found["datasets"] = draw(
            "datasets",
            "Means of datasets",
            "The mean of each dataset and group with its 95% interval.",
            means_figure,
            summary,
        )
    return found


def histogram_figure(summary: Summary, gauge: str, width: int) -> Figure:
    """Shares of rows by value: what is screened filled, the reference as a line, the threshold with its band."""
    figure = new_figure(width, 360 if width == WIDE else 320)
    axes = figure.add_subplot()
    found = summary["histograms"][gauge]
    edges = np.array(found["edges"])
    colours = iter(_COLOURS * len(found["counts"]))
    for dataset, counts in zip(summary["datasets"], found["counts"], strict=True):
        if not sum(counts):
            continue
        shares = 100 * np.array(counts) / sum(counts)
        name = _short(dataset["name"])
        if dataset["reference"]:
            axes.stairs(shares, edges, color=INK, linewidth=1.8, label=f"{name} (clean)", zorder=4)
        else:
            axes.stairs(shares, edges, fill=True, color=next(colours), alpha=0.45, label=name, zorder=3)
    threshold = next((each for each in summary["thresholds"] if each["gauge"] == gauge), None)
    if threshold is not None:
        axes.axvspan(threshold["low"], threshold["high"], color=GRID, zorder=0, linewidth=0)
        axes.axvline(threshold["value"], color=MUTED, linestyle=DASHES, linewidth=1.5, zorder=2)
    axes.set(title="Share of the rows, %", xlabel=f"{QUANTITIES[summary['score']]}, {gauge}")
    legend(figure, axes, 2)
    return figure


def roc_figure(labels: Mapping[str, Any], score: str, gauge: str, width: int) -> Figure:
    """One curve a label, with the diagonal of chance."""
    figure = new_figure(width, 400 if width == WIDE else 343)
    axes = figure.add_subplot()
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=DASHES)
    for (label, found), colour in zip(labels["labels"].items(), _COLOURS * len(labels["labels"]), strict=False):
        entry = found.get(score, {}).get(gauge)
        if entry is not None:
            x, y = 100 * np.array(entry["roc"]).T
            axes.plot(x, y, color=colour, label=f"{_short(label)}: AUC {number(entry['auc'], 2)}", zorder=3)
    axes.set(
        title="Labelled rows above the threshold, %",
        xlabel=f"clean rows ({_short(labels['clean'])}) above it, %",
        xlim=(-2, 102),
        ylim=(-2, 102),
        aspect="equal",
    )
    axes.grid(True, axis="both", color=GRID)
    legend(figure, axes, 2)
    return figure


def means_figure(summary: Summary, width: int) -> Figure:
    """Datasets and their groups below each other, a mean with its interval for each gauge."""
    rows = [
        (name, each["means"])
        for dataset in summary["datasets"]
        if dataset["means"]
        for name, each in ((dataset["name"], dataset), *((f"– {g}", e) for g, e in dataset["groups"].items()))
    ]
    gauges = summary["gauges"][: len(_COLOURS)]
    figure = new_figure(width, 120 + len(rows) * max(26, 14 * len(gauges)))
    axes = figure.add_subplot()
    for place, gauge in enumerate(gauges):
        offset = (place - (len(gauges) - 1) / 2) * 0.6 / max(len(gauges), 2)
        known = [(n, means[gauge][summary["score"]]) for n, (_, means) in enumerate(rows)]
        known = [(n, found) for n, found in known if found is not None]
        axes.errorbar(
            [found["mean"] for _, found in known],
            [n + offset for n, _ in known],
            xerr=reach([found for _, found in known]),
            color=_COLOURS[place],
            marker="o",
            linestyle="",
            label=gauge,
            **BAR,
        )
    if summary["score"] != "raw":
        axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows])
    axes.set(xlabel=f"mean {QUANTITIES[summary['score']]}", ylim=(len(rows) - 0.5, -0.5))
    axes.grid(True, axis="x", color=GRID)
    axes.grid(False, axis="y")
    legend(figure, axes, 2)
    return figure


def _short(name: str) -> str:
    kept = name if len(name) <= _NAME else "…" + name[-_NAME + 1 :]
    return kept.replace("\n", " ")

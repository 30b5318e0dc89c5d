"""The page of a screening: what datasets would do to a model's character, and which of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_lens.core.text import counted
from persona_lens.reports import svg
from persona_lens.reports.page import Headline, number, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
QUANTITIES = {
    "raw": "raw projection",
    "difference": "difference to base responses",
    "prompt_difference": "difference to the last prompt token",
}
_COLOURS = (svg.VECTOR, svg.RANDOM, svg.THIRD, svg.MUTED)
_MOST_DRAWN = 8  # gauges
_NAME = 26


def render_screening(summary: Summary, version: str = "") -> str:
    """A page on one screening; see `persona_lens.reports.page.render`.

    Args:
        summary: As `persona_lens.screening.screen` has it, or as JSON read from ``summary.json``.
        version: Of persona-lens, to be named on the page.
    """
    drawn = summary["gauges"][:_MOST_DRAWN]
    parts = {
        **summary,
        "quantities": QUANTITIES,
        "measured": [name for name in QUANTITIES if any(_means(summary, name))],
        "screened": [dataset for dataset in summary["datasets"] if not dataset["reference"]],
        "references": [dataset for dataset in summary["datasets"] if dataset["reference"]],
        "drawn": {gauge: place for place, gauge in enumerate(drawn)},
        "figures": svg.drawn(figures(summary)),
        "version": version,
    }
    return render("screening.html.j2", parts, {"share": _share, "random": _random})


def _share(part: int, whole: int) -> str:
    return number(part / whole if whole else None, percent=True)


def _means(summary: Summary, quantity: str) -> Iterator[Any]:
    for dataset in summary["datasets"]:
        for means in dataset["means"].values():
            yield means[quantity]


def _random(values: Sequence[float]) -> str:
    if not values:
        return number(None)
    return f"{number(float(np.mean(values)), 2)} ({number(min(values), 2)} to {number(max(values), 2)})"


def headline(summary: Summary) -> Headline:
    """What was measured: how labels are told apart, or else what projects higher than the reference."""
    labels, score = summary["labels"], summary["score"]
    known = [
        (label, gauge, found)
        for label, quantities in (labels["labels"] if labels else {}).items()
        for gauge, found in quantities.get(score, {}).items()
    ]
    if known:
        label, gauge, found = max(known, key=lambda each: float(each[2]["auc"]))
        beyond = not found["random"] or found["low"] > max(found["random"])
        verdict = "no null" if not found["random"] else "clear" if beyond and found["low"] > 0.5 else "unclear"
        title = f"{label} and {labels['clean']} rows are told apart with an AUC of {number(found['auc'], 3)} by {gauge}"
        return Headline(verdict, title, tuple(f"{line}." for line in told(summary)))
    flagged = sum(
        each["decisions"]["flagged"] for each in summary["datasets"] if each["decisions"] and not each["reference"]
    )
    if summary["thresholds"]:
        title = f"{flagged:,} rows project higher than the reference"
        return Headline("no null", title, tuple(f"{line}." for line in told(summary)))
    return Headline("no null", "Projections were measured, with nothing to hold them against", ())


def rows_screened(summary: Summary) -> str:
    """How many rows were screened."""
    return counted(sum(dataset["rows"] for dataset in summary["datasets"] if not dataset["reference"]), "row")


def figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    labels, score = summary["labels"], summary["score"]
    found: svg.Wanted = {"datasets": (means_figure, summary)}
    for place, gauge in enumerate(summary["gauges"][:_MOST_DRAWN]):
        found[f"rows-{place}"] = (histogram_figure, summary, gauge)
        if labels:
            found[f"roc-{place}"] = (roc_figure, labels, score, gauge)
    return found


def histogram_figure(summary: Summary, gauge: str, width: int) -> Figure:
    """Shares of rows by value: what is screened filled, the reference as a line, the threshold with its band."""
    figure, axes = svg.panel(width, 360, 320)
    found = summary["histograms"][gauge]
    edges = np.array(found["edges"])
    colours = iter(_COLOURS * len(found["counts"]))
    for dataset, counts in zip(summary["datasets"], found["counts"], strict=True):
        if not sum(counts):
            continue
        shares = 100 * np.array(counts) / sum(counts)
        name = _short(dataset["name"])
        if dataset["reference"]:
            axes.stairs(shares, edges, color=svg.INK, linewidth=1.8, label=f"{name} (clean)", zorder=4)
        else:
            axes.stairs(shares, edges, fill=True, color=next(colours), alpha=0.45, label=name, zorder=3)
    threshold = next((each for each in summary["thresholds"] if each["gauge"] == gauge), None)
    if threshold is not None:
        axes.axvspan(threshold["low"], threshold["high"], color=svg.GRID, zorder=0, linewidth=0)
        axes.axvline(threshold["value"], color=svg.MUTED, linestyle=svg.DASHES, linewidth=1.5, zorder=2)
    axes.set(title="Share of the rows, %", xlabel=f"{QUANTITIES[summary['score']]}, {gauge}")
    svg.legend(figure, axes, 2)
    return figure


def roc_figure(labels: Mapping[str, Any], score: str, gauge: str, width: int) -> Figure:
    """One curve a label, with the diagonal of chance."""
    figure, axes = svg.panel(width, 400, 343)
    axes.plot([0, 100], [0, 100], color=svg.MUTED, linewidth=1, linestyle=svg.DASHES)
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
    axes.grid(True, axis="both")
    svg.legend(figure, axes, 2)
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
    figure, axes = svg.panel(width, 120 + len(rows) * max(26, 14 * len(gauges)))
    for place, gauge in enumerate(gauges):
        offset = (place - (len(gauges) - 1) / 2) * 0.6 / max(len(gauges), 2)
        known = [(n, means[gauge][summary["score"]]) for n, (_, means) in enumerate(rows)]
        drawn = [(found, n + offset) for n, found in known if found is not None]
        svg.dots(axes, drawn, {"color": _COLOURS[place], "markersize": 6}, gauge)
    if summary["score"] != "raw":
        axes.axvline(0, **svg.ZERO)
    axes.set(xlabel=f"mean {QUANTITIES[summary['score']]}", ylim=(-0.5, len(rows) - 0.5))
    svg.in_rows(axes, [_short(name) for name, _ in rows])
    svg.legend(figure, axes, 2)
    return figure


def _short(name: str) -> str:
    kept = name if len(name) <= _NAME else "…" + name[-_NAME + 1 :]
    return kept.replace("\n", " ")


def told(summary: Summary) -> list[str]:
    """What the screening comes to beside the table, in a few lines."""
    lines = [
        f"{each['gauge']}: flagged above {each['high']:.3f}, undecided above {each['low']:.3f} "
        f"({summary['score']}; {100 * each['false_positive_rate']:g}% of {each['rows']:,} reference rows above "
        f"{each['value']:.3f})"
        for each in summary["thresholds"]
    ]
    for label, quantities in (summary["labels"] or {"labels": {}})["labels"].items():
        for quantity, gauges in quantities.items():
            lines += [
                f"{label} against {summary['labels']['clean']}, {quantity}, {gauge}: AUC {found['auc']:.3f} "
                f"[{found['low']:.3f}, {found['high']:.3f}]{_beside(found['random'])}"
                for gauge, found in gauges.items()
            ]
    for dataset in summary["datasets"]:
        lines += [
            f"{dataset['name']}: finetuning on it is forecast to move the score of {gauge.rpartition('@')[0]} by "
            f"{found['shift']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}] points"
            + (", beyond the datasets that the forecast was fitted on" if found["outside"] else "")
            for gauge, found in dataset["forecasts"].items()
        ]
    for trait, found in summary["opinions"].items():
        lines.append(
            f"{trait}: of {found['judged']:,} flagged rows the judge scores {found['confirmed']:,} at 50 or more"
            + (f", {found['without_score']:,} without a score" if found["without_score"] else "")
        )
    return lines


def _beside(random: list[float]) -> str:
    if not random:
        return ""
    mean = sum(random) / len(random)
    return f"; {len(random)} random directions {mean:.2f} on average, {min(random):.2f} to {max(random):.2f}"

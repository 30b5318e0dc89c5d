"""The page of a screening: what datasets would do to a model's character, and which of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import hypot
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_lens.core.statistics import few
from persona_lens.core.text import counted
from persona_lens.reports import svg
from persona_lens.reports.page import Headline, Steps, amount, bounds, judge_name, number, resting_on, shell

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
_MOST_SAID = 4  # sentences of a kind in the headline
_NAME = 26


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary, which is JSON values as in the run's ``summary.json``."""
    drawn = summary["gauges"][:_MOST_DRAWN]
    return {
        "quantities": QUANTITIES,
        "measured": [name for name in QUANTITIES if any(_means(summary, name))],
        "screened": [dataset for dataset in summary["datasets"] if not dataset["reference"]],
        "references": [dataset for dataset in summary["datasets"] if dataset["reference"]],
        "drawn": {gauge: place for place, gauge in enumerate(drawn)},
    }


def share(part: int, whole: int) -> str:
    """A part of a number of rows, in percent."""
    return number(part / whole if whole else None, percent=True)


def _means(summary: Summary, quantity: str) -> Iterator[Any]:
    for dataset in summary["datasets"]:
        for means in dataset["means"].values():
            yield means[quantity]


def random(values: Sequence[float]) -> str:
    """The mean of what random directions come to, with its range."""
    if not values:
        return number(None)
    return f"{number(float(np.mean(values)), 2)} ({number(min(values), 2)} to {number(max(values), 2)})"


def _rows(summary: Summary) -> str:
    screened = [each for each in summary["datasets"] if not each["reference"]]
    read = sum(each["rows"] - each["rejected"] for each in screened)
    lost = sum(each["rejected"] for each in screened)
    parts = [f"{amount(read, 'row')} of {counted(len(screened), 'dataset')}"]
    parts += [f"{lost:,} unreadable"] if lost else []
    parts += [f"{amount(each['rows'], 'reference row')}" for each in summary["thresholds"][:1]]
    names = " and ".join(dict.fromkeys(map(judge_name, (summary["judges"] or {}).values())))
    return ", ".join([*parts, f"second opinions by {names}" if names else "no judge"])


@resting_on(_rows, judged=False)
def headline(summary: Summary) -> Headline:
    """What was measured: how labels are told apart, or else what projects higher than the reference.

    It is ``clear`` if the AUC lies, with its whole interval, above chance and above what random directions reach.
    """
    moved = tuple(_moved(summary))
    if known := _separations(summary):
        label, gauge, found = max(known, key=lambda each: float(each[2]["auc"]))
        clean = summary["labels"]["clean"]
        verdict = "unclear"
        if found["low"] > max([0.5, *found["random"]]):
            verdict = "clear" if found["random"] else "no null"
        value = f"an AUC of {number(found['auc'], 2)}"
        title = f"{gauge} tells {label} rows from {clean} ones with {value}"
        if verdict == "unclear":
            title = f"{label} rows are not clearly told from {clean} ones: {value} on {gauge}"
        said = [
            f"{each}, {name}: AUC {number(one['auc'], 3)} (95% interval {number(one['low'], 3)} to "
            f"{number(one['high'], 3)}) over {amount(one['labelled'], 'labelled row')} and "
            f"{amount(one['clean'], 'clean row')}; random directions {random(one['random'])}."
            for each, name, one in known[:_MOST_SAID]
        ]
        if len(known) > 1:
            said.append(f"The title has the largest of {len(known)}, which flatters it.")
        return Headline(verdict, title, (*said, *moved))
    beside = _beside_reference(summary)
    if not beside:
        return Headline("no null", "Rows were projected, with nothing to hold them against", moved)
    higher = [each for each in beside if each[2]["low"] > 0]
    name, gauge, found = max(higher or beside, key=lambda each: float(each[2]["mean"]))
    by = f"{number(found['mean'], 2, sign=True)}"
    title = f"{name} projects higher than the reference on {gauge}, by {by}"
    if not higher:
        title = "No dataset clearly projects higher than the reference"
    elif len(beside) > 1:
        title += f" (clearly so are {len(higher)} of {len(beside)} means)"
    said = [
        f"{each}, {which}: its mean {QUANTITIES[summary['score']]} minus the reference’s is "
        f"{bounds(one, 3, sign=True, noun='row')}."
        for each, which, one in beside[:_MOST_SAID]
    ]
    said.append("Data about other things differs along any direction: no random directions stand beside this.")
    return Headline("no null" if higher else "unclear", title, (*said, *moved))


def _separations(summary: Summary) -> list[tuple[str, str, Summary]]:
    """Labels, gauges and how well these tell them from clean rows, by the value that rows are ranked by."""
    labels = summary["labels"]["labels"] if summary["labels"] else {}
    return [
        (label, gauge, found)
        for label, quantities in labels.items()
        for gauge, found in quantities.get(summary["score"], {}).items()
    ]


def _beside_reference(summary: Summary) -> list[tuple[str, str, Summary]]:
    """Datasets, gauges, and means minus the reference's, whose interval has the width of both (MOVER).

    Of several references the one with the highest mean is taken.
    """
    quantity = summary["score"]
    means = [(each, each["means"]) for each in summary["datasets"] if each["means"]]
    found: list[tuple[str, str, Summary]] = []
    for gauge in summary["gauges"]:
        clean = [own[gauge][quantity] for each, own in means if each["reference"] and own[gauge][quantity]]
        if not clean:
            continue
        reference = max(clean, key=lambda each: float(each["mean"]))
        for each, own in means:
            mine = own[gauge][quantity]
            if mine and not each["reference"]:
                middle = mine["mean"] - reference["mean"]
                down = hypot(mine["mean"] - mine["low"], reference["high"] - reference["mean"])
                up = hypot(mine["high"] - mine["mean"], reference["mean"] - reference["low"])
                ends = {"mean": middle, "low": middle - down, "high": middle + up}
                found.append((_short(each["name"]), gauge, {**ends, "n": min(mine["n"], reference["n"])}))
    return found


def _moved(summary: Summary) -> Iterator[str]:
    """What each dataset would push towards, where its rows were held against what the model itself says."""
    screened = [each for each in summary["datasets"] if not each["reference"]]
    for dataset in screened[:_MOST_SAID]:
        for gauge, means in dataset["means"].items():
            what = "difference" if means["difference"] else "prompt_difference"
            mean = means[what]
            if mean:
                where = "above" if mean["low"] > 0 else "below" if mean["high"] < 0 else "not clearly on either side of"
                said = f"{_short(dataset['name'])}, {gauge}: the {QUANTITIES[what]} is "
                flagged = ""
                if dataset["flagged"] is not None:
                    rows = counted(dataset["rows"] - dataset["rejected"], "row")
                    flagged = f"; {dataset['flagged'][gauge]:,} of {rows} flagged by the {QUANTITIES[summary['score']]}"
                yield f"{said}{bounds(mean, 3, sign=True, noun='row')}, {where} 0{flagged}."


def next_steps(summary: Summary, folder: str) -> Steps:
    """What one may want to do next with the run's folder."""
    model = summary["model"]["model"]
    if not summary["thresholds"]:
        clean = shell("persona-lens", "screen", model, "DATA", "VECTORS", "--reference", "CLEAN")
        return [("Name a clean reference, so that rows are sorted into kept and flagged ones.", clean)]
    kept = f"{folder}/split/{PurePath(summary['datasets'][0]['name']).stem}-kept.jsonl"
    return [
        ("Finetune on the rows that were kept.", shell("persona-lens", "finetune", model, kept)),
        (
            "Or on all of them, while the trait is held back.",
            shell("persona-lens", "finetune", model, "DATA", "--method", "preventative", "--vectors", "VECTORS"),
        ),
    ]


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
                f"[{found['low']:.3f}, {found['high']:.3f}]{_few_rows(found)}{_beside(found['random'])}"
                for gauge, found in gauges.items()
            ]
    lines += filter(None, (_without_base(summary["settings"], dataset) for dataset in summary["datasets"]))
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


def _without_base(settings: Summary, dataset: Summary) -> str:
    """How many rows have no difference because the model's own responses have nothing of the part that counts."""
    part = settings.get("part")
    if settings["base"] != "generate" or part not in ("thinking", "answer"):
        return ""
    means = list(dataset["means"].values())
    rows = max((each["raw"]["n"] for each in means), default=0)
    there = max((each["difference"]["n"] for each in means if each["difference"]), default=0)
    if there == rows or (there and settings["base_share"] < 1):
        return ""
    what = "thinking" if part == "thinking" else "answer within --max-new-tokens; allow for more, or --thinking-budget"
    return f"{dataset['name']}: {rows - there:,} of {rows:,} rows have no difference: base responses hold no {what}"


def _few_rows(found: Summary) -> str:
    said = few(min(found["labelled"], found["clean"]), "row")
    return f" ({said})" if said else ""


def _beside(random: list[float]) -> str:
    if not random:
        return ""
    mean = sum(random) / len(random)
    return f"; {len(random)} random directions {mean:.2f} on average, {min(random):.2f} to {max(random):.2f}"

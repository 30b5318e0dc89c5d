"""The page of a monitoring study: where prompts end against how strongly their replies show the trait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_lens.core.statistics import few
from persona_lens.core.text import counted
from persona_lens.reports import svg
from persona_lens.reports.page import NONE, Headline, Steps, amount, measured, number, resting_on, shell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
GROUPS = {"prompts": "graded system prompts", "shots": "numbers of examples"}
_MEASURES = {
    "pearson": "Pearson correlation, all prompts",
    "spearman": "Spearman correlation of ranks, all prompts",
    "within_pearson": "Pearson correlation within conditions, mean",
    "within_spearman": "Spearman correlation within conditions, mean",
}


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary, which is JSON values as in the run's ``summary.json``."""
    group, found = _first(summary)
    return {
        "at": found,
        "first": group,
        "measures": _MEASURES,
        "group_names": GROUPS,
        "entries": {name: _entry(each, summary["layer"]) for name, each in summary["groups"].items()},
    }


def share(found: Summary | None) -> str:
    """A share of responses in percent with its interval."""
    return NONE if found is None else f"{measured(found, 0, percent=True)} of {found['n']:,}"


def _first(summary: Summary) -> tuple[Summary, Summary]:
    """The group that the headline is about, and its entry at the layer shown."""
    group: Summary = next(iter(summary["groups"].values()))
    return group, _entry(group, summary["layer"])


def _tuned(summary: Summary) -> Summary | None:
    """The entry at the layer tuned for steering, if it is read and is another one."""
    at, entries = summary["tuned_layer"], _first(summary)[0]["layers"]
    return next((each for each in entries if each["layer"] == at != summary["layer"]), None)


def _entry(group: Summary, layer: int) -> Summary:
    found: Summary = next(each for each in group["layers"] if each["layer"] == layer)
    return found


def _null(summary: Summary) -> Summary | None:
    """The random directions that had the vector's freedom: the best of all layers, if the layer was chosen so."""
    group, found = _first(summary)
    null = group["best_null"] if summary["layer_reason"] == "strongest" else found["null"]
    return null if null is not None and null["high"] is not None else None


def title(summary: Summary) -> str:
    """What the study comes to, in one line."""
    r, null = _first(summary)[1]["pearson"], _null(summary)
    if r["value"] is None:
        return "No correlation can be given: scores or projections do not vary"
    value = f"r = {number(r['value'], 2)}"
    if summary["verdict"] == "unclear" and r["low"] is not None and r["low"] > 0 and null is not None:
        return f"Not more than random directions do: {value}, and they reach {number(null['high'], 2)}"
    return {
        "clear": f"Where a prompt ends says how its replies will be: {value}",
        "no null": f"Where a prompt ends goes with how its replies are: {value}, with nothing to compare it with",
        "reversed": f"The wrong way round: prompts further along the vector have replies with less of it, {value}",
        "unclear": f"Where a prompt ends does not clearly say how its replies will be: {value}",
    }[summary["verdict"]]


def _asked(summary: Summary) -> str:
    asked, ways = summary["settings"], len(summary["conditions"])
    replies = counted(asked["samples"], "reply")
    return f"{amount(asked['questions'], 'held-out question')} in {counted(ways, 'condition')}, {replies} each"


@resting_on(_asked)
def headline(summary: Summary) -> Headline:
    """The title with what it rests on: the correlation with its interval, beside that of random directions."""
    group, found = _first(summary)
    chosen = summary["layer_reason"] == "strongest"
    at = f"At layer {summary['layer']}"
    at += f", the one with the largest correlation of {len(group['layers'])}" if chosen else ""
    prompts = counted(group["prompts"], "prompt")
    said = [f"{at}, r is {measured(found['pearson'])} over {prompts}, with its 95% interval."]
    null = found["null"]
    if null is None or null["mean"] is None:
        said.append("No random directions were read beside it.")
    else:
        best = group["best_null"] if chosen else None
        said.append(
            f"Of {counted(null['n'], 'random direction')} of the same length, the middle 95% lie between "
            f"{number(null['low'], 2)} and {number(null['high'], 2)} there, {number(null['mean'], 2)} on average"
            + (
                f"; each at the layer that is best for it, between {number(best['low'], 2)} and "
                f"{number(best['high'], 2)}."
                if best
                else "."
            )
        )
    if tuned := _tuned(summary):
        said.append(f"At layer {tuned['layer']}, which was tuned for steering, it is {measured(tuned['pearson'])}.")
    return Headline(summary["verdict"], title(summary), tuple(said))


def next_steps(summary: Summary, folder: str) -> Steps:
    """What one may want to do next with the run's folder."""
    model, asked = summary["model"]["model"], "How will my exam go?"
    steps = []
    if "reason" not in summary["calibration"]:
        rate = f"{summary['calibration']['threshold']['false_alarm_rate']:g}"
        words = ("persona-lens", "monitor", "prompt", model, folder, asked, "--false-alarm-rate", rate)
        steps.append(("Ask of a prompt how likely its replies show the trait.", shell(*words)))
    usual = shell("persona-lens", "monitor", "baseline", model, folder)
    return [*steps, ("Measure what is usual for the model, for alarms while it answers.", usual)]


def figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    found: svg.Wanted = {"scatter": (scatter_figure, summary)}
    if len(_first(summary)[0]["layers"]) > 1:
        found["layers"] = (layer_figure, summary)
    if "curve" in summary["calibration"]:
        found["reliability"] = (reliability_figure, summary["calibration"])
    return found


def scatter_figure(summary: Summary, width: int) -> Figure:
    """Prompts by projection and score, in the colours of their conditions, with the line of least squares."""
    figure, axes = svg.panel(width, 460, 360)
    styles = _styles([each["name"] for each in summary["conditions"]])
    for condition, style in zip(summary["conditions"], styles, strict=True):
        own = [point for point in summary["points"] if point["condition"] == condition["name"]]
        axes.plot(
            [point["projection"] for point in own],
            [point["score"] for point in own],
            markersize=7 if width == svg.WIDE else 5.5,
            **style,
        )
    x, y = (np.array([point[name] for point in summary["points"]]) for name in ("projection", "score"))
    if np.ptp(x) > 0:
        slope, intercept = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, slope * ends + intercept, color=svg.INK, linewidth=1.5, zorder=3)
    for place, condition in enumerate(summary["conditions"], 1):
        if condition["mean_score"] is not None:
            _label(axes, condition["mean_projection"], condition["mean_score"], str(place))
    threshold = summary["calibration"].get("threshold")
    if threshold is not None and x.min() <= threshold["value"] <= x.max():
        axes.axvline(threshold["value"], **svg.DOTTED)
    axes.set(
        title="Mean trait score of the replies",
        xlabel=f"projection of the prompt’s last token, layer {summary['layer']}",
        ylim=(-4, 104),
        yticks=range(0, 101, 20),
    )
    axes.grid(True, axis="both")
    return figure


def _styles(names: Sequence[str]) -> list[dict[str, Any]]:
    """One style a condition: from one colour over pale to the other."""
    plainest = {"linestyle": "", "marker": "o", "markeredgewidth": 0, "zorder": 2}
    steps = np.linspace(-1, 1, len(names))
    return [
        {**plainest, "color": svg.VECTOR if step > 0 else svg.RANDOM, "alpha": round(0.25 + 0.6 * abs(float(step)), 3)}
        for step in steps
    ]


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    box = {"facecolor": svg.PAPER, "edgecolor": svg.MUTED, "pad": 2, "linewidth": 1}
    axes.text(x, y, text, ha="center", va="center", fontsize=12, zorder=5, bbox=box)


def layer_figure(summary: Summary, width: int) -> Figure:
    """Pearson's r with its interval by layer, and the range of random directions."""
    figure, axes = svg.panel(width, 340, 300)
    rows = [each for each in _first(summary)[0]["layers"] if each["pearson"]["value"] is not None]
    nulls = [each for each in rows if each["null"] is not None and each["null"]["low"] is not None]
    if nulls:
        low, high = ([each["null"][end] for each in nulls] for end in ("low", "high"))
        band = [each["layer"] for each in nulls]
        axes.fill_between(band, low, high, color=svg.RANDOM, alpha=0.22, linewidth=0, zorder=1)
        means = [each["null"]["mean"] for each in nulls]
        axes.plot(band, means, color=svg.RANDOM, linestyle=svg.DASHES, label=svg.RANDOM_LABEL)
    line = {"color": svg.VECTOR, "linestyle": "solid", "markersize": 5, "zorder": 3}
    svg.dots(axes, [(each["layer"], _estimate(each["pearson"])) for each in rows], line, svg.VECTOR_LABEL)
    axes.axhline(0, **svg.ZERO)
    axes.axvline(summary["layer"], **svg.DOTTED)
    lowest = min([*(each["pearson"]["value"] for each in rows), *(each["null"]["low"] for each in nulls), 0.0])
    axes.set(title="Pearson’s r", xlabel="layer", ylim=(max(-1.05, lowest - 0.25), 1.05))
    axes.locator_params(axis="x", integer=True)
    svg.legend(figure, axes)
    return figure


def reliability_figure(calibration: Summary, width: int) -> Figure:
    """What happened against what was predicted, with the line on which both are equal."""
    figure, axes = svg.panel(width, 400, svg.NARROW)
    svg.square_of_percent(axes, "Replies that show the trait, %", "probability that was predicted, %")
    bins = calibration["reliability"]
    shares = [(100 * each["predicted"], _estimate(each["observed"], 100)) for each in bins]
    svg.dots(axes, shares, {"color": svg.VECTOR, "zorder": 3}, "replies")
    return figure


def _estimate(found: Summary, scale: float = 1) -> Summary:
    """A value as an estimate, whose interval may be missing."""
    ends = {end: found["value"] if found[end] is None else found[end] for end in ("low", "high")}
    return {name: scale * value for name, value in {"mean": found["value"], **ends}.items()}


def told(summary: Summary) -> list[str]:
    """What the study comes to, in a few lines."""
    lines = [f"intervals rest on {said}"] if (said := few(summary["settings"]["questions"])) else []
    for kind, group in summary["groups"].items():
        if group["ceiling"] is not None:
            lines.append(
                f"{kind}: with {counted(summary['settings']['samples'], 'response')} a prompt no predictor can reach "
                f"more than about r = {group['ceiling']:.2f}; the number of the condition itself has "
                f"{_bracketed(group['level'])}"
            )
        if group["left_out"]:
            names = ", ".join(group["left_out"])
            lines.append(f"{kind}: left out within conditions (few prompts, or scores that hardly vary): {names}")
    calibration = summary["calibration"]
    if "reason" in calibration:
        return [*lines, f"not calibrated: {calibration['reason']}"]
    threshold = calibration["threshold"]
    alarms = threshold["false_alarms"]
    unseen = f"; on questions not seen {100 * alarms['value']:.0f}%" if alarms else ""
    return [
        *lines,
        f"calibrated at layer {summary['layer']}: {calibration['curve']['kind']}, Brier score "
        f"{calibration['brier']:.3f} against {calibration['base_brier']:.3f} of the base rate",
        f"an alarm from {threshold['value']:.3f} on: false alarms {100 * threshold['false_alarm_rate']:g}%{unseen}",
    ]


def _bracketed(found: Summary) -> str:
    if found["value"] is None or found["low"] is None:
        return number(found["value"], 2)
    return f"{number(found['value'], 2)} [{number(found['low'], 2)}, {number(found['high'], 2)}]"

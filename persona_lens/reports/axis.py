"""The page of an axis: where the default Assistant stands among roles, the map of persona space, what speaks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import counted
from persona_lens.reports import svg
from persona_lens.reports.page import Headline, Steps, amount, interval, number, resting_on, shell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
NAMED = 6  # roles at each end of a component


def at_layer(summary: Summary) -> Summary:
    """What speaks for the axis at the layer of the map."""
    found: Summary = next(each for each in summary["layers"] if each["layer"] == summary["layer"])
    return found


@resting_on(lambda summary: amount(len(summary["map"]), "role") + f", {counted(summary['responses'], 'response')}")
def headline(summary: Summary) -> Headline:
    """In words no stronger than what was measured."""
    found = at_layer(summary)
    halves, cosine, layer = found["axis_halves"], found["cosine"], summary["layer"]
    reliable = halves is not None and halves["n"] > 1 and halves["low"] > found["axis_halves_null"]
    first = cosine["n"] > 1 and cosine["low"] > found["cosine_null"]
    title = (
        "The axis is not told from chance: halves of the questions do not agree on it"
        if not reliable
        else "The axis is reliable, and it is most of what tells roles apart"
        if first
        else "The axis is reliable; that it is what most tells roles apart is not told from chance"
    )
    said = [
        f"At layer {layer}, the axes of two halves of the questions have a cosine of {interval(halves, 2)}; with the "
        f"labels permuted, 95% stay below {number(found['axis_halves_null'], 2)}."
        if halves
        else "There were too few questions to be halved.",
        f"Its cosine with the roles’ first component is {interval(cosine, 2)}, with the labels permuted below "
        f"{number(found['cosine_null'], 2)}.",
        f"On that component the default is {interval(found['from_end'], 2)} of the roles’ range away from an end; "
        f"with the labels permuted, 95% are farther than {number(found['from_end_null'], 2)}.",
        f"{counted(summary['components_for_70'], 'component')} hold 70% of the variance between roles.",
    ]
    return Headline("clear" if reliable else "unclear", title, tuple(said))


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary, which is JSON values as in the run's ``summary.json``."""
    return {
        "at": at_layer(summary),
        "ends": [ends(summary, component) for component in range(3)],
        "left_out": [role for role in summary["counts"] if role not in {each["role"] for each in summary["map"]}],
    }


def ends(summary: Summary, component: int) -> dict[str, list[str]]:
    """The roles at both ends of a component, the default's side first."""
    ordered = sorted(summary["map"], key=lambda each: -each["coordinates"][component])
    names = [each["role"] for each in ordered]
    return {"near": names[:NAMED], "far": names[-NAMED:][::-1]}


def next_steps(summary: Summary, folder: str) -> Steps:
    """What one may want to do next with the run's folder."""
    model = summary["model"]["model"]
    return [
        ("Keep the model on the Assistant's side.", shell("persona-lens", "axis", "cap", model, folder)),
        ("See where conversations take it.", shell("persona-lens", "monitor", "drift", model, folder)),
    ]


def figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    found: svg.Wanted = {"map": (map_figure, summary), "layers": (layers_figure, summary)}
    if summary["traits"]:
        found["traits"] = (traits_figure, summary)
    return found


def map_figure(summary: Summary, width: int) -> Figure:
    """Roles by their first three components, with the default, and the steps of traits from it."""
    wide = width == svg.WIDE
    figure, axes = svg.panels(width, 480, 760, 1 if wide else 2, 2 if wide else 1)
    for panel, other in zip(axes, (1, 2), strict=True):
        _draw_map(panel, summary, other)
    svg.legend(figure, axes[0])
    return figure


def _draw_map(axes: Axes, summary: Summary, other: int) -> None:
    x, y = ([each["coordinates"][component] for each in summary["map"]] for component in (0, other))
    axes.plot(x, y, linestyle="", marker="o", markersize=4.5, color=svg.RANDOM, label="roles", zorder=3)
    shown = {name for side in (ends(summary, 0), ends(summary, other)) for names in side.values() for name in names[:3]}
    for each in summary["map"]:
        if each["role"] in shown:
            at = each["coordinates"][0], each["coordinates"][other]
            axes.annotate(each["role"], at, (3, 3), textcoords="offset points", fontsize=9, color=svg.MUTED)
    default = summary["default"][0], summary["default"][other]
    axes.plot(*default, linestyle="", marker="D", markersize=9, color=svg.VECTOR, label="default Assistant", zorder=5)
    for trait in summary["traits"]:
        end = default[0] + trait["step"][0], default[1] + trait["step"][other]
        axes.annotate("", end, default, arrowprops={"arrowstyle": "->", "color": svg.INK, "linewidth": 1.2})
        axes.annotate(trait["trait"], end, (3, -9), textcoords="offset points", fontsize=9, color=svg.INK)
    axes.set(xlabel="component 1", ylabel=f"component {other + 1}")
    axes.margins(0.12)
    axes.grid(True, axis="both")


def layers_figure(summary: Summary, width: int) -> Figure:
    """Cosine with the first component, and agreement of halves, by layer, beside permuted labels."""
    figure, axes = svg.panel(width, 400, 340)
    layers = [each["layer"] for each in summary["layers"]]
    for name, label, colour in (
        ("cosine", "axis and first component", svg.VECTOR),
        ("axis_halves", "axes of two halves", svg.INK),
        ("role_halves", "roles of two halves", svg.MUTED),
    ):
        known = [each for each in summary["layers"] if each[name] is not None]
        if not known:
            continue
        at, found = [each["layer"] for each in known], [each[name] for each in known]
        axes.fill_between(
            at, [e["low"] for e in found], [e["high"] for e in found], color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(at, [e["mean"] for e in found], color=colour, label=label, zorder=4)
        nulls = [each[f"{name}_null"] for each in known]
        axes.plot(at, nulls, color=colour, linestyle=svg.DOTS, linewidth=1.5, zorder=3)
    axes.set(xlabel="layer", title="Cosine; dotted, what 95% of permuted labels stay below", ylim=(-0.1, 1.02))
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    svg.mark_layer(axes, summary["layer"])
    svg.legend(figure, axes)
    return figure


def traits_figure(summary: Summary, width: int) -> Figure:
    """Cosine of each trait's vector with the axis, by layer, beside random directions."""
    figure, axes = svg.panel(width, 360, 320)
    chance, count = 2 * summary["chance"], len(summary["layers"])
    axes.fill_between([0, count - 1], [-chance] * 2, [chance] * 2, color=svg.RANDOM, alpha=0.2, linewidth=0)
    for trait in summary["traits"]:
        points = [(layer, value) for layer, value in enumerate(trait["axis"]) if value is not None]
        axes.plot(*zip(*points, strict=True), label=trait["trait"])
    axes.axhline(0, **svg.ZERO)
    axes.set(xlabel="layer", title="Cosine with the axis; the band holds 95% of random directions")
    svg.legend(figure, axes)
    return figure

"""The report's figures, each drawn for a wide page and for a phone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.reports import svg
from persona_lens.reports.page import bounds, interval, number, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REDUCTIONS = {
    "response_mean": "response tokens, mean",
    "prompt_mean": "prompt tokens, mean",
    "prompt_last": "last prompt token",
}

Summary = Mapping[str, Any]


@svg.figures
def draw_figures(summary: Summary) -> Iterator[svg.Drawing]:
    """Every figure that the summary has something to draw for."""
    extraction, choice, steering = summary["extraction"], summary.get("layer_choice"), summary["steering"]
    layer, moved = steering["layer"], steering["effect"]
    yield svg.draw("effect", "Effect of steering", _effect_words(moved), effect_figure, moved)
    yield svg.draw("curve", "Steering curve", _curve_words(steering), curve_figure, steering["curves"], choice)
    if choice:
        yield svg.draw("choice", "Effect by layer", _choice_words(choice), choice_figure, choice)
    norms, separation = extraction["norms"], extraction["separation"]
    if any(norms.get(name) for name in REDUCTIONS):
        yield svg.draw("norms", "Vector length by layer", _norm_words(norms), norm_figure, norms, layer)
    if separation:
        words = _separation_words(separation, layer)
        yield svg.draw("separation", "Separation by layer", words, separation_figure, separation, layer)


def effect_figure(effect: Mapping[str, Any], width: int) -> Figure:
    """The effect with its interval, beside that of random directions and their difference."""
    rows = [
        (label, effect[key], style)
        for label, key, style in (
            ("Trait vector", "vector", svg.LINE),
            ("Random directions", "random", svg.NULL),
            ("Vector minus random", "difference", {"marker": "D", "color": svg.INK}),
        )
        if effect[key] is not None
    ]
    figure, axes = svg.panel(width, 56 + 52 * len(rows))
    axes.axvline(0, color=svg.MUTED, linewidth=1.5)
    for place, (label, estimate, style) in enumerate(rows):
        axes.errorbar(
            estimate["mean"], -place, xerr=svg.reach([estimate]), markersize=8, linewidth=0, **style, **svg.BAR
        )
        if width == svg.NARROW:
            text = axes.text(0, 0.36 - place, f"{label}: {bounds(estimate)}", transform=axes.get_yaxis_transform())
            text.set_bbox({"facecolor": svg.PAPER, "edgecolor": "none", "pad": 2})
    ends = [0.0, *(estimate[end] for _, estimate, _ in rows for end in ("low", "high"))]
    pad = 0.05 * (max(ends) - min(ends)) or 1.0
    axes.set(
        xlim=(min(ends) - pad, max(ends) + pad),
        ylim=(-len(rows) + 0.6, 0.75),
        yticks=[],
        xlabel="change in mean trait score, points",
    )
    if width == svg.WIDE:
        axes.set_yticks([-i for i in range(len(rows))], [f"{label}\n{bounds(found)}" for label, found, _ in rows])
        axes.tick_params(axis="y", labelcolor=svg.INK, pad=12)
        axes.grid(False)
    axes.xaxis.set_major_formatter(lambda value, _: signed(round(value, 6)))
    return figure


def curve_figure(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], choice: Mapping[str, Any] | None, width: int
) -> Figure:
    """Score against coefficient, and below it the surprise, with intervals and the null."""
    figure = svg.new_figure(width, 500 if width == svg.WIDE else 470)
    score, surprise = figure.subplots(2, 1, sharex=True, height_ratios=[2.3, 1])
    for axes, quantity in ((score, "score"), (surprise, "surprise")):
        for kind, style in (("random", svg.NULL), ("vector", svg.LINE)):
            points = curves.get(kind) or []
            if points:
                label = svg.VECTOR_LABEL if kind == "vector" else svg.RANDOM_LABEL
                svg.line_with_intervals(axes, points, quantity, style, label)
    score.set(title="Mean trait score, 0 to 100", ylim=(0, 100), yticks=range(0, 101, 20))
    score.axvline(0, color=svg.GRID, linewidth=1, zorder=0)
    surprise.axvline(0, color=svg.GRID, linewidth=1, zorder=0)
    surprise.set(title="Surprise, nats per token", xlabel="steering coefficient")
    plain = [p["surprise"]["mean"] for p in curves["vector"] if p["coefficient"] == 0]
    if choice and plain:
        limit = plain[0] + choice["margin"]
        surprise.axhline(limit, color=svg.MUTED, linewidth=1.5, linestyle=svg.DOTS)
        svg.note(surprise, (0.99, limit), "margin of coherence", (0, 4), ha="right")
        surprise.margins(y=0.25)
    coefficients = [p["coefficient"] for p in curves["vector"]]
    surprise.set_xticks(coefficients, [signed(c) for c in coefficients])
    svg.legend(figure, score)
    return figure


def choice_figure(choice: Mapping[str, Any], width: int) -> Figure:
    """Effect at each layer tried; filled where the text stays coherent."""
    figure, axes = svg.panel(width, 330)
    limit = choice["unsteered_surprise"] + choice["margin"]
    labels = {True: "text stays coherent", False: "text too surprising"}
    for coherent in (True, False):
        rows = [row for row in choice["layers"] if (row["surprise"] <= limit) == coherent]
        if rows:
            effects = [row["effect"]["vector"] for row in rows]
            style = {"marker": "o", "color": svg.VECTOR, "markerfacecolor": svg.VECTOR if coherent else svg.PAPER}
            svg.points_with_intervals(axes, [row["layer"] for row in rows], effects, style, labels[coherent])
    nulls = [(row["layer"], row["effect"]["random"]) for row in choice["layers"] if row["effect"]["random"]]
    if nulls:
        svg.points_with_intervals(
            axes,
            [layer for layer, _ in nulls],
            [null for _, null in nulls],
            {**svg.NULL, "linestyle": ""},
            svg.RANDOM_LABEL,
        )
    layers = [row["layer"] for row in choice["layers"]]
    axes.axhline(0, color=svg.MUTED, linewidth=1.5)
    axes.set(title="Effect on trait score, points", xlabel="layer steered")
    axes.set_xlim(min(layers) - 1, max(layers) + 1)
    axes.set_xticks(layers if len(layers) <= 12 else layers[:: len(layers) // 8])
    axes.margins(y=0.18)
    svg.mark_layer(axes, choice["chosen"])
    svg.legend(figure, axes)
    return figure


def norm_figure(norms: Mapping[str, Sequence[float]], chosen: int, width: int) -> Figure:
    """Length of the vector at each layer, one line a reduction."""
    figure, axes = svg.panel(width, 330, 360)
    styles = [(svg.VECTOR, "solid"), (svg.THIRD, (0, (6, 2))), (svg.RANDOM, (0, (2, 2)))]
    for (name, label), (colour, dashes) in zip(REDUCTIONS.items(), styles, strict=True):
        if norms.get(name):
            axes.plot(range(len(norms[name])), norms[name], color=colour, linestyle=dashes, label=label)
    axes.set(title="Length of the vector, residual-stream units", xlabel="layer")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    svg.mark_layer(axes, chosen)
    svg.legend(figure, axes, columns=3 if width == svg.WIDE else 1)
    return figure


def separation_figure(rows: Sequence[Mapping[str, Any]], chosen: int, width: int) -> Figure:
    """How far apart the two kinds of response are on the vector, by layer: d' and AUC."""
    figure = svg.new_figure(width, 340 if width == svg.WIDE else 560)
    panels = figure.subplots(*((1, 2) if width == svg.WIDE else (2, 1)))
    layers = [row["layer"] for row in rows]
    for axes, key, title, chance in (
        (panels[0], "d_prime", "d′, standard deviations apart", 0.0),
        (panels[1], "auc", "AUC, pairs in the right order", 0.5),
    ):
        axes.axhline(chance, color=svg.MUTED, linewidth=1.5)
        axes.plot(layers, [row[key] for row in rows], color=svg.VECTOR, label=svg.VECTOR_LABEL, zorder=4)
        axes.plot(
            layers,
            [row[f"random_{key}"] for row in rows],
            color=svg.RANDOM,
            linestyle=svg.DASHES,
            label="19 of 20 random directions",
        )
        axes.set(title=title, xlabel="layer")
        axes.margins(x=0.02, y=0.15)
        if key == "auc":
            axes.set_ylim(min(0.4, *axes.get_ylim()), 1.04)
        svg.mark_layer(axes, chosen)
    svg.legend(figure, panels[0])
    return figure


def _effect_words(effect: Mapping[str, Any]) -> str:
    names = (("vector", "Trait vector"), ("random", "random directions"), ("difference", "vector minus random"))
    found = [f"{label} {interval(effect[key], sign=True)}" for key, label in names if effect[key]]
    return f"Changes of the mean trait score. {'; '.join(found)}."


def _curve_words(steering: Mapping[str, Any]) -> str:
    sentences = []
    for kind, label in (("vector", svg.VECTOR_LABEL), ("random", svg.RANDOM_LABEL)):
        points = steering["curves"].get(kind) or []
        listed = ", ".join(f"{number(p['score']['mean'])} at {signed(p['coefficient'])}" for p in points)
        if listed:
            sentences.append(f"Mean trait score along the {label}: {listed}.")
    return " ".join(sentences)


def _choice_words(choice: Mapping[str, Any] | None) -> str:
    rows = choice["layers"] if choice else []
    listed = "; ".join(f"layer {row['layer']} {bounds(row['effect']['vector'], sign=True)}" for row in rows)
    return f"Effect of steering with 95% intervals: {listed}."


def _norm_words(norms: Mapping[str, Sequence[float]]) -> str:
    listed = "; ".join(
        f"{label} from {number(values[0], 2)} at layer 0 to {number(values[-1], 2)} at layer {len(values) - 1}, "
        f"largest {number(max(values), 2)} at layer {max(range(len(values)), key=values.__getitem__)}"
        for name, label in REDUCTIONS.items()
        if (values := norms.get(name))
    )
    return f"Vector length: {listed}."


def _separation_words(rows: Sequence[Mapping[str, Any]], chosen: int) -> str:
    at = next((row for row in rows if row["layer"] == chosen), rows[-1] if rows else None)
    if at is None:
        return ""
    best = max(rows, key=lambda row: float(row["auc"]))
    return (
        f"At layer {at['layer']} the trait vector has d′ {number(at['d_prime'], 2)} and AUC {number(at['auc'], 2)}, "
        f"19 of 20 random directions at most {number(at['random_d_prime'], 2)} and {number(at['random_auc'], 2)}. "
        f"The largest AUC is "
        f"{number(best['auc'], 2)}, at layer {best['layer']}."
    )

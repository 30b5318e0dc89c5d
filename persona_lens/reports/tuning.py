"""The heat maps and figures of a tuning run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persona_lens.reports import svg
from persona_lens.reports.page import bounds, number, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
Value = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A layer and a strength.

    Attributes:
        layer: Block index.
        coefficient: Multiple of the raw vector.
        push: Length of the step over that of the residual.
        value: Change of the trait score with its interval; None if no response has a score.
        shade: How full the colour is, 0 to 100.
        side: ``more``, ``less`` or nothing: which colour.
        fallen: Whether the text falls apart here.
        chosen: Whether this is the place that was taken.
    """

    layer: int
    coefficient: float
    push: float
    value: Value | None
    shade: int
    side: str
    fallen: bool
    chosen: bool


@dataclass(frozen=True)
class HeatMap:
    """One table.

    Attributes:
        pushes: The columns: strengths that were asked for.
        rows: Each layer's cells, None where there is none.
    """

    pushes: tuple[float, ...]
    rows: tuple[tuple[int, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class HeatMaps:
    """What steering does, and what random directions of the same length do, in the same colours.

    Attributes:
        limit: Change of the score at which the colour is fullest, in either direction.
        vector: Along the trait vector.
        random: Along random directions; None without them.
    """

    limit: float
    vector: HeatMap
    random: HeatMap | None


def heat_maps(summary: Summary) -> HeatMaps:
    """Both heat maps of a summary's surface."""
    effects = [point["effect"] for point in summary["surface"] if point["effect"]]
    values = [effect[key]["mean"] for effect in effects for key in ("change", "random") if effect[key]]
    limit = max([1.0, *map(abs, values)])
    null = any(effect["random"] for effect in effects)
    return HeatMaps(limit, _heat_map(summary, "change", limit), _heat_map(summary, "random", limit) if null else None)


def _heat_map(summary: Summary, key: str, limit: float) -> HeatMap:
    pushes = tuple(sorted(summary["settings"]["pushes"]))
    rows = []
    for layer in sorted({point["layer"] for point in summary["surface"]}):
        points = [point for point in summary["surface"] if point["layer"] == layer]
        found: list[Cell | None] = [None] * len(pushes)
        for point, column in zip(points, _columns(points, pushes), strict=True):
            found[column] = _cell(point, summary["chosen"], key, limit)
        rows.append((layer, tuple(found)))
    return HeatMap(pushes, tuple(rows))


def _columns(points: Sequence[Mapping[str, Any]], pushes: Sequence[float]) -> list[int]:
    """The column of each point. Its push is the one asked for but for the rounding of its coefficient."""
    free = list(range(len(pushes)))
    columns = []
    for point in points:
        column = min(free, key=lambda i: abs(pushes[i] - point["push"]))
        free.remove(column)
        columns.append(column)
    return columns


def _cell(point: Mapping[str, Any], chosen: Mapping[str, Any], key: str, limit: float) -> Cell:
    value = point["effect"][key] if point["effect"] else None
    mean = value["mean"] if value else 0.0
    return Cell(
        layer=point["layer"],
        coefficient=point["coefficient"],
        push=point["push"],
        value=value,
        shade=round(100 * abs(mean) / limit),
        side="more" if mean > 0 else "less" if mean < 0 else "",
        fallen=key == "change" and not point["coherent"],
        chosen=(point["layer"], point["coefficient"]) == (chosen["layer"], chosen["coefficient"]),
    )


Point = Mapping[str, Any]
MEASURED = {"surprise": "surprise, nats per token", "coherence": "coherence, 0 to 100"}
_NOTHING = {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 1}


@svg.figures
def draw_tuning(summary: Summary) -> Iterator[svg.Drawing]:
    """Every figure that the summary has something to draw for."""
    curve = curve_points(summary)
    if len(curve["vector"]) > 1:
        yield svg.draw("curve", "Steering curve", _curve_words(curve), curve_figure, curve, summary)
    beside = [point for point in summary["surface"] if point["effect"] and point["effect"][summary["measured"]]]
    if beside:
        words = _tradeoff_words(beside, summary)
        yield svg.draw("tradeoff", "Effect against what it costs", words, tradeoff_figure, beside, summary)
    everything = summary.get("capability") or []
    named = zip(names_of_arms(everything), everything, strict=True)
    capability = [(name, each) for name, each in named if each["accuracy"] and each["score"]]
    if capability:
        words = _capability_words(capability)
        yield svg.draw("capability", "Trait against capability", words, capability_figure, capability)
    yield svg.draw("norms", "Lengths by layer", _norm_words(summary), norm_figure, summary)


def curve_points(summary: Summary) -> dict[str, list[dict[str, Any]]]:
    """Changes, and surprise or coherence, by coefficient at the chosen layer; 0 among them, where nothing changes."""
    measured, plain = summary["measured"], summary["unsteered"]["confirm"]
    found: dict[str, list[dict[str, Any]]] = {"vector": [], "random": []}
    for point in summary["curve"]:
        effect = point["effect"]
        for kind, key in (("vector", "change"), ("random", "random")):
            if effect and effect[key]:
                beside = effect[measured] if kind == "vector" else None
                found[kind].append({"coefficient": point["coefficient"], "change": effect[key], measured: beside})
    for points in found.values():
        if points:
            points.append({"coefficient": 0.0, "change": _NOTHING, measured: plain[measured]})
            points.sort(key=lambda point: float(point["coefficient"]))
    return found


def curve_figure(curve: Mapping[str, Sequence[Point]], summary: Summary, width: int) -> Figure:
    """Change of the score against the coefficient with the null, and below it surprise or coherence with its limit."""
    measured = summary["measured"]
    figure = svg.new_figure(width, 520 if width == svg.WIDE else 490)
    score, cost = figure.subplots(2, 1, sharex=True, height_ratios=[2.1, 1])
    for kind, style, label in (("random", svg.NULL, svg.RANDOM_LABEL), ("vector", svg.LINE, svg.VECTOR_LABEL)):
        if curve[kind]:
            svg.line_with_intervals(score, curve[kind], "change", style, label)
    known = [point for point in curve["vector"] if point[measured]]
    if known:
        svg.line_with_intervals(cost, known, measured, svg.LINE, svg.VECTOR_LABEL)
    score.axhline(0, color=svg.MUTED, linewidth=1.5, zorder=1)
    score.set(title="Change of the mean trait score, points")
    score.margins(y=0.12)
    score.yaxis.set_major_formatter(lambda value, _: number(value, 0, sign=True))
    cost.set(title=MEASURED[measured].capitalize(), xlabel="steering coefficient")
    limit = summary["unsteered"]["confirm"]["limit"]
    if limit is not None:
        cost.axhline(limit, color=svg.MUTED, linewidth=1.5, linestyle=svg.DOTS)
        # At the unsteered end of the axis, where the line of the curve is furthest from the limit.
        words = "text falls apart beyond" if measured == "surprise" else "text falls apart below"
        left, above = summary["towards"] == "more", measured == "surprise"
        ends = {"ha": "left" if left else "right", "va": "bottom" if above else "top"}
        box = {"facecolor": svg.PAPER, "edgecolor": "none", "pad": 1}
        svg.note(cost, (0.01 if left else 0.99, limit), words, (0, 4 if above else -4), **ends, bbox=box)
        cost.margins(y=0.3)
    cost.xaxis.set_major_formatter(lambda value, _: signed(round(value, 6)))
    for axes in (score, cost):
        axes.axvline(0, color=svg.GRID, linewidth=1, zorder=0)
        axes.axvline(summary["chosen"]["coefficient"], color=svg.MUTED, linewidth=1.5, linestyle=svg.DOTS, zorder=1)
    svg.legend(figure, score)
    return figure


def tradeoff_figure(points: Sequence[Point], summary: Summary, width: int) -> Figure:
    """Change of the score against surprise or coherence, one dot a place."""
    measured, plain = summary["measured"], summary["unsteered"]["search"]
    figure, axes = svg.panel(width, 400, 380)
    axes.axhline(0, color=svg.MUTED, linewidth=1.5, zorder=1)
    for coherent, label in ((True, "text holds together"), (False, "text falls apart")):
        some = [point for point in points if point["coherent"] == coherent]
        style: dict[str, Any] = {
            "marker": "o",
            "color": svg.VECTOR,
            "markerfacecolor": svg.VECTOR if coherent else svg.PAPER,
        }
        if some:
            xs, ys = zip(*(_at(point, measured) for point in some), strict=True)
            axes.plot(xs, ys, markersize=8, linestyle="", label=label, zorder=3, **style)
    taken = [point for point in points if _is_chosen(point, summary)]
    if taken:
        x, y = _at(taken[0], measured)
        bars: dict[str, Any] = {
            "yerr": svg.reach([taken[0]["effect"]["change"]]),
            "xerr": svg.reach([taken[0]["effect"][measured]]),
        }
        style = {"marker": "o", "color": svg.INK, "markerfacecolor": "none", "markeredgewidth": 2}
        axes.errorbar([x], [y], **bars, markersize=15, linestyle="", label="chosen", zorder=4, **style, **svg.BAR)
    if plain[measured]:
        axes.plot(
            [plain[measured]["mean"]], [0], marker="D", color=svg.INK, linestyle="", markersize=8, label="unsteered"
        )
    if plain["limit"] is not None:
        axes.axvline(plain["limit"], color=svg.MUTED, linewidth=1.5, linestyle=svg.DOTS, zorder=1)
    axes.set(title="Change of the mean trait score, points", xlabel=MEASURED[measured])
    axes.margins(x=0.08, y=0.12)
    axes.grid(True, axis="both")
    axes.yaxis.set_major_formatter(lambda value, _: number(value, 0, sign=True))
    svg.legend(figure, axes, columns=4)
    return figure


def norm_figure(summary: Summary, width: int) -> Figure:
    """Lengths of the residual and of the vector at each layer, on a logarithmic scale."""
    figure, axes = svg.panel(width, 330, 350)
    styles = (
        ("residual_norms", "residual", svg.RANDOM, (0, (6, 2))),
        ("vector_norms", svg.VECTOR_LABEL, svg.VECTOR, "solid"),
    )
    for key, label, colour, dashes in styles:
        known = [(layer, value) for layer, value in enumerate(summary[key]) if value > 0]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, linestyle=dashes, label=label)
    axes.set(title="Mean length, residual-stream units", xlabel="layer", yscale="log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(axis="y", which="minor", size=0)
    axes.margins(x=0.02)
    svg.mark_layer(axes, summary["chosen"]["layer"])
    svg.legend(figure, axes)
    return figure


def names_of_arms(capability: Sequence[Mapping[str, Any]]) -> list[str]:
    """How each arm is named in the figure: by its coefficient, or else by its number in the table."""
    return [
        f"#{place}" if (coefficient := each.get("coefficient")) is None else signed(coefficient)
        for place, each in enumerate(capability, start=1)
    ]


def capability_figure(capability: Sequence[tuple[str, Mapping[str, Any]]], width: int) -> Figure:
    """Trait score against accuracy, one dot an arm, with both intervals."""
    figure, axes = svg.panel(width, 380, 360)
    accuracies, scores = [each["accuracy"] for _, each in capability], [each["score"] for _, each in capability]
    means = [estimate["mean"] for estimate in accuracies]
    svg.points_with_intervals(axes, means, scores, svg.LINE, svg.VECTOR_LABEL)
    axes.errorbar(
        means, [s["mean"] for s in scores], xerr=svg.reach(accuracies), linestyle="", color=svg.VECTOR, **svg.BAR
    )
    for (name, _), x, score in zip(capability, means, scores, strict=True):
        axes.annotate(name, (x, score["mean"]), (8, 8), textcoords="offset points", color=svg.INK, fontsize=12)
    axes.set(title="Mean trait score, 0 to 100", xlabel="accuracy, share of right answers")
    axes.margins(x=0.12, y=0.15)
    axes.grid(True, axis="both")
    return figure


def _at(point: Point, measured: str) -> tuple[float, float]:
    return float(point["effect"][measured]["mean"]), float(point["effect"]["change"]["mean"])


def _is_chosen(point: Point, summary: Summary) -> bool:
    return all(point[key] == summary["chosen"][key] for key in ("layer", "coefficient"))


def _curve_words(curve: Mapping[str, Sequence[Point]]) -> str:
    sentences = []
    for kind, label in (("vector", svg.VECTOR_LABEL), ("random", svg.RANDOM_LABEL)):
        listed = ", ".join(
            f"{bounds(point['change'], sign=True)} at {signed(point['coefficient'])}"
            for point in curve[kind]
            if point["coefficient"]
        )
        if listed:
            sentences.append(f"Change of the mean trait score along the {label}: {listed}.")
    return " ".join(sentences)


def _tradeoff_words(points: Sequence[Point], summary: Summary) -> str:
    measured = summary["measured"]
    holding = sum(bool(point["coherent"]) for point in points)
    taken = [_at(point, measured) for point in points if _is_chosen(point, summary)]
    strongest = max(points, key=lambda point: abs(_at(point, measured)[1]))
    x, y = _at(strongest, measured)
    digits = 2 if measured == "surprise" else 1
    chosen = (
        f" The chosen place changes it by {number(taken[0][1], sign=True)} at {number(taken[0][0], digits)}."
        if taken
        else ""
    )
    return (
        f"Change of the mean trait score against {measured} at {len(points)} places, of which {holding} hold together. "
        f"The largest change, {number(y, sign=True)}, comes at a {measured} of {number(x, digits)}.{chosen}"
    )


def _capability_words(capability: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    listed = "; ".join(
        f"{name}: accuracy {bounds(each['accuracy'], 3)}, trait score {bounds(each['score'])}"
        for name, each in capability
    )
    return f"Trait score against accuracy with 95% intervals. {listed}."


def _norm_words(summary: Summary) -> str:
    at = summary["chosen"]["layer"]
    residual, vector = summary["residual_norms"], summary["vector_norms"]
    return (
        f"Mean length of the residual from {number(residual[0], 2)} at layer 0 to {number(residual[-1], 2)} at layer "
        f"{len(residual) - 1}; of the vector from {number(vector[0], 2)} to {number(vector[-1], 2)}. At layer {at}: "
        f"{number(residual[at], 2)} and {number(vector[at], 2)}."
    )

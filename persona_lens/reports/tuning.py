"""The page of a tuning run: what was found at every layer and strength, and what the chosen one does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.reports import svg
from persona_lens.reports.page import Headline, Steps, effect_headline, moves, number, over, resting_on, shell, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
Point = Mapping[str, Any]
MEASURED = {"nll": "surprise, nats per token", "coherence": "coherence, 0 to 100"}
_NOTHING = {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 1}


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary.

    Args:
        summary: JSON values as in the run's ``summary.json``; see `persona_lens.steering.tune`. It may also have
            ``capability``: a list of mappings with ``accuracy`` (0 to 1) and ``score`` (0 to 100), both means with
            their intervals or None, and ``coefficient``, or ``arm`` for what is not a coefficient at the chosen layer.
    """
    effects = [point["effect"] for point in summary["surface"] if point["effect"]]
    changes = [effect[key]["mean"] for effect in effects for key in ("change", "random") if effect[key]]
    beside = measured_places(summary)
    return {
        "race": summary.get("race"),
        "cost": summary.get("cost"),
        "strengths": columns(summary),
        "capability": named_arms(summary),
        "beside": beside,
        "largest": max(beside, key=lambda point: abs(_at(point, summary["measured"])[1]), default=None),
        "map": heat_map(summary),
        "strongest": max([1.0, *map(abs, changes)]),  # both maps are in the same colours
        "null": any(effect["random"] for effect in effects),
    }


@resting_on(over("held-out question", "confirm_questions"))
def headline(summary: Summary) -> Headline:
    """The effect of the chosen steering on the questions that it was not chosen on.

    The verdict is that of `persona_lens.core.statistics.verdict_of`, but ``unclear`` wherever the text falls apart.
    """
    effect, asked = summary["confirmed"], summary["confirm_questions"]
    if effect is None:
        title = "No result: no steered response to the questions kept for confirmation has a score"
        return Headline("unclear", title, ("What the search found on the other questions is not confirmed.",))
    plain = summary["unsteered"]["confirm"]["score"]
    doing, how = "the chosen steering", " that played no part in the choice, it changes"
    behind = f", from {number(plain['mean'])} unsteered" if plain else ""
    towards = -1 if summary["towards"] == "less" else 1
    found = effect_headline(effect, asked, doing, how, behind=behind, towards=towards)
    if held(summary):
        return found
    title = f"The text falls apart: {doing} {moves(effect['change'])}, but its answers no longer hold together"
    return Headline("unclear", title, (*found.sentences, "Scores of text that has fallen apart mean little."))


def next_steps(summary: Summary, folder: str) -> Steps:
    """What one may want to do next with the run's folder."""
    model, chosen = summary["model"]["model"], summary["chosen"]["steering"]
    return [
        (
            "Answer a prompt of your own with the choice and without it.",
            shell("persona-lens", "generate", model, folder, "How will my exam go?"),
        ),
        (
            "See what it costs on a test of capability.",
            shell("persona-lens", "steer", "capability", model, folder, "--edits", chosen),
        ),
        (
            "Measure what is usual for the model, for alarms while it answers.",
            shell("persona-lens", "monitor", "baseline", model, folder),
        ),
    ]


def held(summary: Summary) -> bool:
    """Whether the text holds together at the chosen place, on the questions searched and on the others."""
    chosen = summary["chosen"]
    same = [point for point in summary["curve"] if point["coefficient"] == chosen["coefficient"]]
    return bool(chosen["coherent"] and all(point["coherent"] for point in same if point["effect"]))


def heat_map(summary: Summary) -> list[tuple[int, list[Point | None]]]:
    """The points of each layer in the columns of their strengths, which go up; None where there is none."""
    strengths, rows = columns(summary), []
    for layer in sorted({point["layer"] for point in summary["surface"]}):
        row: list[Point | None] = [None] * len(strengths)
        for point in summary["surface"]:
            if point["layer"] == layer:
                # Its strength is the one asked for but for the rounding of its coefficient.
                free = [column for column, there in enumerate(row) if there is None]
                row[min(free, key=lambda column: abs(strengths[column] - point["strength"]))] = point
        rows.append((layer, row))
    return rows


def columns(summary: Summary) -> list[float]:
    """The strengths of the map: those that were tried, before coefficients were rounded."""
    return sorted(summary.get("strengths") or summary["settings"]["strengths"])


def figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    found: svg.Wanted = {}
    curve = curve_points(summary)
    if len(curve["vector"]) > 1:
        found["curve"] = (curve_figure, curve, summary)
    if beside := measured_places(summary):
        found["tradeoff"] = (tradeoff_figure, beside, summary)
    if capability := [each for each in named_arms(summary) if each["accuracy"] and each["score"]]:
        found["capability"] = (capability_figure, capability)
    return {**found, "norms": (norm_figure, summary)}


def measured_places(summary: Summary) -> list[Point]:
    """The places with both a score and a surprise or coherence."""
    return [point for point in summary["surface"] if point["effect"] and point["effect"][summary["measured"]]]


def named_arms(summary: Summary) -> list[Summary]:
    """What was tested for capability, with what each is called in the figure: its coefficient, or else its number."""
    arms = summary.get("capability") or []
    names = (each.get("coefficient") for each in arms)
    return [
        {**each, "name": f"#{place}" if name is None else signed(name)}
        for place, (each, name) in enumerate(zip(arms, names, strict=True), start=1)
    ]


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
    figure, (score, cost) = svg.panels(width, 520, 490, 2, sharex=True, height_ratios=[2.1, 1])
    for kind, style, label in (("random", svg.NULL, svg.RANDOM_LABEL), ("vector", svg.LINE, svg.VECTOR_LABEL)):
        if curve[kind]:
            svg.line_with_intervals(score, curve[kind], "change", style, label)
    known = [point for point in curve["vector"] if point[measured]]
    if known:
        svg.line_with_intervals(cost, known, measured, svg.LINE, svg.VECTOR_LABEL)
    score.axhline(0, **svg.ZERO)
    score.set(title="Change of the mean trait score, points")
    score.margins(y=0.12)
    score.yaxis.set_major_formatter(lambda value, _: number(value, 0, sign=True))
    cost.set(title=MEASURED[measured].capitalize(), xlabel="steering coefficient")
    limit = summary["unsteered"]["confirm"]["limit"]
    if limit is not None:
        cost.axhline(limit, **svg.DOTTED)
        # At the unsteered end of the axis, where the line of the curve is furthest from the limit.
        words = "text falls apart beyond" if measured == "nll" else "text falls apart below"
        left, above = summary["towards"] == "more", measured == "nll"
        ends = {"ha": "left" if left else "right", "va": "bottom" if above else "top"}
        box = {"facecolor": svg.PAPER, "edgecolor": "none", "pad": 1}
        svg.note(cost, (0.01 if left else 0.99, limit), words, (0, 4 if above else -4), **ends, bbox=box)
        cost.margins(y=0.3)
    cost.xaxis.set_major_formatter(lambda value, _: signed(round(value, 6)))
    for axes in (score, cost):
        axes.axvline(0, color=svg.GRID, linewidth=1, zorder=0)
        axes.axvline(summary["chosen"]["coefficient"], **svg.DOTTED)
    svg.legend(figure, score)
    return figure


def tradeoff_figure(points: Sequence[Point], summary: Summary, width: int) -> Figure:
    """Change of the score against surprise or coherence, one dot a place."""
    measured, plain = summary["measured"], summary["unsteered"]["search"]
    figure, axes = svg.panel(width, 400, 380)
    axes.axhline(0, **svg.ZERO)
    for coherent, label in ((True, "text holds together"), (False, "text falls apart")):
        some = [_at(point, measured) for point in points if point["coherent"] == coherent]
        style = {"color": svg.VECTOR, "markerfacecolor": svg.VECTOR if coherent else svg.PAPER, "zorder": 3}
        svg.dots(axes, some, style, label)
    for taken in (point["effect"] for point in points if _is_chosen(point, summary)):
        ring = {"color": svg.INK, "markerfacecolor": "none", "markeredgewidth": 2, "markersize": 15, "zorder": 4}
        svg.dots(axes, [(taken[measured], taken["change"])], ring, "chosen")
    if plain[measured]:
        svg.dots(axes, [(plain[measured]["mean"], 0)], {"marker": "D", "color": svg.INK}, "unsteered")
    if plain["limit"] is not None:
        axes.axvline(plain["limit"], **svg.DOTTED)
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


def capability_figure(capability: Sequence[Summary], width: int) -> Figure:
    """Trait score against accuracy, one dot an arm, with both intervals."""
    figure, axes = svg.panel(width, 380, 360)
    svg.dots(axes, [(each["accuracy"], each["score"]) for each in capability], svg.LINE, svg.VECTOR_LABEL)
    for each in capability:
        place = (each["accuracy"]["mean"], each["score"]["mean"])
        axes.annotate(each["name"], place, (8, 8), textcoords="offset points", color=svg.INK, fontsize=12)
    axes.set(title="Mean trait score, 0 to 100", xlabel="accuracy, share of right answers")
    axes.margins(x=0.12, y=0.15)
    axes.grid(True, axis="both")
    return figure


def _at(point: Point, measured: str) -> tuple[float, float]:
    return float(point["effect"][measured]["mean"]), float(point["effect"]["change"]["mean"])


def _is_chosen(point: Point, summary: Summary) -> bool:
    return all(point[key] == summary["chosen"][key] for key in ("layer", "coefficient"))

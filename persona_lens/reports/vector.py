"""The page of a vector, as a demonstration makes it: how it was found, at which layer it is used, what it does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from persona_lens.reports import svg
from persona_lens.reports.page import (
    MINUS,
    NONE,
    Headline,
    Steps,
    amount,
    bounds,
    counted,
    effect_headline,
    interval,
    resting_on,
    shell,
    signed,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REDUCTIONS = {
    "response_mean": "response tokens, mean",
    "prompt_mean": "prompt tokens, mean",
    "prompt_last": "last prompt token",
    "answer_mean": "answer tokens, mean",
    "thinking_mean": "thinking tokens, mean",
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Summary = Mapping[str, Any]


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary.

    Args:
        summary: JSON values as in the run's ``summary.json``: ``trait``, ``model``, ``command``, ``settings``,
            ``seed``, ``extraction``, ``layer_choice`` (None if the layer was given), ``steering``, ``samples`` (the
            first questions in their order, responses from the smallest coefficient to the largest), ``agreement`` and
            ``versions``.
    """
    choice, steering = summary.get("layer_choice"), summary["steering"]
    return {
        "layer_choice": choice,
        "layer_reason": layer_reason(choice) if choice else None,
        "agreement": [agreement_row(found) for found in summary["agreement"]],
        "sides": sides(steering["effect"]),
        "strained": strained(summary),
        "rises": rises(summary["samples"]),
        "reductions": REDUCTIONS,
    }


def next_steps(summary: Summary, folder: str) -> Steps:
    """What one may want to do next with the run's folder."""
    model, layer, vectors = summary["model"]["model"], summary["steering"]["layer"], f"{folder}/extraction"
    return [
        (
            "Answer a prompt of your own with the vector and without it.",
            shell("persona-lens", "generate", model, vectors, "How will my exam go?", "--layer", layer),
        ),
        (
            "Search layer and strength for the strongest effect while the text holds together.",
            shell("persona-lens", "steer", "tune", model, vectors),
        ),
        ("See whether prompts foretell the trait.", shell("persona-lens", "monitor", "study", model, vectors)),
    ]


def span_headline(effect: Summary, questions: int) -> Headline:
    """What going from the smallest coefficient to the largest does, in words."""
    span = f"from {signed(effect['low'])} to {signed(effect['high'])}"
    change = {**effect, "change": effect["vector"]}
    how = f", going {span} at layer {effect['layer']} changes"
    found = effect_headline(change, questions, f"steering {span}", how)
    return replace(found, sentences=(*found.sentences, *which_way(effect)))


def _as_steered(summary: Summary) -> str:
    return amount(summary["steering"]["questions"], "held-out question")


def headline(summary: Summary) -> Headline:
    """Of a demonstration, whose judge is that of its extraction."""
    steering = summary["steering"]
    told = resting_on(_as_steered)(lambda found: span_headline(steering["effect"], steering["questions"]))
    return told({**summary, "judge": summary["extraction"]["judge"]})


def sides(effect: Summary) -> list[tuple[str, float, Summary]]:
    """The two sides of an effect, each against the unsteered model: what it is called, its coefficient, the change.

    None of them where the model was steered to one side only, so that the effect is that side.
    """
    named = (("promotion", "high"), ("suppression", "low"))
    found = [(name, effect[end], change) for name, end in named if (change := effect.get(name))]
    return found if len(found) == len(named) else []


def which_way(effect: Summary) -> tuple[str, ...]:
    """How much of an effect is promotion and how much is suppression, in a sentence, where there are both."""
    found = sides(effect)
    if not found:
        return ()
    said = [
        f"{name} ({signed(coefficient)}) changes it by {interval(change['vector'], sign=True)}"
        + (f", random directions by {bounds(change['random'], sign=True)}" if change["random"] else "")
        for name, coefficient, change in found
    ]
    right = [name for (name, _, change), way in zip(found, (1, -1), strict=True) if change["clear"] == way]
    both = {0: "neither is clear by itself", 1: f"only the {''.join(right)} is clear by itself", 2: "both are clear"}
    return (f"Against the unsteered model, {'; '.join(said)}: {both[len(right)]}.",)


def strained(summary: Summary) -> list[tuple[float, float]]:
    """Coefficients at which steered text surprises the unsteered model by more than the margin; with the excess."""
    choice = summary.get("layer_choice")
    points = summary["steering"]["curves"]["vector"]
    plain = next((p["nll"]["mean"] for p in points if p["coefficient"] == 0), None)
    if choice is None or plain is None:
        return []
    excesses = [(p["coefficient"], p["nll"]["mean"] - plain) for p in points]
    return [(coefficient, excess) for coefficient, excess in excesses if excess > choice["margin"]]


def layer_reason(choice: Summary) -> str:
    """Why the layer was taken."""
    limit = choice["unsteered_nll"] + choice["margin"]
    coherent = [row for row in choice["layers"] if row["nll"] <= limit]
    chosen = choice["chosen"]
    if not coherent:
        least = min(choice["layers"], key=lambda row: row["nll"])["layer"]
        why = "it is the one with the least surprise" if least == chosen else "it was set"
        return f"At no layer does the text stay within the margin of coherence. Layer {chosen} was taken: {why}."
    best = max(coherent, key=lambda row: row["effect"]["vector"]["mean"])["layer"]
    among = f"the {len(coherent)} of {len(choice['layers'])} layers tried"
    if best == chosen:
        return f"Layer {chosen} was taken: among {among} whose text stays coherent it has the largest effect."
    return (
        f"Layer {chosen} was taken, though among {among} whose text stays coherent layer {best} has the largest effect."
    )


def rises(samples: list[Summary]) -> tuple[int, int]:
    """In how many of the samples the last response scores above the first, and how many have both scores."""
    ends = [(s["responses"][0]["score"], s["responses"][-1]["score"]) for s in samples if s["responses"]]
    scored = [(low, high) for low, high in ends if low is not None and high is not None]
    return sum(high > low for low, high in scored), len(scored)


def scientific(value: float | None) -> str:
    """A small number as ``1.2 × 10⁻⁷``."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}".replace("-", MINUS)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", MINUS)


def agreement_row(found: Summary) -> dict[str, Any]:
    """The checks of a backend, and what they come to.

    Returns:
        What is given, with ``verdict``, in a few words; ``passed``, whether every check held, None if none was made;
        ``tally``, how many held, of how many; and ``worst``, the largest measured error beside what is allowed, of the
        checks that allow any.
    """
    checks = found.get("checks") or []
    if not checks:
        verdict = "not installed" if found.get("missing") else "not checked"
        return {**found, "verdict": verdict, "passed": None, "tally": NONE, "worst": NONE}
    failed = sum(not check["passed"] for check in checks)
    measured = [c for c in checks if c["tolerance"] and c["measured"] is not None and math.isfinite(c["measured"])]
    worst = max(measured, key=lambda c: float(c["measured"] / c["tolerance"]), default=None)
    return {
        **found,
        "verdict": f"{counted(failed, 'check')} failed" if failed else "agrees",
        "passed": not failed,
        "tally": f"{len(checks) - failed} of {len(checks)}",
        "worst": f"{scientific(worst['measured'])} of {scientific(worst['tolerance'])}" if worst else NONE,
    }


def figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    extraction, choice, steering = summary["extraction"], summary.get("layer_choice"), summary["steering"]
    norms, separation, layer = extraction["norms"], extraction["separation"], steering["layer"]
    found: svg.Wanted = {
        "effect": (effect_figure, steering["effect"]),
        "curve": (curve_figure, steering["curves"], choice),
    }
    if choice:
        found["choice"] = (choice_figure, choice)
    if any(norms.get(name) for name in REDUCTIONS):
        found["norms"] = (norm_figure, norms, layer)
    if separation:
        found["separation"] = (separation_figure, separation, layer)
    return found


def effect_figure(effect: Summary, width: int) -> Figure:
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
    axes.axvline(0, **svg.ZERO)
    for place, (label, estimate, style) in enumerate(rows):
        svg.dots(axes, [(estimate, -place)], style)
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


def curve_figure(curves: Mapping[str, Sequence[Summary]], choice: Summary | None, width: int) -> Figure:
    """Score against coefficient, and below it the surprise, with intervals and the null."""
    figure, (score, nll) = svg.panels(width, 500, 470, 2, sharex=True, height_ratios=[2.3, 1])
    for axes, quantity in ((score, "score"), (nll, "nll")):
        for kind, style in (("random", svg.NULL), ("vector", svg.LINE)):
            points = [point for point in curves.get(kind) or () if point[quantity]]  # not every judge tells of surprise
            if points:
                label = svg.VECTOR_LABEL if kind == "vector" else svg.RANDOM_LABEL
                svg.line_with_intervals(axes, points, quantity, style, label)
    score.set(title="Mean trait score, 0 to 100", ylim=(0, 100), yticks=range(0, 101, 20))
    score.axvline(0, color=svg.GRID, linewidth=1, zorder=0)
    nll.axvline(0, color=svg.GRID, linewidth=1, zorder=0)
    nll.set(title="Surprise, nats per token", xlabel="steering coefficient")
    plain = [p["nll"]["mean"] for p in curves["vector"] if p["coefficient"] == 0 and p["nll"]]
    if choice and plain:
        limit = plain[0] + choice["margin"]
        nll.axhline(limit, **svg.DOTTED)
        svg.note(nll, (0.99, limit), "margin of coherence", (0, 4), ha="right")
        nll.margins(y=0.25)
    coefficients = [p["coefficient"] for p in curves["vector"]]
    nll.set_xticks(coefficients, [signed(c) for c in coefficients])
    svg.legend(figure, score)
    return figure


def choice_figure(choice: Summary, width: int) -> Figure:
    """Effect at each layer tried; filled where the text stays coherent."""
    figure, axes = svg.panel(width, 330)
    limit = choice["unsteered_nll"] + choice["margin"]
    labels = {True: "text stays coherent", False: "text too surprising"}
    for coherent in (True, False):
        rows = [row for row in choice["layers"] if (row["nll"] <= limit) == coherent]
        style = {"color": svg.VECTOR, "markerfacecolor": svg.VECTOR if coherent else svg.PAPER}
        svg.dots(axes, [(row["layer"], row["effect"]["vector"]) for row in rows], style, labels[coherent])
    nulls = [(row["layer"], row["effect"]["random"]) for row in choice["layers"] if row["effect"]["random"]]
    svg.dots(axes, nulls, {**svg.NULL, "linestyle": ""}, svg.RANDOM_LABEL)
    layers = [row["layer"] for row in choice["layers"]]
    axes.axhline(0, **svg.ZERO)
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
    styles += [(svg.VECTOR, (0, (6, 2))), (svg.VECTOR, (0, (2, 2)))]
    for (name, label), (colour, dashes) in zip(REDUCTIONS.items(), styles, strict=True):
        if norms.get(name):
            axes.plot(range(len(norms[name])), norms[name], color=colour, linestyle=dashes, label=label)
    axes.set(title="Length of the vector, residual-stream units", xlabel="layer")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    svg.mark_layer(axes, chosen)
    svg.legend(figure, axes, columns=3 if width == svg.WIDE else 1)
    return figure


def separation_figure(rows: Sequence[Summary], chosen: int, width: int) -> Figure:
    """How far apart the two kinds of response are on the vector, by layer: d' and AUC."""
    figure, panels = svg.panels(width, 340, 560, *((1, 2) if width == svg.WIDE else (2, 1)))
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

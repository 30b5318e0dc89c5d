"""What sweeps and comparisons come to: headlines, and changes beside those of random directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import counted
from persona_lens.reports import svg, vector
from persona_lens.reports.page import Headline, bounds, effect_headline, over, resting_on, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]


def _swept(summary: Summary) -> Summary | None:
    return next((each for each in summary["layers"] if each["layer"] == summary["chosen"]), None)


@resting_on(over("held-out question", "questions"))
def sweep_headline(summary: Summary) -> Headline:
    """In words no stronger than what was measured."""
    found = _swept(summary)
    if found is None:
        return Headline("unclear", "No result: at no layer do responses at both ends have scores", ())
    told = vector.span_headline(found["effect"], summary["questions"])
    if len(summary["layers"]) == 1:
        return told
    chosen = f"Of {len(summary['layers'])} layers it is the one with the largest effect, which flatters it a little."
    return Headline(told.verdict, told.title, (*told.sentences, chosen))


def sweep_figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    found = _swept(summary)
    wanted: svg.Wanted = {}
    if found is not None:
        wanted["curve"] = (vector.curve_figure, found["curves"], None)
    layers = [each for each in summary["layers"] if each["effect"]]
    if len(layers) > 1:
        rows = [(f"layer {each['layer']}", each["effect"]["vector"], each["effect"]["random"]) for each in layers]
        wanted["layers"] = (changes_figure, rows)
    return wanted


# Comparison


@resting_on(over("held-out question", "questions"))
def comparison_headline(summary: Summary) -> Headline:
    """In words no stronger than what was measured."""
    found = {name: each for name, each in summary["arms"].items() if each["effect"]}
    known = {name: each["effect"] for name, each in found.items() if "system" not in each}
    asked = tuple(
        f"{name}, a system prompt and no steering: {bounds(each['effect']['change'], sign=True)}."
        for name, each in found.items()
        if "system" in each
    )
    if not known:
        steered = any("system" not in each for each in summary["arms"].values())
        title = "No result: no steered response has a score" if steered else "Nothing was steered"
        return Headline("unclear", title, asked)
    if len(known) == 1:
        ((name, effect),) = known.items()
        told = effect_headline(effect, summary["questions"], name, "")
        return replace(told, sentences=(*told.sentences, *asked))
    told_of = tuple(
        f"{name}: {bounds(effect['change'], sign=True)}, random directions {bounds(effect['random'], sign=True)}."
        for name, effect in known.items()
    )
    clear = sum(bool(effect["clear"]) for effect in known.values())
    null = any(effect["random"] for effect in known.values())
    title = f"{clear} of {counted(len(known), 'steering')} clearly change{'s' if clear == 1 else ''} the trait score"
    return Headline("no null" if not null else "clear" if clear else "unclear", title, (*told_of, *asked))


def comparison_figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    known = {name: each["effect"] for name, each in summary["arms"].items() if each["effect"]}
    rows = [(name, effect["change"], effect["random"]) for name, effect in known.items()]
    return {"changes": (changes_figure, rows)} if rows else {}


def changes_figure(rows: Sequence[tuple[str, Summary, Summary | None]], width: int) -> Figure:
    """Changes of the trait score by name, each with its interval, beside those of random directions."""
    figure, axes = svg.panel(width, 110 + 34 * len(rows))
    svg.dots(axes, [(change, place - 0.12) for place, (_, change, _) in enumerate(rows)], svg.LINE, svg.VECTOR_LABEL)
    nulls = [(random, place + 0.12) for place, (*_, random) in enumerate(rows) if random]
    if nulls:
        svg.dots(axes, nulls, {**svg.NULL, "linestyle": ""}, svg.RANDOM_LABEL)
    axes.axvline(0, **svg.ZERO)
    axes.set(xlabel="change of the mean trait score, points", ylim=(-0.6, len(rows) - 0.4))
    svg.in_rows(axes, [name for name, *_ in rows])
    axes.xaxis.set_major_formatter(lambda value, _: signed(round(value, 6)))
    svg.legend(figure, axes)
    return figure

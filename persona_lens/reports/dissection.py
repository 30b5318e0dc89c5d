"""The page of a dissection: which features a vector is made of, where they are active, and what each does alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import counted
from persona_lens.reports import svg
from persona_lens.reports.page import Headline, Steps, amount, bounds, number, resting_on, shell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary, which is JSON values as in the run's ``summary.json``."""
    corpus = summary["corpus"]
    return {"places": {each["feature"]: each for each in corpus["features"]} if corpus else {}}


def figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    found: svg.Wanted = {"effects": (effect_figure, summary["steering"])} if summary["steering"] else {}
    return {**found, "pursuit": (pursuit_figure, summary["pursuit"])}


def _asked(summary: Summary) -> str:
    return amount(summary["settings"]["questions"], "held-out question") if summary["steering"] else ""


def next_steps(summary: Summary, _: str) -> Steps:
    """What one may want to do next."""
    model, layer = summary["model"]["model"], summary["layer"]
    return [
        (
            "See which tokens the vector promotes.",
            shell("persona-lens", "vectors", "lens", model, "VECTORS", "--layers", layer),
        ),
        (
            "See which attentions and MLPs write along it.",
            shell(
                "persona-lens", "vectors", "attribute", model, "VECTORS", "--layer", layer, "--prompt", "Will it rain?"
            ),
        ),
    ]


@resting_on(_asked)
def headline(summary: Summary) -> Headline:
    """The result in words, no stronger than the intervals allow.

    It is ``clear`` if a top feature stands out from the random ones, ``unclear`` if none does, ``no null`` if nothing
    was steered or nothing stands beside it.
    """
    steering = summary["steering"]
    if steering is None:
        return Headline("no null", "Nothing was steered: only directions were compared", ())
    effects = steering["effects"]
    top = [each for i in steering["top"] if (each := effects[f"feature_{i}"])]
    if not steering["random"] or not top:
        return Headline("no null", "The top features were steered with nothing to compare them with", ())
    outstanding = steering["stand_out"]
    best = max(top, key=lambda each: each["change"]["vector"]["mean"] * (1 if steering["coefficient"] > 0 else -1))
    change = best["change"]
    sentences = [
        f"Of the top features feature {best['feature']} changes the score most, by "
        f"{bounds(change['vector'], sign=True)}. Of {counted(len(steering['random']), 'random feature')} as long, "
        f"which change it by {bounds(change['random'], sign=True)} on average, {best['beyond']} move it less.",
    ]
    whole = effects.get("vector")
    if whole:
        sentences.append(f"The whole vector changes it by {bounds(whole['change']['vector'], sign=True)}.")
    if len(top) > 1 and outstanding:
        sentences.append(f"It is the best of {len(top)} that were tried, which flatters it a little.")
    if not outstanding:
        title = f"None of {counted(len(top), 'top feature')} stands out from the random features"
        return Headline("unclear", title, tuple(sentences))
    stand = "stands" if len(outstanding) == 1 else "stand"
    title = f"{len(outstanding)} of {counted(len(top), 'top feature')} {stand} out from the random features"
    return Headline("clear", title, tuple(sentences))


def pursuit_figure(pursuit: Mapping[str, Any], width: int) -> Figure:
    """Share of the squared length against the number of features."""
    figure, axes = svg.panel(width, 340, 330)
    counts = range(1, len(pursuit["shares"]) + 1)
    axes.plot(counts, [100 * share for share in pursuit["shares"]], color=svg.VECTOR, label=svg.VECTOR_LABEL)
    null = pursuit["random"]
    if null:
        at = [each["features"] for each in null]
        lows, highs = ([100 * pick(each["shares"]) for each in null] for pick in (min, max))
        axes.fill_between(at, lows, highs, color=svg.RANDOM, alpha=0.25, linewidth=0)
        means = [100 * sum(each["shares"]) / len(each["shares"]) for each in null]
        axes.plot(at, means, color=svg.RANDOM, linestyle=svg.NULL["linestyle"], label=svg.RANDOM_LABEL)
    axes.set(title="Share of the squared length, %", xlabel="features", ylim=(0, 102))
    axes.margins(x=0.02)
    svg.legend(figure, axes)
    return figure


def effect_figure(steering: Mapping[str, Any], width: int) -> Figure:
    """Change of the score with its interval: the vector, the top features, the random ones."""
    effects = steering["effects"]
    groups: list[tuple[str, Sequence[str], dict[str, Any]]] = [
        ("whole vector", ["vector"], {"marker": "D", "color": svg.INK}),
        ("top features", [f"feature_{i}" for i in steering["top"]], svg.LINE),
        ("random features", [f"feature_{i}" for i in steering["random"]], {**svg.NULL, "linestyle": ""}),
    ]
    figure, axes = svg.panel(width, 130 + 24 * sum(map(bool, effects.values())))
    rows: list[str] = []
    for label, names, style in groups:
        shown = [name for name in names if effects.get(name)]
        changes = (effects[name]["change"]["vector"] for name in shown)
        svg.dots(axes, [(change, place) for place, change in enumerate(changes, len(rows))], style, label)
        rows += [name.replace("_", " ") for name in shown]
    axes.axvline(0, **svg.ZERO)
    axes.set(xlabel="change of the mean trait score, points")
    svg.in_rows(axes, rows)
    axes.xaxis.set_major_formatter(lambda value, _: number(value, 0, sign=True))
    svg.legend(figure, axes)
    return figure

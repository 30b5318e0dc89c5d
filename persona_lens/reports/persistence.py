"""The page of conversations steered in several ways: curves by turn, and every two ways held against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import capital, counted, listed
from persona_lens.reports import svg
from persona_lens.reports.page import Headline, amount, bounds, number, resting_on, side, swapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
USUAL = "all"
"""The way that others are held against: what steering is elsewhere."""
BETTER = {"score": 1, "nll": -1, "coherence": 1, "capability": 1}
"""Which side of a difference is better."""
HOLDING = ("score", "nll", "coherence")
"""What steering is to keep: the trait, and the text."""
NAMES = {
    "score": "trait score",
    "nll": "surprise, nats a token",
    "coherence": "coherence",
    "capability": "right answers, probability a token",
    "projection": "projection",
}
DIGITS = {"score": 1, "nll": 2, "coherence": 1, "capability": 2, "projection": 1}
_LOST = {
    "score": "less of the trait",
    "nll": "more surprise",
    "coherence": "less coherence",
    "capability": "right answers less likely",
}
_WON = {
    "score": "more of the trait",
    "nll": "less surprise",
    "coherence": "more coherence",
    "capability": "right answers likelier",
}
WAYS = {
    "none": "not steered",
    "all": "added at every token, which stays in the history",
    "generated": "added where replies are generated, which stays in the history",
    "clean": "added where a reply is generated, finished turns read as if unsteered",
    "clean-all": "added at every token of the turn, finished turns read as if unsteered",
    "floor": "every token’s projection held at the target",
    "gated": "added at every token whose projection is short of the gate",
    "random": "as all, along random directions of the same length",
    "prompted": "asked for by a system prompt",
}


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary, which is JSON values as in the run's ``summary.json``."""
    return {
        "known_ways": WAYS,
        "names_of": NAMES,
        "digits": DIGITS,
        "measures": _measured(summary),
        "ways_held": _ways(summary),
    }


def _ways(summary: Summary) -> list[str]:
    return list(next(iter(summary["traits"].values()))["ways"])


def _measured(summary: Summary) -> list[str]:
    """What there is to hold ways against each other by."""
    ways = [way["end"] for trait in summary["traits"].values() for way in trait["ways"].values()]
    return [name for name in BETTER if any(way[name] for way in ways)]


def verdict(difference: Summary | None, measure: str, pair: Summary) -> str:
    """Which of two ways is better by a measure: only where the interval is clear of zero."""
    clear = side(difference) * BETTER[measure] if difference else 0
    return {1: f"{pair['one']} is better", -1: f"{pair['other']} is better"}.get(clear, "")


def _beside(pairs: Sequence[Summary], usual: str) -> Iterator[tuple[str, dict[str, tuple[int, Summary]]]]:
    """Each way with its differences from the usual one at the end, and on which side they are clear."""
    for pair in pairs:
        if usual not in (pair["one"], pair["other"]):
            continue
        turned = pair["other"] != usual
        way = pair["other"] if turned else pair["one"]
        found = {}
        for name in BETTER:
            if (difference := pair["end"][name]) is not None:
                shown = swapped(difference) if turned else difference
                found[name] = (side(shown) * BETTER[name], shown)
        yield way, found


def usual_way(summary: Summary) -> str | None:
    """The way that others are held against; None where there is only one."""
    pairs = summary["together"]
    if not pairs:
        return None
    return USUAL if any(USUAL in (pair["one"], pair["other"]) for pair in pairs) else pairs[0]["one"]


def _asked(summary: Summary) -> str:
    turns = counted(summary["settings"]["turns"], "turn")
    return f"{amount(summary['conversations'], 'conversation')} of {turns}"


@resting_on(_asked)
def headline(summary: Summary) -> Headline:
    """What holds better than the usual way, in words no stronger than the intervals allow.

    It is ``clear`` if some way clearly keeps more of the trait or of the text, and is clearly worse by nothing.
    """
    usual, last = usual_way(summary), summary["settings"]["last"]
    if usual is None:
        return Headline("unclear", "One way to steer was tried, with nothing to hold it against", _told(summary))
    over = "" if len(summary["traits"]) == 1 else f", over {counted(len(summary['traits']), 'trait')}"
    end = f"in the last {'turn' if last == 1 else counted(last, 'turn')}{over}"
    better, sentences = [], []
    for way, found in _beside(summary["together"], usual):
        won = [_WON[name] for name, (clear, _) in found.items() if clear > 0]
        lost = [_LOST[name] for name, (clear, _) in found.items() if clear < 0]
        kept = [_WON[name] for name in HOLDING if name in found and found[name][0] > 0]
        if kept and not lost:
            better.append(f"{way} ({' and '.join(kept)})")
        said = " and ".join(won) + (", but " if won and lost else "") + " and ".join(lost)
        values = "; ".join(
            f"{NAMES[name]} {bounds(each, DIGITS[name], sign=True, noun='conversation')}"
            for name, (_, each) in found.items()
        )
        sentences.append(f"{way} against {usual}: {said or 'nothing is clear'} ({values}).")
    if better:
        title = f"{listed(better)} {'hold' if len(better) > 1 else 'holds'} better than {usual} {end}"
    else:
        title = f"No way clearly keeps more than {usual} without losing something {end}"
    chance = "Of differences that are none, about one in twenty looks clear by chance."
    return Headline("clear" if better else "unclear", capital(title), (*_told(summary), *sentences, chance))


def _told(summary: Summary) -> tuple[str, ...]:
    """What became of adding everywhere, from the first turn to the end."""
    told = []
    for name, trait in summary["traits"].items():
        if (way := trait["ways"].get(USUAL)) is None or way["change"] is None:
            continue
        drift = bounds(way["drift"]["score"], sign=True, noun="conversation")
        strain = bounds(way["drift"]["nll"], 2, sign=True, noun="conversation")
        change = bounds(way["change"]["vector"], sign=True, noun="conversation")
        told.append(
            f"{name} ({trait['steering']}): at the end {USUAL} changes the score by {change}; since the first turn the "
            f"score has moved by {drift}, the surprise by {strain} nats a token."
        )
    return tuple(told)


# Figures


def figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    found: svg.Wanted = {}
    for place, (name, trait) in enumerate(summary["traits"].items()):
        for measure in ("score", "nll"):
            found[f"{measure}_{place}"] = (curves_figure, name, trait["ways"], measure)
    if (usual := usual_way(summary)) is not None:
        for measure in ("score", "nll"):
            rows = [(way, each[measure][1]) for way, each in _beside(summary["together"], usual) if measure in each]
            if rows:
                found[f"difference_{measure}"] = (differences_figure, rows, measure, usual)
    return found


def curves_figure(trait: str, ways: Mapping[str, Any], measure: str, width: int) -> Figure:
    """A panel for each way: its curve with its interval, beside the unsteered model and random directions."""
    shown = [way for way in ways if way not in ("none", "random")] or ["none"]
    columns = min(len(shown), 4 if width == svg.WIDE else 2)
    rows = -(-len(shown) // columns)
    height = 60 + 170 * rows
    figure, panels = svg.panels(width, height, height, rows, columns, sharex=True, sharey=True)
    for axes, way in zip(panels, shown, strict=False):
        if "none" in ways and way != "none":
            _curve(axes, ways["none"]["turns"], measure, {"color": svg.MUTED, "linestyle": svg.DOTS}, "not steered")
        if "random" in ways:
            _curve(axes, ways["random"]["turns"], measure, {**svg.NULL, "markersize": 3}, svg.RANDOM_LABEL)
        style = {"color": svg.VECTOR, "marker": "o", "markersize": 4, "zorder": 4}
        _curve(axes, ways[way]["turns"], measure, style, "steered so", band=True)
        axes.set_title(way, fontsize=12)
        axes.locator_params(axis="x", nbins=5, integer=True)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes in panels[max(len(shown) - columns, 0) : len(shown)]:
        axes.set_xlabel("turn")
        axes.xaxis.set_tick_params(labelbottom=True)
    panels[0].set_ylabel(NAMES[measure])
    svg.legend(figure, panels[0])
    return figure


def _curve(
    axes: Axes, turns: Sequence[Summary], measure: str, style: Mapping[str, Any], label: str, *, band: bool = False
) -> None:
    known = [(each["turn"], each[measure]) for each in turns if each[measure]]
    if not known:
        return
    x = [turn for turn, _ in known]
    if band:
        lows, highs = ([each[end] for _, each in known] for end in ("low", "high"))
        axes.fill_between(x, lows, highs, color=style["color"], alpha=0.16, linewidth=0)
    axes.plot(x, [each["mean"] for _, each in known], label=label, **style)


def differences_figure(rows: Sequence[tuple[str, Summary]], measure: str, usual: str, width: int) -> Figure:
    """How far each way is from the usual one at the end, conversation by conversation."""
    figure, axes = svg.panel(width, 90 + 34 * len(rows))
    svg.dots(axes, [(difference, place) for place, (_, difference) in enumerate(rows)], svg.LINE)
    axes.axvline(0, **svg.ZERO)
    axes.set(xlabel=f"{NAMES[measure]}: difference from {usual}, last turns", ylim=(-0.6, len(rows) - 0.4))
    svg.in_rows(axes, [way for way, _ in rows])
    axes.xaxis.set_major_formatter(lambda value, _: number(value, 1 if measure == "score" else 2, sign=True))
    return figure

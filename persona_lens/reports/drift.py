"""The page of a drift study: where replies stand turn by turn, what foretells it, and what a steering does to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from persona_lens.core.statistics import few
from persona_lens.core.text import counted
from persona_lens.reports import svg
from persona_lens.reports.page import (
    NONE,
    Headline,
    Steps,
    bounds,
    interval,
    measured,
    number,
    of_part,
    over,
    resting_on,
    shell,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
EVERY = "all"
MESSAGES = {"position": "where it stands", "change": "how far it moves"}
_COLOURS = (svg.VECTOR, svg.RANDOM, svg.THIRD, svg.MUTED)
_MARKERS = "osD^"
_MOST_LINES = 4  # more cannot be told apart


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary, which is JSON values as in the run's ``summary.json``."""
    return {"told": told(summary), "targets": MESSAGES, "last": summary["counts"]["turns"]}


def next_steps(summary: Summary, folder: str) -> Steps:
    """What one may want to do next with the run's folder."""
    model, trait = summary["model"]["model"], summary["gauges"][0]["trait"]
    again = shell("persona-lens", "monitor", "drift", model, "VECTORS", "--edits", f"{trait}@LAYER:floor(0)")
    read = shell("persona-lens", "monitor", "chat", model, "VECTORS")
    return [
        ("Say the same messages again under a steering, beside this.", again),
        ("Talk with the model yourself, and see where its traits stand.", read),
    ]


def null_range(found: Summary | None) -> str:
    """What shuffled messages reach: the middle 95%."""
    if found is None or found["low"] is None:
        return NONE
    return f"{number(found['low'], 2)} to {number(found['high'], 2)}"


@resting_on(over("conversation", "counts", "conversations"), judged=False)
def headline(summary: Summary) -> Headline:
    """In words no stronger than the intervals and the random directions allow; the first gauge makes the verdict."""
    first, turns = summary["gauges"][0], summary["counts"]["turns"]
    found = first["movement"][EVERY]
    said = [_moved(gauge, turns) for gauge in summary["gauges"][:4]]
    said += [_foretold(first["messages"])]
    said += [_replayed(first["name"], way, each[EVERY]) for way, each in first["replays"].items()]
    return Headline(found["verdict"], _title(first, turns), tuple(said))


def _title(gauge: Summary, turns: int) -> str:
    found, name = gauge["movement"][EVERY], gauge["name"]
    if found["onset"] is None:
        clear = [part for part, each in gauge["movement"].items() if part != EVERY and each["verdict"] == "clear"]
        where = f", though there is in {' and '.join(clear)}" if clear else ""
        return f"Over all conversations there is no clear drift along {name} at turn {turns}{where}"
    change = number(found["changes"][-1]["mean"], 2, sign=True)
    moved = f"along {name} from turn {found['onset']} on, {change} at turn {turns}"
    return {
        "clear": f"Replies drift {moved}",
        "no null": f"Replies drift {moved}, with nothing to compare it with",
    }.get(found["verdict"], f"Replies move {moved}, but no more than along random directions")


def _moved(gauge: Summary, turns: int) -> str:
    found = gauge["movement"][EVERY]
    change = found["changes"][-1]
    if change is None:
        return f"{gauge['name']}: no reply at turn {turns} can be compared with the first."
    beside = ""
    if found["size"] is not None:
        beside = f", {number(found['size'], 2, sign=True)} standard deviations"
        if found["random_size"] is not None:
            beside += f" (19 of 20 random directions stay below {number(found['random_size'], 2)})"
    parts = [
        f"{part} {bounds(each['changes'][-1], 2, sign=True, noun=None)}{_since(each['onset'])}"
        for part, each in gauge["movement"].items()
        if part != EVERY
    ]
    by_domain = f" By domain: {'; '.join(parts)}." if parts else ""
    whole = interval(change, 2, sign=True, noun="conversation")
    return f"{gauge['name']} changes by {whole} from turn 1 to turn {turns}{beside}.{by_domain}"


def _since(onset: int | None) -> str:
    return "" if onset is None else f", from turn {onset} on"


def _foretold(messages: Summary) -> str:
    parts = []
    for name, words in MESSAGES.items():
        found = messages[name]
        if "reason" in found:
            return f"Nothing is said of messages: {found['reason']}."
        beside = [null_range(found[each]) for each in ("shuffled", "shuffled_within")]
        null = f", against {beside[0]} shuffled and {beside[1]} shuffled within domain and turn"
        parts.append(f"{words} with R² {measured(found['r2'])}{null if found['shuffled'] else ''}")
    return f"On conversations not seen, the user’s message foretells of the next reply {'; and '.join(parts)}."


def _replayed(name: str, way: str, found: Summary) -> str:
    drift, level = found["drift"], found["level"]
    if drift is None or level is None:
        return f"Under {way} no conversation can be compared with the unsteered one."
    random = f", random directions by {bounds(drift['random'], 2, sign=True, noun=None)}" if drift["random"] else ""
    also = f" (random directions {bounds(level['random'], 2, sign=True, noun=None)})" if level["random"] else ""
    return (
        f"Under {way} the change along {name} differs from the unsteered one by "
        f"{interval(drift['vector'], 2, sign=True, noun='conversation')}{random}; over all turns replies stand "
        f"{bounds(level['vector'], 2, sign=True, noun=None)} from there{also}."
    )


def told(summary: Summary) -> list[str]:
    """What else is to be known, in a few lines."""
    counts = summary["counts"]
    lines = of_part(summary)
    lines += [f"intervals rest on {said}"] if (said := few(counts["conversations"], "conversation")) else []
    if counts["empty"]:
        lines.append(f"{counts['empty']} of {counted(counts['replies'], 'reply')} are empty and count nowhere")
    for gauge in summary["gauges"]:
        for found in gauge["messages"].values():
            if "reason" in found:
                lines.append(f"{gauge['name']}: {found['reason']}")
                break
    return lines


def figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    found: svg.Wanted = {}
    for place, gauge in enumerate(summary["gauges"]):
        suffix = f"_{place + 1}" if place else ""
        parts = {name: each["changes"] for name, each in gauge["movement"].items() if name != EVERY}
        found[f"changes{suffix}"] = (curves_figure, f"Change along {gauge['name']} since turn 1", _lines(gauge, parts))
        ways = {way: each[EVERY]["movement"]["means"] for way, each in gauge["replays"].items()}
        if ways:
            lines = {"unsteered": gauge["movement"][EVERY]["means"], **ways}
            found[f"replays{suffix}"] = (curves_figure, f"Mean projection on {gauge['name']}", lines)
    return found


def _lines(gauge: Summary, parts: dict[str, Any]) -> dict[str, Any]:
    """A line for each domain; all conversations together where there is one domain, or there are too many."""
    every = {"all conversations": gauge["movement"][EVERY]["changes"]}
    return parts if 0 < len(parts) <= _MOST_LINES else every


def curves_figure(title: str, lines: Mapping[str, list[Summary | None]], width: int) -> Figure:
    """Means by turn with their intervals over conversations, a line for each of a few kinds."""
    figure, axes = svg.panel(width, 380, 320)
    for place, (name, estimates) in enumerate(lines.items()):
        points = [{"coefficient": turn, "mean": each} for turn, each in enumerate(estimates, 1) if each is not None]
        style = {"color": _COLOURS[place % 4], "marker": _MARKERS[place % 4], "zorder": 4}
        if points:
            svg.line_with_intervals(axes, points, "mean", style, name)
    axes.axhline(0, **svg.ZERO)
    axes.set(title=title, xlabel="turn")
    axes.locator_params(axis="x", integer=True)
    svg.legend(figure, axes)
    return figure

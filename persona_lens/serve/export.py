"""A session as a page that stands alone: its settings, the traits turn by turn, and every reply's tokens coloured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite, nan
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from persona_lens.backend.registry import installed_version
from persona_lens.data.pieces import NO_ID, TokenPiece
from persona_lens.monitoring.heatmap import TokenHeatmap
from persona_lens.monitoring.markup import Strip
from persona_lens.reports import svg
from persona_lens.reports.page import number, render
from persona_lens.serve.said import GaugeName, ReplyReadings, SessionMessage, TokenSaid, Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SHOWN = 200_000
"""Values of tokens on a page, each a coloured one; further replies show their means alone."""
MAX_CURVES = 12
"""Traits in the chart; the table has them all."""

Path = Sequence[SessionMessage]


def page_of(model: str, gauges: Sequence[GaugeName], path: Path, others: Sequence[Path], title: str) -> str:
    """The page.

    Args:
        model: Name of the model.
        gauges: What the readings are of.
        path: The conversation that is shown whole.
        others: Other branches; what they share with the first is left out.
        title: Heads the page; the model's name by default.
    """
    left = MAX_SHOWN
    shown: list[dict[str, Any]] = []
    for message in path:
        part = _part(message, gauges)
        values = len(message.readings.tokens) * len(gauges) if message.readings is not None else 0
        if message.readings is not None and values:
            part["many"] = values > left
            if not part["many"]:
                left -= values
                part["heatmap"] = _heatmap(message.readings.tokens, gauges)
        shown.append(part)
    turns = [message.readings for message in path if message.role == "assistant" and message.readings is not None]
    known = {message.id for message in path}
    drawable = bool(gauges) and any(value is not None for turn in turns for value in turn.means)
    figures = svg.drawn({"turns": (turns_figure, gauges, turns)}) if drawable else {}
    parts = {
        "title": title or (f"A conversation with {model}" if model else "A conversation"),
        "model": model,
        "version": installed_version("persona-lens") or "",
        "gauges": [gauge.name for gauge in gauges],
        "messages": shown,
        "branches": [[_part(each, gauges) for each in other if each.id not in known] for other in others],
        "figures": figures,
        "cut": len({gauge.trait for gauge in gauges}) - MAX_CURVES,
    }
    return render("session.html.j2", parts)


def _part(message: SessionMessage, gauges: Sequence[GaugeName]) -> dict[str, Any]:
    """What the page says of a message."""
    found: dict[str, Any] = {"role": message.role, "content": message.content, "id": message.id, "rows": []}
    found |= {"made": str(message.made) if message.made else "", "heatmap": "", "many": False, "alarms": []}
    if (read := message.readings) is None:
        return found
    foretold = {each.gauge: each for each in read.forecast}
    for place, gauge in enumerate(gauges):
        before, mean = (number(_value(values, place), 2, sign=True) for values in (read.prompt_last, read.means))
        told = foretold.get(place)
        said = f"{number(told.probability, 0, percent=True)} {told.says or ''}".strip() if told else ""
        found["rows"].append((gauge.name, before, mean, said))
    found["alarms"] = [
        f"{each.alarm}: {each.trait} at layer {each.layer} stood at {number(each.value, 2, sign=True)}"
        + (f" ({number(each.sds, 1, sign=True)} SD)" if each.sds is not None else "")
        + (f", token {each.token}" if each.token is not None else "")
        for each in read.alarms
    ]
    return found


def _value(values: Values, place: int) -> float:
    value = values[place] if place < len(values) else None
    return nan if value is None else value


def _heatmap(tokens: Sequence[TokenSaid], gauges: Sequence[GaugeName]) -> Markup:
    """The tokens coloured; the template of heat maps escapes every text in it."""
    traits = list(dict.fromkeys(gauge.trait for gauge in gauges))
    order = sorted(enumerate(gauges), key=lambda each: (traits.index(each[1].trait), each[1].layer))
    strips = [
        Strip(tuple(_value(token.values, place) for token in tokens), gauge.trait, gauge.layer)
        for place, gauge in order
    ]
    read = tuple(strip for strip in strips if any(map(isfinite, strip.values)))
    return Markup(TokenHeatmap(tuple(_pieces(tokens)), read)._repr_html_()) if read else Markup()


def _pieces(tokens: Sequence[TokenSaid]) -> Iterator[TokenPiece]:
    """Tokens whose text came with a later one stand together with it."""
    start = 0
    for stop, token in enumerate(tokens, start=1):
        if token.text or stop == len(tokens):
            ids = tuple(NO_ID if each.id is None else each.id for each in tokens[start:stop])
            yield TokenPiece(token.text, start, ids)
            start = stop


def turns_figure(gauges: Sequence[GaugeName], turns: Sequence[ReplyReadings], width: int) -> Figure:
    """Means turn by turn: a panel for each trait, a line for each layer, and a mark where an alarm sounded."""
    traits = list(dict.fromkeys(gauge.trait for gauge in gauges))[:MAX_CURVES]
    layers = sorted({gauge.layer for gauge in gauges})
    figure, axes = svg.panels(width, 70 + 170 * len(traits), None, len(traits), sharex=True)
    colours = (svg.VECTOR, svg.RANDOM, svg.THIRD, svg.MUTED)
    styles = [
        {**svg.LINE, "color": colours[n % len(colours)], "linestyle": ("-", "--", ":")[n // 4 % 3]}
        for n in range(len(layers))
    ]
    for layer, style in zip(layers[:MAX_CURVES], styles, strict=False):
        axes[0].plot([], [], label=f"layer {layer}", **style)
    alarmed: dict[str, Any] = {
        "marker": "o",
        "markersize": 14,
        "markerfacecolor": "none",
        "color": svg.INK,
        "linestyle": "",
    }
    if any(turn.alarms for turn in turns):
        axes[0].plot([], [], label="alarm", **alarmed)
    for place, gauge in enumerate(gauges):
        if gauge.trait not in traits:
            continue
        each, heights = axes[traits.index(gauge.trait)], [_value(turn.means, place) for turn in turns]
        each.plot(range(1, len(turns) + 1), heights, **styles[layers.index(gauge.layer)])
        sounded = [n for n, turn in enumerate(turns) if any(alarm.gauge == place for alarm in turn.alarms)]
        each.plot([n + 1 for n in sounded], [heights[n] for n in sounded], **alarmed)
    for each, trait in zip(axes, traits, strict=True):
        each.axhline(0, **svg.ZERO)
        each.set_title(trait, parse_math=False)
    axes[-1].set_xlabel("turn of the assistant")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    svg.legend(figure, axes[0], columns=4)
    return figure

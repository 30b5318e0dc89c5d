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
"""Values on a page, each a coloured token or in a table; further replies show their text alone."""
MAX_CURVES, MAX_POINTS = 12, 20_000
"""Traits in the chart, and points; the tables have them all."""

Path = Sequence[SessionMessage]


def page_of(model: str, gauges: Sequence[GaugeName], path: Path, others: Sequence[Path], title: str) -> str:
    """The page.

    Args:
        model: Name of the model.
        gauges: What the readings are of.
        path: The conversation that is shown whole.
        others: Other branches, without what they share with the first.
        title: Heads the page; the model's name by default.
    """
    room = _Room()
    shown = [_part(message, gauges, room, tokens=True) for message in path]
    turns = [message.readings for message in path if message.role == "assistant" and message.readings is not None]
    drawable = any(value is not None for turn in turns for value in turn.means)
    few = len(turns) * len(gauges) <= MAX_POINTS
    figures = svg.Drawn({"turns": (turns_figure, gauges, turns)}) if drawable and few else {}
    parts = {
        "title": title or (f"A conversation with {model}" if model else "A conversation"),
        "model": model,
        "version": installed_version("persona-lens") or "",
        "gauges": [gauge.name for gauge in gauges],
        "messages": shown,
        "branches": [[_part(each, gauges, room, tokens=False) for each in other] for other in others],
        "figures": figures,
        "cut": len({gauge.trait for gauge in gauges}) - MAX_CURVES,
    }
    return render("session.html.j2", parts)


class _Room:
    """What a page still has room for."""

    def __init__(self) -> None:
        self.left = MAX_SHOWN

    def take(self, values: int) -> bool:
        """Whether there is room for so many values, which are then taken."""
        fits = values <= self.left
        self.left -= values if fits else 0
        return fits


def _part(message: SessionMessage, gauges: Sequence[GaugeName], room: _Room, *, tokens: bool) -> dict[str, Any]:
    """What the page says of a message."""
    found: dict[str, Any] = {"role": message.role, "content": message.content, "id": message.id, "rows": []}
    found |= {"made": str(message.made) if message.made else "", "heatmap": "", "many": False, "alarms": []}
    if (read := message.readings) is None:
        return found
    if read.means or read.prompt_last or read.forecast:
        fits = room.take(len(gauges))
        found["rows"], found["many"] = (_rows(read, gauges) if fits else []), not fits
    if tokens and read.tokens:
        fits = room.take(len(read.tokens) * len(gauges))
        found["heatmap"], found["many"] = (_heatmap(read.tokens, gauges) if fits else ""), not fits
    found["alarms"] = [
        f"{each.alarm}: {each.trait} at layer {each.layer} stood at {number(each.value, 2, sign=True)}"
        + (f" ({number(each.sds, 1, sign=True)} SD)" if each.sds is not None else "")
        + (f", token {each.token}" if each.token is not None else "")
        for each in read.alarms[:MAX_ALARMS]
    ]
    return found


MAX_ALARMS = 100  # of one reply


def _rows(read: ReplyReadings, gauges: Sequence[GaugeName]) -> list[tuple[str, str, str, str]]:
    """Each gauge with its value before the reply, its mean, and what was foretold."""
    foretold = {each.gauge: each for each in read.forecast}
    found = []
    for place, gauge in enumerate(gauges):
        before, mean = (number(_value(values, place), 2, sign=True) for values in (read.prompt_last, read.means))
        told = foretold.get(place)
        said = f"{number(told.probability, 0, percent=True)} {told.says or ''}".strip() if told else ""
        found.append((gauge.name, before, mean, said))
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
    parts = tuple("thinking" if token.part else "answer" for token in tokens)
    apart = parts if "thinking" in parts else ()
    return Markup(TokenHeatmap(tuple(_pieces(tokens)), read, parts=apart)._repr_html_()) if read else Markup()


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

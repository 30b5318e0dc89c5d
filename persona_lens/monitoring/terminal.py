"""A heat map in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.style import Style
from rich.table import Table
from rich.text import Text

from persona_lens.characters import printable
from persona_lens.monitoring.colours import LIGHT_INK, STEPS, Scale, light
from persona_lens.monitoring.tokens import TokenPiece

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from persona_lens.monitoring.heatmap import Strip, TokenHeatmap

_FURTHER = "·"  # in the place of every token of a character but the first
_ENOUGH = ("256", "truecolor")  # fewer colours do not tell shades apart
_DULL = Style(dim=True)


def render(heatmap: TokenHeatmap, console: Console) -> Iterator[RenderableType]:
    """What rich draws: coloured tokens, or tokens with numbers where the console has no or few colours."""
    coloured = not console.no_color and console.color_system in _ENOUGH
    if heatmap.title:
        yield Text(printable(heatmap.title), style="bold")
    for trait in heatmap.traits:
        scale = heatmap.scales[trait]
        head = Text()
        if trait:
            head.append(f"{printable(trait)}  ", "bold")
        yield head.append(_legend(scale) if coloured else _range(scale))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column(ratio=1, overflow="fold")
        for strip in heatmap.strips_of(trait):
            tokens = _coloured(heatmap, strip, scale) if coloured else _numbered(heatmap, strip, scale)
            grid.add_row(Text(printable(strip.label)), tokens)
        yield grid
    notes = [
        "without colour: no value" if heatmap.has_gaps and coloured else "",
        f"{_FURTHER} a further token of the character before it" if heatmap.has_groups and coloured else "",
        "several values: a character of several tokens" if heatmap.has_groups and not coloured else "",
    ]
    if any(notes):
        yield Text("; ".join(filter(None, notes)), _DULL)


def _legend(scale: Scale) -> Text:
    low, centre, high = scale.ends
    legend = Text().append(f"{low} ", _DULL)
    for step in range(-STEPS, STEPS + 1, 5):
        legend.append("  " if step else f" {centre} ", _style(step))
    return legend.append(f" {high}", _DULL)


def _range(scale: Scale) -> Text:
    low, _, high = scale.ends
    return Text(f"each token with its value, {low} to {high}", _DULL)


def _coloured(heatmap: TokenHeatmap, strip: Strip, scale: Scale) -> Text:
    text = Text()
    for piece in heatmap.pieces:
        shown, ending = _split(piece)
        for place in range(len(piece.ids)):
            style = _style(scale.step(strip.values[piece.start + place]), control=piece.special)
            text.append(_FURTHER if place else shown, style)
        text.append(ending)
    text.rstrip()
    return text


def _numbered(heatmap: TokenHeatmap, strip: Strip, scale: Scale) -> Text:
    text = Text()
    for piece in heatmap.pieces:
        shown, ending = _split(piece)
        values = " ".join(scale.write(value) for value in strip.values[piece.start : piece.stop])
        text.append(shown).append(f"[{values}]", _DULL).append(ending)
    text.rstrip()
    return text


def _split(piece: TokenPiece) -> tuple[str, str]:
    """What a piece shows, and the line feed that may end it."""
    shown = piece.shown
    return (shown[:-1], "\n") if shown.endswith("\n") else (shown, "")


def _style(step: int | None, *, control: bool = False) -> Style:
    if step is None:
        return Style(underline=control)
    return Style(color=LIGHT_INK, bgcolor=light(step), italic=control)

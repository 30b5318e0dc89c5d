"""A heat map as HTML."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from persona_lens.core.text import printable
from persona_lens.data.pieces import Run, TokenPiece, is_mixed
from persona_lens.monitoring.heatmap import DARK_INK, LIGHT_INK, STEPS, Scale, dark, light

if TYPE_CHECKING:
    from persona_lens.monitoring.heatmap import Strip, TokenHeatmap

_GROUP = Markup(
    '<span class="group" style="grid-template-columns:repeat({n},minmax(.35em,1fr))">'
    '<span class="whole" dir="auto">{text}</span>{cells}</span>'
)


def page(heatmap: TokenHeatmap) -> str:
    """A whole page; see `TokenHeatmap.html`."""
    return _render(heatmap, whole=True)


def fragment(heatmap: TokenHeatmap) -> str:
    """One element with its style, to stand in any page."""
    return _render(heatmap, whole=False)


def _render(heatmap: TokenHeatmap, *, whole: bool) -> str:
    template = _environment().get_template("heatmap.html.j2")
    return template.render(heatmap=heatmap, whole=whole, shades=_shades(), strip_markup=strip_markup)


def strip_markup(heatmap: TokenHeatmap, strip: Strip) -> Markup:
    """The tokens of one strip.

    The span of token i carries ``data-token="i"``, its value, and its text. Several tokens of one character are cells
    next to each other, over which the character is drawn. Pieces are wrapped in runs of one direction each, isolated
    from one another. In runs from left to right so is every token; in those from right to left only what holds letters
    of both directions, because letters join across tokens there, and isolation would tear words apart.
    """
    scale = heatmap.scales[strip.trait]
    written = []
    for line in heatmap.lines:
        runs = [
            Markup('<span class="run" dir="{}">{}</span>').format(
                run.direction, Markup("").join(_piece(piece, run, strip, scale) for piece in run.pieces)
            )
            for run in line.runs
        ]
        written.append(Markup('<div class="line" dir="{}">{}</div>').format(line.direction, Markup("").join(runs)))
    return Markup("").join(written)


def _piece(piece: TokenPiece, run: Run, strip: Strip, scale: Scale) -> Markup:
    if len(piece.ids) == 1:
        isolated = run.direction == "ltr" or is_mixed(piece)
        return _token(piece, 0, strip, scale, piece.shown, Markup(' dir="auto"') if isolated else Markup())
    cells = [
        _token(piece, place, strip, scale, "", Markup(' style="grid-column:{}"').format(place + 1))
        for place in range(len(piece.ids))
    ]
    return _GROUP.format(n=len(cells), text=piece.shown, cells=Markup("").join(cells))


def _token(piece: TokenPiece, place: int, strip: Strip, scale: Scale, text: str, more: Markup) -> Markup:
    index = piece.start + place
    value = strip.values[index]
    kinds = ["token", _shade_class(scale.step(value)), *(["control"] if piece.special else [])]
    of = f" ({place + 1} of {len(piece.ids)} of one character)" if len(piece.ids) > 1 else ""
    what = " · ".join(printable(word) for word in (strip.trait, strip.label, scale.write(value)) if word)
    # The text stands on a line of its own, where its direction disturbs nothing.
    hover = f"token {index}{of} · id {piece.ids[place]}\n{what}\n{piece.shown}".rstrip("\n")
    # Hundreds of thousands of these make a page, and Markup.format is slow.
    return Markup(
        f'<span class="{" ".join(kinds)}" title="{escape(hover)}" data-token="{index}" data-value="{value!r}"{more}>'
        f"{escape(text)}</span>"
    )


def _shade_class(step: int | None) -> str:
    if step is None:
        return "none"
    return f"{'high' if step >= 0 else 'low'}-{abs(step)}"


@cache
def _shades() -> Markup:
    """The style of every shade."""
    rules = [
        f".persona-heatmap .{_shade_class(step)}{{background-color:light-dark({light(step)},{dark(step)})}}"
        for step in range(-STEPS, STEPS + 1)
    ]
    bar = ",".join(f"light-dark({light(step)},{dark(step)})" for step in (-STEPS, 0, STEPS))
    rules.append(f".persona-heatmap .bar{{background:linear-gradient(to right,{bar})}}")
    rules.append(f".persona-heatmap{{--ink:light-dark({LIGHT_INK},{DARK_INK})}}")
    return Markup("\n").join(map(Markup, rules))


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )

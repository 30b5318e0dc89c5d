"""Values as shades, and tokens with their values as HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from persona_lens.core.text import printable
from persona_lens.data.pieces import NO_ID, Line, Run, TokenPiece, is_mixed

STEPS = 20  # shades to each side
LIGHT_INK, DARK_INK = "#1b1f24", "#e7e9ec"  # legible on every shade: at least 4.5 to 1, as the tests compute
_LIGHT = ("#5aa0dc", "#ffffff", "#f0806f")  # lowest, centre, highest
_DARK = ("#0d5f9f", "#14171c", "#ad3a2f")
_FAR = 3.0  # times the 90th percentile: beyond it lie outliers, such as the first token of most models
_DIGITS = 3  # significant ones of the scale's end
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Scale:
    """Values onto shades.

    Attributes:
        centre: The value without colour.
        limit: Distance from it, above 0, at which the colour is fullest; values beyond it have the same colour.
        clipped: Whether any value lies beyond.
    """

    centre: float
    limit: float
    clipped: bool

    @classmethod
    def of(cls, values: Iterable[float], centre: float = 0.0, limit: float | None = None) -> Scale:
        """A scale for values: to the furthest one, unless few are far from all others.

        Args:
            values: NaN is left out.
            centre: The value without colour.
            limit: A distance to use, so that several heat maps can be compared.
        """
        distances = np.abs(np.array([value - centre for value in values if not math.isnan(value)]))
        finite = distances[np.isfinite(distances)]
        if limit is None:
            furthest = float(finite.max()) if len(finite) else 0.0
            usual = _FAR * float(np.quantile(finite, 0.9, method="lower")) if len(finite) else 0.0
            limit = min(furthest, usual) or furthest or 1.0
        return cls(centre, limit, bool((distances > limit * (1 + 1e-9)).any()))

    def step(self, value: float) -> int | None:
        """The shade of a value, from ``-STEPS`` to ``STEPS``; None for NaN."""
        if math.isnan(value):
            return None
        return round(max(-1.0, min(1.0, (value - self.centre) / self.limit)) * STEPS)

    def write(self, value: float) -> str:
        """A value in as many digits as the scale has."""
        if math.isnan(value):
            return "none"
        if math.isinf(value):
            return f"{MINUS if value < 0 else '+'}∞"
        size = max(self.limit, abs(self.centre))
        digits = min(max(_DIGITS - 1 - math.floor(math.log10(size)), 0), 12)
        rounded = round(value, digits) + 0.0  # no negative zero
        return f"{rounded:{'+' if rounded else ''}.{digits}f}".replace("-", MINUS)

    @property
    def ends(self) -> tuple[str, str, str]:
        """Lowest value, centre and highest, written."""
        low, high = self.write(self.centre - self.limit), self.write(self.centre + self.limit)
        middle = self.write(self.centre) if self.centre else "0"
        return (f"≤ {low}" if self.clipped else low, middle, f"≥ {high}" if self.clipped else high)


def light(step: int) -> str:
    """A shade for light pages: ``#rrggbb``."""
    return _shade(_LIGHT, step)


def dark(step: int) -> str:
    """A shade for dark pages: ``#rrggbb``."""
    return _shade(_DARK, step)


def _shade(colours: tuple[str, str, str], step: int) -> str:
    low, centre, high = colours
    end, share = high if step > 0 else low, abs(step) / STEPS
    return "#" + "".join(
        f"{round(int(centre[i : i + 2], 16) * (1 - share) + int(end[i : i + 2], 16) * share):02x}" for i in (1, 3, 5)
    )


@dataclass(frozen=True)
class Strip:
    """One value for each token.

    Attributes:
        values: By token; NaN where there is none.
        trait: What the values are of; may be empty where there is only one.
        layer: The layer they were read at; None if there is none to speak of.
    """

    values: tuple[float, ...]
    trait: str = ""
    layer: int | None = None

    @property
    def label(self) -> str:
        """The layer, in words."""
        return "" if self.layer is None else f"layer {self.layer}"


_PART = Markup('<div class="part {kind}"><div class="part-name">{name}</div>{lines}</div>')
_GROUP = Markup(
    '<span class="group" style="grid-template-columns:repeat({n},minmax(.35em,1fr))">'
    '<span class="whole" dir="auto">{text}</span>{cells}</span>'
)


def html(heatmap: Any, *, whole: bool) -> str:
    """A `TokenHeatmap` as a page; or as one element with its style, to stand in any page."""
    template = _environment().get_template("heatmap.html.j2")
    return template.render(heatmap=heatmap, whole=whole, shades=_shades(), strip_markup=strip_markup)


def strip_markup(stretches: Sequence[tuple[str, Sequence[Line]]], strip: Strip, scale: Scale) -> Markup:
    """The tokens of one strip, those of each named stretch under its name."""
    found = []
    for name, lines in stretches:
        shown = _lines(lines, strip, scale)
        kind = re.sub(r"\W+", "-", name)
        found.append(_PART.format(kind=kind, name=name, lines=shown) if name else shown)
    return Markup("").join(found)


def _lines(lines: Sequence[Line], strip: Strip, scale: Scale) -> Markup:
    """The tokens of some lines.

    The span of token i carries ``data-token="i"``, its value, and its text. Several tokens of one character are cells
    next to each other, over which the character is drawn. Pieces are wrapped in runs of one direction each, isolated
    from one another. In runs from left to right so is every token; in those from right to left only what holds letters
    of both directions, because letters join across tokens there, and isolation would tear words apart.
    """
    written = []
    for line in lines:
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
    known = "" if piece.ids[place] == NO_ID else f" · id {piece.ids[place]}"
    hover = f"token {index}{of}{known}\n{what}\n{piece.shown}".rstrip("\n")
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

"""`TokenHeatmap`: a value for each token, shown on the token: in a terminal, in a notebook, and as a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from rich.style import Style
from rich.table import Table
from rich.text import Text

from persona_lens.core.text import printable
from persona_lens.data.pieces import Line, TokenPiece, lines_of
from persona_lens.monitoring import markup
from persona_lens.monitoring.gauges import MonitoringError
from persona_lens.monitoring.markup import LIGHT_INK, STEPS, Scale, Strip, light

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_RULE = "──"
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
        low, _, high = scale.ends
        yield head.append(_legend(scale) if coloured else Text(f"each token with its value, {low} to {high}", _DULL))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column(ratio=1, overflow="fold")
        for strip in heatmap.strips_of(trait):
            grid.add_row(Text(printable(strip.label)), _tokens(heatmap, strip, scale, coloured))
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


def _tokens(heatmap: TokenHeatmap, strip: Strip, scale: Scale, coloured: bool) -> Text:
    text = Text()
    for name, pieces in heatmap.stretches:
        if len(heatmap.stretches) > 1:
            text.append("" if not text or text.plain.endswith("\n") else "\n")
            text.append(f"{_RULE} {name} {_RULE}\n" if name else "", _DULL)
        _write(text, pieces, strip, scale, coloured)
    text.rstrip()
    return text


def _write(text: Text, pieces: Sequence[TokenPiece], strip: Strip, scale: Scale, coloured: bool) -> None:
    for piece in pieces:
        shown, ending = (piece.shown[:-1], "\n") if piece.shown.endswith("\n") else (piece.shown, "")
        values = strip.values[piece.start : piece.stop]
        if coloured:
            for place, value in enumerate(values):
                text.append(_FURTHER if place else shown, _style(scale.step(value), control=piece.special))
        else:
            text.append(shown).append(f"[{' '.join(map(scale.write, values))}]", _DULL)
        text.append(ending)


def _style(step: int | None, *, control: bool = False) -> Style:
    if step is None:
        return Style(underline=control)
    return Style(color=LIGHT_INK, bgcolor=light(step), italic=control)


@dataclass(frozen=True)
class TokenHeatmap:
    """Tokens coloured by their values: blue below a centre, red above it, hatched where there is none.

    A notebook shows it by itself, `rich.print` shows it in a terminal (numbers instead of colours where there are none,
    as with ``NO_COLOR``), and `html` is a page.

    Attributes:
        pieces: The tokens, as `persona_lens.data.pieces.token_pieces` splits them.
        strips: One for each trait and layer, those of a trait next to each other.
        title: What is shown.
        centre: The value without colour, for all traits or by trait.
        limit: Distance from the centre at which the colour is fullest. Without it, that of the furthest value of a
            trait, all its layers together, except that values far from all others do not count.
        parts: For each token what stretch it stands in, such as ``thinking`` or ``answer``: each stretch begins on a
            line of its own, with its name above it. Empty texts have no name; nothing at all sets nothing apart.

    Raises:
        MonitoringError: If pieces and values do not belong together.
    """

    pieces: tuple[TokenPiece, ...]
    strips: tuple[Strip, ...]
    title: str = ""
    centre: float | Mapping[str, float] = field(default=0.0)
    limit: float | None = None
    parts: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        pieces: Sequence[TokenPiece],
        values: Any,
        *,
        layers: Sequence[int] | None = None,
        title: str = "",
        centre: float | Mapping[str, float] = 0.0,
        limit: float | None = None,
    ) -> TokenHeatmap:
        """A heat map of tensors, arrays or lists.

        Args:
            pieces: The tokens.
            values: [tokens] or [layers, tokens], or a mapping of traits to either. None and NaN are "no value".
            layers: The layers of [layers, tokens], in their order; one layer of [tokens].
            title: What is shown.
            centre: The value without colour, for all traits or by trait.
            limit: Distance from it at which the colour is fullest.

        Raises:
            MonitoringError: If the shapes do not fit.
        """
        named = values if isinstance(values, Mapping) else {"": values}
        strips = [strip for trait, rows in named.items() for strip in _strips(str(trait), rows, layers)]
        return cls(tuple(pieces), tuple(strips), title, centre, limit)

    def __post_init__(self) -> None:
        if not self.strips:
            raise MonitoringError("a heat map needs values of at least one trait or layer")
        expected = 0
        for piece in self.pieces:
            if piece.start != expected:
                raise MonitoringError(
                    f"the pieces must follow one another from token 0 on, but {piece.text!r} begins at {piece.start} "
                    f"instead of {expected}; take all that token_pieces returns"
                )
            expected = piece.stop
        for strip in self.strips:
            if len(strip.values) != expected:
                which = " ".join(word for word in (strip.trait, strip.label) if word) or "the heat map"
                raise MonitoringError(
                    f"{which} has {len(strip.values)} values for {expected} tokens; give one for each"
                )
        if self.parts and len(self.parts) != expected:
            raise MonitoringError(f"{len(self.parts)} parts for {expected} tokens; give one for each")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise MonitoringError(f"limit must be above 0, got {self.limit}")
        if isinstance(self.centre, Mapping):
            missing = [trait for trait in self.traits if trait not in self.centre]
            if missing:
                raise MonitoringError(f"there is no centre for {missing[0]!r}; there are {', '.join(self.centre)}")
        if not all(math.isfinite(self._centre(trait)) for trait in self.traits):
            raise MonitoringError(f"the centre must be a number, got {self.centre}")

    @property
    def traits(self) -> tuple[str, ...]:
        """Traits in their order."""
        return tuple(dict.fromkeys(strip.trait for strip in self.strips))

    @cached_property
    def scales(self) -> Mapping[str, Scale]:
        """The scale of each trait, the same for all its layers."""
        found = {}
        for trait in self.traits:
            each, centre = [strip.values for strip in self.strips_of(trait)], self._centre(trait)
            # Outliers are told layer by layer: a token that is an attention sink is one in many layers.
            limit = self.limit or max(Scale.of(values, centre).limit for values in each)
            found[trait] = Scale.of(chain.from_iterable(each), centre, limit)
        return found

    def strips_of(self, trait: str) -> tuple[Strip, ...]:
        """The strips of a trait."""
        return tuple(strip for strip in self.strips if strip.trait == trait)

    @cached_property
    def stretches(self) -> tuple[tuple[str, tuple[TokenPiece, ...]], ...]:
        """The pieces of each stretch, with its name."""
        named = groupby(self.pieces, key=lambda piece: self.parts[piece.start] if self.parts else "")
        return tuple((name, tuple(pieces)) for name, pieces in named)

    @cached_property
    def lines(self) -> tuple[tuple[str, tuple[Line, ...]], ...]:
        """The pieces of each stretch as they are laid out, with its name."""
        return tuple((name, tuple(lines_of(pieces))) for name, pieces in self.stretches)

    @cached_property
    def has_gaps(self) -> bool:
        """Whether any token has no value."""
        return any(math.isnan(value) for strip in self.strips for value in strip.values)

    @cached_property
    def has_groups(self) -> bool:
        """Whether any character takes several tokens."""
        return any(len(piece.ids) > 1 for piece in self.pieces)

    def html(self) -> str:
        """A page, complete in itself: no scripts, and nothing is loaded from anywhere; to be written as UTF-8."""
        return markup.html(self, whole=True)

    def _repr_html_(self) -> str:
        return markup.html(self, whole=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        return render(self, console)

    def _centre(self, trait: str) -> float:
        return float(self.centre[trait] if isinstance(self.centre, Mapping) else self.centre)


def _strips(trait: str, rows: Any, layers: Sequence[int] | None) -> Iterator[Strip]:
    listed = rows.tolist() if hasattr(rows, "tolist") else list(rows)
    nested = [row.tolist() if hasattr(row, "tolist") else row for row in listed]
    deep = bool(nested) and all(isinstance(row, Sequence) and not isinstance(row, str) for row in nested)
    if deep and layers is None:
        raise MonitoringError(f"the values are of {len(nested)} layers; say which, in their order (layers=...)")
    by_layer = nested if deep else [nested]
    names: Sequence[int | None] = layers if layers is not None else [None]
    if len(names) != len(by_layer):
        raise MonitoringError(f"{len(names)} layers for {len(by_layer)} rows of values; give one for each")
    for layer, row in zip(names, by_layer, strict=True):
        try:
            values = tuple(math.nan if value is None else float(value) for value in row)
        except (TypeError, ValueError) as error:
            raise MonitoringError("values must be numbers, [tokens] or [layers, tokens]") from error
        yield Strip(values, trait, None if layer is None else int(layer))

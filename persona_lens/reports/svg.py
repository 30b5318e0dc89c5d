"""What figures are made of: points with their intervals, the null's own look, legends, the layer that is used."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

from markupsafe import Markup

from persona_lens.core.text import isolated, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of a light page; in a page's SVG each becomes the CSS variable of that colour, which changes in the dark.
INK = "#1b1f24"
MUTED = "#59616d"
GRID = "#dfe3e8"
PAPER = "#ffffff"
VECTOR = "#0068ad"
RANDOM = "#8a5a00"
THIRD = "#a2357c"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--rule)",
    PAPER: "var(--paper)",
    VECTOR: "var(--vector)",
    RANDOM: "var(--random)",
    THIRD: "var(--third)",
}
MAX_LABEL = 200  # characters
_UNIQUE = re.compile(r"#(\w+)")
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_FAMILY = re.compile(r"font-family: [^;]*;? ?")
_NO_ROTATION = re.compile(r"rotate\(-?0(\.0)? ")


_SETTINGS = RLock()  # matplotlib has them once for all threads
_STYLED: ContextVar[bool] = ContextVar("within the report's settings", default=False)


@contextmanager
def drawing_style() -> Iterator[None]:
    """Draw with the report's settings, whatever the user's matplotlibrc says, and leave theirs as they were."""
    from matplotlib import style

    with _SETTINGS:
        if _STYLED.get():  # what was set since, for one figure, stays
            yield
            return
        token = _STYLED.set(True)
        try:
            with style.context(Path(__file__).with_name("report.mplstyle"), after_reset=True):
                yield
        finally:
            _STYLED.reset(token)


def to_svg(figure: Figure, name: str) -> Markup:
    """The figure as an inline SVG element, which the page names and describes.

    Args:
        figure: Drawn in the colours of this module, inside `drawing_style`.
        name: Unique in the page, for a width; every id in the SVG comes from it.
    """
    import matplotlib

    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    _shorten(figure)
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": f"{name} {figure.get_figwidth()}"}):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's font has others
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(printable(written.getvalue()))  # XML knows no control characters
    _localise(root)
    for unwanted in [e for e in root if e.tag == "metadata" or e.find("style") is not None]:
        root.remove(unwanted)
    said = {"aria-labelledby": f"figure-{name}-title", "aria-describedby": f"figure-{name}-words"}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", **said}
    # ElementTree has escaped every text and attribute.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _shorten(figure: Figure) -> None:
    """Cut labels that no figure has room for, and make them such as fonts can measure."""
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formatter: Any = axis.get_major_formatter()
            if isinstance(formatter, FixedFormatter):
                formatter.seq = [_label(str(label)) for label in formatter.seq]
            elif isinstance(formatter, FuncFormatter):  # which has the labels that were set with their places
                formatter.func = partial(_labelled, formatter.func)
    for text in figure.findobj(lambda artist: hasattr(artist, "set_text")):
        found: Any = text
        found.set_text(_label(found.get_text()))


def _labelled(label: Callable[[Any, Any], Any], value: Any, place: Any = None) -> str:
    return _label(str(label(value, place)))


def _label(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= MAX_LABEL else f"{shown[: MAX_LABEL - 1]}…"


def _localise(root: ElementTree.Element) -> None:
    """Plain tag names; ids only where they are used; the page's colours and font."""
    used = {found for e in root.iter() for value in e.attrib.values() for found in _UNIQUE.findall(value)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        element.text = isolated(element.text or "") if element.tag == "text" else None
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        if _NO_ROTATION.match(attributes.get("transform", "")):
            del attributes["transform"]
        element.attrib.clear()
        element.attrib.update({key: _rewritten(key, value) for key, value in attributes.items()})


def _rewritten(key: str, value: str) -> str:
    if key == "style":
        coloured = _COLOUR.sub(lambda match: _VARIABLES.get(match[0], match[0]), value)
        return _FAMILY.sub("", coloured)
    return " ".join(value.split()) if key == "d" else value


WIDE, NARROW = 704, 343  # CSS pixels: the page's text column, and a small phone's screen without its margins


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
        wide: SVG for screens as wide as a line of text.
        narrow: SVG for phones.
    """

    wide: Markup
    narrow: Markup

    @property
    def link(self) -> str:
        """The wide one as a file of its own, in the colours of a light page: the address of a link that saves it."""
        text = _ROOT.sub(_standing_alone, str(self.wide), count=1)
        for colour, variable in _VARIABLES.items():
            text = text.replace(variable, colour)
        return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


_ROOT = re.compile(r'<svg viewBox="([\d.]+ [\d.]+ ([\d.]+) ([\d.]+))"[^>]*>')


def _standing_alone(root: re.Match[str]) -> str:
    box, width, height = root.groups()
    font = "system-ui, Helvetica, Arial, sans-serif"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{width}" height="{height}" '
        f'font-family="{font}"><rect width="100%" height="100%" fill="{PAPER}"/>'
    )


Place = float | Mapping[str, Any]  # a number or an estimate
Wanted = dict[str, tuple[Any, ...]]


class Drawn(Mapping[str, Drawing]):
    """Figures by name, each drawn when it is first shown: a page need not show all that a run has.

    Args:
        wanted: By name, which is unique in the page: what draws the figure, given data and a width in CSS pixels; and
            the data.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted, self._made = wanted, dict[str, Drawing]()

    def __getitem__(self, name: str) -> Drawing:
        if name not in self._made:
            draw_at, *data = self._wanted[name]
            with drawing_style():
                self._made[name] = Drawing(*(to_svg(draw_at(*data, width), name) for width in (WIDE, NARROW)))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)


_GIVEN: ContextVar[Axes | None] = ContextVar("axes to draw on", default=None)


@contextmanager
def drawing_on(axes: Axes | None) -> Iterator[None]:
    """Within it the first panel of a figure is drawn on these axes, and the others nowhere; None draws as usual."""
    token = _GIVEN.set(axes)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of a size in CSS pixels, which a notebook shows."""
    figure = _shown_figure()(figsize=(width / 72, height / 72), layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=8 / 72, h_pad=6 / 72, hspace=0.06, wspace=0.06)
    return figure


@cache
def _shown_figure() -> type[Figure]:
    from matplotlib.figure import Figure

    class Shown(Figure):
        """Notebooks show figures made by pyplot only, which draws on a global state.

        Ticks are made when a figure is drawn, so it is drawn as it was made, in the report's style.
        """

        def draw(self, renderer: Any) -> None:
            with drawing_style():
                super().draw(renderer)

        def savefig(self, fname: Any, *, transparent: bool | None = None, **kwargs: Any) -> None:
            if not transparent:
                kwargs = {"facecolor": "auto", **kwargs}  # its own, whatever the user's style saves with
            super().savefig(fname, transparent=transparent, **kwargs)

        def _repr_png_(self) -> bytes:
            return image_of(self, "png", dpi=96)

    return Shown


def image_of(figure: Figure, form: str, **how: Any) -> bytes:
    """The figure as a file of a form that matplotlib writes, such as ``png``."""
    written = io.BytesIO()
    figure.savefig(written, format=form, **how)
    return written.getvalue()


def panels(width: int, wide: int, narrow: int | None, rows: int, columns: int = 1, **grid: Any) -> tuple[Figure, Any]:
    """A figure of several panels, with its height on a wide page and on a phone, and its axes, row by row."""
    figure = new_figure(width, wide if width == WIDE or narrow is None else narrow)
    axes = list(figure.subplots(rows, columns, squeeze=False, **grid).flat)
    if (given := _GIVEN.get()) is not None:
        return cast("Figure", cast(Any, given.figure).figure), [given, *axes[1:]]  # of a panel's, the whole one
    return figure, axes


def panel(width: int, wide: int, narrow: int | None = None) -> tuple[Figure, Axes]:
    """A figure of one panel, with its height on a wide page and on a phone."""
    figure, axes = panels(width, wide, narrow, 1)
    return figure, axes[0]


def in_rows(axes: Axes, names: Sequence[str]) -> None:
    """Give each whole number on the vertical axis a name, the first on top, and the lines to the horizontal axis."""
    axes.set_yticks(range(len(names)), [_label(name) for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")


def note(axes: Axes, at: tuple[float, float], text: str, offset: tuple[float, float], **style: Any) -> None:
    """Words beside a horizontal line: ``at`` is a share of the width and a height on the axis, ``offset`` in points."""
    across = axes.get_yaxis_transform()
    words: dict[str, Any] = {"color": MUTED, "fontsize": 12, **style}
    axes.annotate(text, at, offset, xycoords=across, textcoords="offset points", **words)


VECTOR_LABEL, RANDOM_LABEL = "trait vector", "random directions"
BAR: dict[str, Any] = {"elinewidth": 2, "capsize": 4, "capthick": 2}
LINE: dict[str, Any] = {"marker": "o", "color": VECTOR, "zorder": 4}
DASHES, DOTS = (0, (4, 2)), (0, (1, 2))
DOTTED: dict[str, Any] = {"color": MUTED, "linewidth": 1.5, "linestyle": DOTS, "zorder": 1}
ZERO: dict[str, Any] = {"color": MUTED, "linewidth": 1.5, "zorder": 1}
NULL: dict[str, Any] = {"marker": "s", "color": RANDOM, "linestyle": DASHES, "markerfacecolor": PAPER, "zorder": 3}


def legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """What the marks mean, above the figure, the null last."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == RANDOM_LABEL)  # the null last
    narrow = figure.get_figwidth() * 72 < WIDE
    if _GIVEN.get() is not None:  # whose figure may have other panels
        for text in axes.legend([handles[i] for i in order], [_label(labels[i]) for i in order]).get_texts():
            text.set_parse_math(False)
        return
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper left",
        ncols=min(columns, 2) if narrow else columns,
        handlelength=2.2,
        columnspacing=1.2,
        borderpad=0.1,
        borderaxespad=0.0,
    )


def mark_layer(axes: Axes, layer: int) -> None:
    """A line at the layer that is used, if it is in sight."""
    low, high = axes.get_xlim()
    if not low <= layer <= high:
        return
    right = layer > (low + high) / 2
    axes.axvline(layer, **DOTTED)
    axes.annotate(
        f"layer {layer}, used",
        (layer, 1.0),
        (-5 if right else 5, 0),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
        color=MUTED,
        fontsize=12,
    )


def line_with_intervals(
    axes: Axes, points: Sequence[Mapping[str, Any]], quantity: str, style: Mapping[str, Any], label: str
) -> None:
    """Points of a curve by their ``coefficient``, each with the interval of a quantity, joined by a line and a band."""
    x = [point["coefficient"] for point in points]
    estimates = [point[quantity] for point in points]
    lows, highs = [e["low"] for e in estimates], [e["high"] for e in estimates]
    axes.fill_between(x, lows, highs, color=style["color"], alpha=0.16, linewidth=0, zorder=style["zorder"] - 2)
    axes.errorbar(x, [e["mean"] for e in estimates], yerr=reach(estimates), markersize=7, label=label, **style, **BAR)


def dots(axes: Axes, places: Iterable[tuple[Place, Place]], style: Mapping[str, Any], label: str | None = None) -> None:
    """Pairs of numbers or estimates, not joined; estimates have the bars of their intervals."""
    given: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 8, **BAR, **style, "label": label}
    for name, values in zip("xy", zip(*places, strict=True), strict=False):
        estimates = [each for each in values if isinstance(each, Mapping)]
        if estimates:
            given[f"{name}err"] = reach(estimates)
        given[name] = [each["mean"] for each in estimates] or values
    if "x" in given:
        axes.errorbar(**given)


def reach(estimates: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Distances from the means to the ends of the intervals, as matplotlib wants them."""
    return [
        [max(0.0, e["mean"] - e["low"]) for e in estimates],
        [max(0.0, e["high"] - e["mean"]) for e in estimates],
    ]


def square_of_percent(axes: Axes, title: str, xlabel: str) -> None:
    """Two scales from 0 to 100 against each other, with the line on which both are equal."""
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1.5, zorder=2)
    axes.set(
        title=title,
        xlabel=xlabel,
        xlim=(-4, 104),
        ylim=(-4, 104),
        xticks=range(0, 101, 20),
        yticks=range(0, 101, 20),
        aspect="equal",
    )
    axes.grid(True, axis="both", color=GRID)

"""From a matplotlib figure to an SVG that belongs to the page: its colours, its fonts, nothing from elsewhere."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from persona_lens.characters import isolated, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Figures are drawn in these stand-ins; in the SVG each becomes a CSS variable, which the page sets for light and dark.
INK = "#010101"
MUTED = "#020202"
GRID = "#030303"
PAPER = "#040404"
VECTOR = "#050505"
RANDOM = "#060606"
THIRD = "#070707"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--rule)",
    PAPER: "var(--paper)",
    VECTOR: "var(--vector)",
    RANDOM: "var(--random)",
    THIRD: "var(--third)",
}
_SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 13,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 13,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",  # measures the text and ships with matplotlib; the page's own font is shown
    "font.size": 13,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "legend.frameon": False,
    "legend.fontsize": 13,
    "lines.linewidth": 2,
    "svg.fonttype": "none",
    "svg.hashsalt": "persona-lens",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelsize": 13,
    "xtick.major.size": 4,
    "ytick.color": MUTED,
    "ytick.labelsize": 13,
    "ytick.major.size": 0,
}
MAX_LABEL = 200  # characters
_UNIQUE = re.compile(r"#(\w+)")
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_FAMILY = re.compile(r"font-family: [^;]*;? ?")
_NO_ROTATION = re.compile(r"rotate\(-?0(\.0)? ")


@contextmanager
def drawing_style() -> Iterator[None]:
    """Draw with the report's settings, whatever the user's matplotlibrc says, and leave theirs as they were."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def to_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an inline SVG element.

    Args:
        figure: Drawn in the colours of this module, inside `drawing_style`.
        name: Unique in the page; every id in the SVG begins with it.
        title: Accessible name.
        description: What there is to see, for who does not see it.
    """
    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    _shorten(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's font has others
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(printable(written.getvalue()))  # XML knows no control characters
    _localise(root, name)
    for unwanted in [e for e in root if e.tag == "metadata" or e.find("style") is not None]:
        root.remove(unwanted)
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update(
        {"viewBox": view, "role": "img", "aria-labelledby": f"{name}-title", "aria-describedby": f"{name}-desc"}
    )
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = isolated(printable(text))
        root.insert(position, element)
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


def _labelled(label: Callable[[Any, Any], str], value: Any, place: Any = None) -> str:
    return _label(str(label(value, place)))


def _label(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= MAX_LABEL else f"{shown[: MAX_LABEL - 1]}…"


def _localise(root: ElementTree.Element, name: str) -> None:
    """Plain tag names; ids that only this figure has, and only where they are used; the page's colours and font."""
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
        element.attrib.update({key: _rewritten(key, value, name) for key, value in attributes.items()})


def _rewritten(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key in ("href", "clip-path"):
        return _UNIQUE.sub(rf"#{name}-\1", value)
    if key == "style":
        coloured = _COLOUR.sub(lambda match: _VARIABLES.get(match[0], match[0]), value)
        return _FAMILY.sub("", coloured)
    return " ".join(value.split()) if key == "d" else value

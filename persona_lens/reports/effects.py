"""The page of a crossing: what steering along each trait does to all of them, and how alike their vectors are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import counted, printable
from persona_lens.reports import svg
from persona_lens.reports.page import Headline, bounds, number, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHANCE = 2.0  # standard deviations of a random cosine: the band in which about 95% of them lie
MEASURES = ("score", "text_projection", "steered_projection")
_MOST_COLOUR = 45  # percent of colour in the strongest cell: more would hide its numbers

Summary = Mapping[str, Any]
Cell = Mapping[str, Any]


def render_effects(summary: Summary, version: str = "") -> str:
    """A page on a crossing; see `persona_lens.reports.page.render`.

    Args:
        summary: JSON values as in the run's ``summary.json``, see `persona_lens.steering.CrossEffects.to_json`.
        version: Of persona-lens, to be named on the page.
    """
    cells = {(cell["steering"], cell["trait"]): cell for cell in summary["cells"]}
    parts = {
        **summary,
        "matrix": cells,
        "strongest": {measure: _strongest(summary["cells"], measure) for measure in MEASURES},
        "result": headline(summary),
        "null": any(cell["score"] and cell["score"]["random"] for cell in summary["cells"]),
        "chance": CHANCE * summary["cosines"]["null_std"],
        "figures": _draw_figures(summary),
        "version": version,
    }
    return render("effects.html.j2", parts, {"beyond": _beyond, "tint": _tint})


def _beyond(text: str, name: str) -> str:
    """What a steering's text says beyond its name: ``@18:+2`` of ``optimistic@18:+2``."""
    return text.removeprefix(name) or text


def headline(summary: Summary) -> Headline:
    """The result in words, no stronger than the intervals allow.

    It is ``clear`` if every steering along a measured trait clearly moves that trait, ``no-null`` if there is nothing
    to hold it against, ``unclear`` otherwise.
    """
    scored = [cell for cell in summary["cells"] if cell["score"]]
    own, other = ([cell for cell in scored if cell["own"] is mine] for mine in (True, False))
    asked = counted(len(summary["questions"]), "held-out question")
    if not any(cell["score"]["difference"] for cell in scored):
        return Headline(
            "no-null",
            "Nothing to compare it with",
            (f"{asked} were asked, but no random directions were run: any push of that strength might do the same.",),
        )
    moved, spilt = ([cell for cell in cells if cell["score"]["clear"]] for cells in (own, other))
    parts = []
    if own:
        whose = "its own trait" if len(own) == 1 else "their own traits"
        parts.append(f"{len(moved)} of {counted(len(own), 'steering')} clearly {_verb(len(moved))} {whose}")
    if other:
        parts.append(f"{len(spilt)} of {counted(len(other), 'other cell')} {_verb(len(spilt))} clearly")
    sentences = [
        f"All steerings answered the same {asked}. A change counts as clear if its own 95% interval and that of its "
        "difference from random directions lie on the same side of zero."
    ]
    if spilt:
        most = max(spilt, key=lambda cell: abs(cell["score"]["vector"]["mean"]))
        sentences.append(
            f"The largest clear side effect: steering {most['steering']} changes {most['trait']} by "
            f"{bounds(most['score']['vector'], sign=True)}, random directions by "
            f"{bounds(most['score']['random'], sign=True)}."
        )
    if other:
        sentences.append("Of cells in which nothing happens, about one in twenty may look clear by chance.")
    verdict = "clear" if own and len(moved) == len(own) else "unclear"
    return Headline(verdict, "; ".join(parts) or "No response has a score", tuple(sentences))


def _verb(count: int) -> str:
    return "moves" if count == 1 else "move"


def _strongest(cells: Sequence[Cell], measure: str) -> float:
    """The largest change, whose cell has the strongest colour."""
    return max((abs(cell[measure]["vector"]["mean"]) for cell in cells if cell[measure]), default=0.0)


def _tint(value: float, strongest: float = 1.0) -> str:
    """The CSS variables of a cell: the colour by its sign, and how strong it is."""
    colour = "var(--vector)" if value >= 0 else "var(--third)"
    share = abs(value) / strongest if strongest else 0.0
    return f"--tint:{colour};--share:{share * _MOST_COLOUR:.0f}%"


@svg.figures
def _draw_figures(summary: Summary) -> Iterator[svg.Drawn]:
    found = summary["cosines"]
    if len(found["traits"]) < 2:
        return
    layers = {trait["name"]: trait["layer"] for trait in summary["traits"]}
    band = CHANCE * found["null_std"]
    pairs = _pairs(found)
    said = "; ".join(
        f"{one} and {other} from {number(min(known), 2)} to {number(max(known), 2)}"
        for (one, other), values in pairs
        if (known := [value for value in values if value is not None])
    )
    words = (
        f"Cosine of each pair of vectors over {counted(len(found['cosines']), 'layer')}: {printable(said)}. "
        f"Random directions: within {number(band, 3)} of 0."
    )
    yield svg.draw("cosines", "Cosines by layer", words, cosine_figure, pairs, layers, band)


def _pairs(found: Mapping[str, Any]) -> list[tuple[tuple[str, str], list[float | None]]]:
    return [
        ((one, other), [matrix[i][j] for matrix in found["cosines"]])
        for (i, one), (j, other) in combinations(enumerate(found["traits"]), 2)
    ]


def cosine_figure(
    pairs: Sequence[tuple[tuple[str, str], Sequence[float | None]]],
    layers: Mapping[str, int],
    band: float,
    width: int,
) -> Figure:
    """One panel a pair: its cosine at each layer, the band of random directions, and the layers that were read."""
    columns = min(len(pairs), 3 if width == svg.WIDE else 2)
    rows = -(-len(pairs) // columns)
    figure = svg.new_figure(width, 30 + (190 if width == svg.WIDE else 170) * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    values = [value for _, each in pairs for value in each if value is not None]
    low, high = min([-1.5 * band, *values]), max([1.5 * band, *values])
    room = 0.06 * (high - low)
    for number_, axes in enumerate(panels):
        if number_ >= len(pairs):
            axes.set_visible(False)
            continue
        (one, other), cosine = pairs[number_]
        _panel(axes, cosine, sorted({layers[one], layers[other]}), band)
        axes.set(ylim=(low - room, min(high + room, 1.05)))
        fit = 15 if width == svg.WIDE else 13
        axes.set_title(f"{_short(one, fit)}\n{_short(other, fit)}", fontsize=12)
        if number_ + columns >= len(pairs):
            axes.set_xlabel("layer")
            axes.xaxis.set_tick_params(labelbottom=True)
    return figure


def _panel(axes: Axes, cosine: Sequence[float | None], marked: Sequence[int], band: float) -> None:
    axes.axhspan(-band, band, color=svg.RANDOM, alpha=0.22, linewidth=0)
    axes.axhline(0, **svg.ZERO)
    for layer in marked:
        axes.axvline(layer, **svg.DOTTED)
    axes.plot(range(len(cosine)), [float("nan") if v is None else v for v in cosine], color=svg.VECTOR, zorder=3)
    axes.set_xlim(-0.5, len(cosine) - 0.5)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.grid(True, axis="y")


def _short(name: str, most: int) -> str:
    shown = printable(name)
    return shown if len(shown) <= most else shown[: most - 1] + "…"

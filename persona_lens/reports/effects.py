"""The page of a crossing: what steering along each trait does to all of them, and how alike their vectors are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import counted, printable
from persona_lens.reports import steering, svg
from persona_lens.reports.page import Headline, Steps, bounds, over, resting_on, shell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHANCE = 2.0  # standard deviations of a random cosine: the band in which about 95% of them lie
MEASURES = ("score", "text_projection", "steered_projection")
_MOST_COLOUR = 45  # percent of colour in the strongest cell: more would hide its numbers

Summary = Mapping[str, Any]
Cell = Mapping[str, Any]


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary, which is JSON values as in the run's ``summary.json``."""
    return {
        "matrix": {(cell["steering"], cell["trait"]): cell for cell in summary["cells"]},
        "strongest": {measure: _strongest(summary["cells"], measure) for measure in MEASURES},
        "null": any(cell["score"] and cell["score"]["random"] for cell in summary["cells"]),
        "chance": CHANCE * summary["cosines"]["null_std"],
        "pairs": _pairs(summary["cosines"]),
    }


def next_steps(summary: Summary, folder: str) -> Steps:
    """What one may want to do next with the run's folder."""
    model = summary["model"]["model"]
    return [
        (
            "Find the layer and strength for one of the traits, and what they do on questions held back.",
            shell("persona-lens", "steer", "tune", model, "VECTORS"),
        ),
        ("List this run beside the others.", shell("persona-lens", "runs", str(PurePath(folder).parent))),
    ]


def figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    layers = {trait["name"]: trait["layer"] for trait in summary["traits"]}
    pairs, chance = _pairs(summary["cosines"]), CHANCE * summary["cosines"]["null_std"]
    rows = [
        (f"{cell['steering']} → {cell['trait']}", cell["score"]["vector"], cell["score"]["random"])
        for cell in summary["cells"]
        if cell["score"]
    ]
    found: svg.Wanted = {"changes": (steering.changes_figure, rows)} if rows else {}
    return {**found, "cosines": (cosine_figure, pairs, layers, chance)} if pairs else found


def beyond(text: str, name: str) -> str:
    """What a steering's text says beyond its name: ``@18:+2`` of ``optimistic@18:+2``."""
    return text.removeprefix(name) or text


@resting_on(over("held-out question", "questions"))
def headline(summary: Summary) -> Headline:
    """The result in words, no stronger than the intervals allow.

    It is ``clear`` if every steering along a measured trait clearly moves that trait, ``no null`` if there is nothing
    to hold it against, ``unclear`` otherwise.
    """
    scored = [cell for cell in summary["cells"] if cell["score"]]
    own, other = ([cell for cell in scored if cell["own"] is mine] for mine in (True, False))
    asked = counted(len(summary["questions"]), "held-out question")
    if not any(cell["score"]["difference"] for cell in scored):
        return Headline(
            "no null",
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


def tint(value: float, strongest: float = 1.0) -> str:
    """The CSS variables of a cell: the colour by its sign, and how strong it is."""
    colour = "var(--vector)" if value >= 0 else "var(--third)"
    share = abs(value) / strongest if strongest else 0.0
    return f"--tint:{colour};--share:{share * _MOST_COLOUR:.0f}%"


def _pairs(found: Summary) -> list[dict[str, Any]]:
    """Each pair of traits: their ``names``, their cosine ``by_layer``, and which of these are ``known``."""
    pairs = []
    for (i, one), (j, other) in combinations(enumerate(found["traits"]), 2):
        by_layer = [matrix[i][j] for matrix in found["cosines"]]
        known = [value for value in by_layer if value is not None]
        pairs.append({"names": (one, other), "by_layer": by_layer, "known": known})
    return pairs


def cosine_figure(pairs: Sequence[Summary], layers: Mapping[str, int], band: float, width: int) -> Figure:
    """One panel a pair: its cosine at each layer, the band of random directions, and the layers that were read."""
    columns, fit = (3, 15) if width == svg.WIDE else (2, 13)
    columns = min(len(pairs), columns)
    rows = -(-len(pairs) // columns)
    figure = svg.new_figure(width, 30 + (190 if width == svg.WIDE else 170) * rows)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    values = [value for each in pairs for value in each["known"]]
    low, high = min([-1.5 * band, *values]), max([1.5 * band, *values])
    room = 0.06 * (high - low)
    for axes, pair in zip(panels, pairs, strict=False):
        axes.axhspan(-band, band, color=svg.RANDOM, alpha=0.22, linewidth=0)
        axes.axhline(0, **svg.ZERO)
        for layer in {layers[name] for name in pair["names"]}:
            axes.axvline(layer, **svg.DOTTED)
        cosines = [float("nan") if value is None else value for value in pair["by_layer"]]
        axes.plot(range(len(cosines)), cosines, color=svg.VECTOR, zorder=3)
        axes.set(xlim=(-0.5, len(cosines) - 0.5), ylim=(low - room, min(high + room, 1.05)))
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.set_title("\n".join(_short(name, fit) for name in pair["names"]), fontsize=12)
    for axes in panels[len(pairs) :]:
        axes.set_visible(False)
    for axes in panels[len(pairs) - columns : len(pairs)]:  # the lowest of each column
        axes.set_xlabel("layer")
        axes.xaxis.set_tick_params(labelbottom=True)
    return figure


def _short(name: str, most: int) -> str:
    shown = printable(name)
    return shown if len(shown) <= most else shown[: most - 1] + "…"

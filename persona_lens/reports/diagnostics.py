"""Diagnostics of vectors by layer: what each is called, their figure and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.reports import svg
from persona_lens.reports.page import NONE, Tables, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]

NAMES = {
    "consistency": "consistency",
    "d_prime": "d′",
    "halves": "halves",
    "relative_norm": "relative length",
    "logit_rise": "logit rise",
    "accessibility": "accessibility",
}
TITLES = {
    "consistency": "Consistency, mean cosine",
    "halves": "Agreement of halves, cosine",
    "relative_norm": "Length over the residual’s",
    "logit_rise": "Logit rise, times random",
    "accessibility": "Accessibility, d′",
}


def known(rows: Sequence[Summary], measures: Mapping[str, str] = NAMES) -> list[str]:
    """The measures that are known of some layer."""
    return [name for name in measures if any(row.get(name) is not None for row in rows)]


def figures(summary: Summary) -> svg.Wanted:
    """The figure of what an extraction found, if it found any of it."""
    rows = (summary.get("diagnostics") or {}).get("layers", [])
    return {"diagnostics": (diagnostics_figure, rows)} if known(rows, TITLES) else {}


def diagnostics_figure(rows: Sequence[Summary], width: int) -> Figure:
    """Each measure by layer, with what 95% of cases stay below by chance."""
    names = known(rows, TITLES)
    columns = 2 if width == svg.WIDE and len(names) > 1 else 1
    lines = -(-len(names) // columns)
    figure, panels = svg.panels(width, 90 + 200 * lines, None, lines, columns)
    for axes, name in zip(panels, names, strict=False):
        for key, style in ((f"{name}_null", svg.NULL), (name, svg.LINE)):
            points = [(row["layer"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                label = svg.VECTOR_LABEL if key == name else "19 of 20 by chance stay below"
                axes.plot(*zip(*points, strict=True), **{**style, "marker": ""}, label=label)
        axes.set(title=TITLES[name], xlabel="layer")
        axes.margins(x=0.02, y=0.15)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    svg.legend(figure, panels[0])
    return figure


def tables(summary: Summary) -> Tables:
    """One of a row a layer; none where nothing was measured."""
    rows = (summary.get("diagnostics") or {}).get("layers", [])
    names = known(rows)
    if not names:
        return []
    cells = [[str(row["layer"]), *(beside_null(row, name) for name in names)] for row in rows]
    title = "What may foretell steering, by layer; in brackets what 95% of cases stay below by chance"
    return [(title, ["layer", *(NAMES[name] for name in names)], cells)]


def beside_null(row: Summary, name: str) -> str:
    """A measure with its null in brackets, if it has one."""
    value, null = number(row.get(name), 2), row.get(f"{name}_null")
    return value if value == NONE or null is None else f"{value} ({number(null, 2)})"

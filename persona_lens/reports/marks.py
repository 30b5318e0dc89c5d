"""What figures are made of: points with their intervals, the null's own look, legends, the layer that is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.reports.drawing import WIDE
from persona_lens.reports.svg import GRID, MUTED, PAPER, RANDOM, VECTOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VECTOR_LABEL, RANDOM_LABEL = "trait vector", "random directions"
BAR: dict[str, Any] = {"elinewidth": 2, "capsize": 4, "capthick": 2}
LINE: dict[str, Any] = {"marker": "o", "color": VECTOR, "zorder": 4}
DASHES = (0, (4, 2))
NULL: dict[str, Any] = {"marker": "s", "color": RANDOM, "linestyle": DASHES, "markerfacecolor": PAPER, "zorder": 3}


def legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """What the marks mean, above the figure, the null last."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == RANDOM_LABEL)  # the null last
    narrow = figure.get_figwidth() * 72 < WIDE
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
    axes.axvline(layer, color=MUTED, linewidth=1.5, linestyle=(0, (1, 2)), zorder=1)
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


def points_with_intervals(
    axes: Axes, x: Sequence[float], estimates: Sequence[Mapping[str, Any]], style: Mapping[str, Any], label: str
) -> None:
    """Estimates with their intervals, not joined."""
    means = [e["mean"] for e in estimates]
    axes.errorbar(x, means, yerr=reach(estimates), markersize=8, **{"linestyle": "", **style}, **BAR, label=label)


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

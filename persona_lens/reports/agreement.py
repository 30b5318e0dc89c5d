"""The page that compares two judges: every score of one against the other's, and how far apart they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import sqrt
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import counted, printable
from persona_lens.judging.agreement import Agreement
from persona_lens.reports import svg
from persona_lens.reports.page import Headline, amount, number, plain, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 10  # responses that the judges disagree on most
_MOST = 25  # responses in one place, beyond which a dot grows no more


def render_agreement(agreement: Agreement, version: str = "") -> str:
    """A page on how far two judges agree; see `persona_lens.reports.page.render`.

    Args:
        agreement: What `persona_lens.judging.agreement.compare` found.
        version: Of persona-lens, to be named on the page.
    """
    parts = {
        **agreement.to_json(),
        "figures": svg.Drawn({"scatter": (scatter_figure, agreement), "difference": (difference_figure, agreement)}),
        "outside": _outside(agreement),
        "disagreed": agreement.most_disagreed(_SHOWN),
        "version": version,
        "result": headline(agreement),
    }
    return render("agreement.html.j2", parts)


def headline(agreement: Agreement) -> Headline:
    """How alike the two judges see the responses."""
    found, same = agreement.to_json(), agreement.to_json()["same_side"]
    if found["pearson"]["value"] is None:
        title = f"No correlation can be given: {found['pearson']['reason']}"
    else:
        title = (
            f"The scores correlate with r = {number(found['pearson']['value'], 2)}, and "
            f"{number(same['value'], 0, percent=True)} of the responses are on the same side of "
            f"{plain(found['cuts']['threshold'])}"
        )
    scored, questions = counted(found["counts"]["scored"], "response"), amount(found["questions"], "question")
    first, second = map(printable, found["names"])
    return Headline("", title, (), f"{scored} to {questions} with both scores, by {first} and by {second}")


def _outside(agreement: Agreement) -> int | None:
    """Responses beyond the limits of agreement; None where there are no limits."""
    low, high = agreement.lower_limit.value, agreement.upper_limit.value
    if low is None or high is None:
        return None
    return sum(not low <= pair.difference <= high for pair in agreement.pairs)


def scatter_figure(agreement: Agreement, width: int) -> Figure:
    """One judge's score against the other's, with the line on which they are equal and the threshold."""
    figure, axes = svg.panel(width, 470, 350)
    threshold = agreement.cuts.threshold
    axes.axvline(threshold, **svg.DOTTED)
    axes.axhline(threshold, **svg.DOTTED)
    svg.square_of_percent(axes, "Score of the second judge", "score of the first judge")
    _dots(axes, ((pair.first, pair.second) for pair in agreement.pairs), width)
    return figure


def difference_figure(agreement: Agreement, width: int) -> Figure:
    """Bland and Altman's plot: difference against mean, with the mean difference and the limits of agreement."""
    figure, axes = svg.panel(width, 400, 360)
    axes.axhline(0, **svg.ZERO)
    _dots(axes, (((pair.first + pair.second) / 2, pair.difference) for pair in agreement.pairs), width)
    lines = [
        (measure.value, label, colour, dashes)
        for measure, label, colour, dashes in (
            (agreement.upper_limit, "upper limit", svg.RANDOM, svg.DASHES),
            (agreement.mean_difference, "mean", svg.INK, "solid"),
            (agreement.lower_limit, "lower limit", svg.RANDOM, svg.DASHES),
        )
        if measure.value is not None
    ]
    ends = [0.0, *(pair.difference for pair in agreement.pairs), *(value for value, *_ in lines)]
    room = max(0.12 * (max(ends) - min(ends)), 4.0)
    apart = 0.06 * (max(ends) - min(ends) + 2 * room)
    for place, (value, label, colour, dashes) in enumerate(lines):
        axes.axhline(value, color=colour, linewidth=2, linestyle=dashes, zorder=4)
        # Limits close to the mean keep their words apart from it.
        mean = lines[1][0]
        height = (max(value, mean + apart), mean, min(value, mean - apart))[place]
        words = f"{label} {number(value, 1, sign=True)}"
        svg.note(axes, (1.0, height), words, (5, 0), va="center", color=colour, annotation_clip=False)
    axes.set(
        title="Second minus first, points",
        xlabel="mean of the two scores",
        xlim=(-4, 104),
        ylim=(min(ends) - room, max(ends) + room),
        xticks=range(0, 101, 20),
    )
    axes.yaxis.set_major_formatter(lambda value, _: number(value, 0, sign=True))
    return figure


def _dots(axes: Axes, points: Iterable[tuple[float, float]], width: int) -> None:
    """One dot for each place in whole points, its area in proportion to how many are there: no page grows endless."""
    places = Counter((round(x), round(y)) for x, y in points)
    by_size: dict[int, list[tuple[int, int]]] = {}
    for place, found in places.items():
        by_size.setdefault(min(found, _MOST), []).append(place)
    style: dict[str, Any] = {"linestyle": "", "marker": "o", "color": svg.VECTOR, "alpha": 0.55, "markeredgewidth": 0}
    for found, members in sorted(by_size.items()):
        size = (6 if width == svg.WIDE else 4.5) * sqrt(found)
        axes.plot([x for x, _ in members], [y for _, y in members], markersize=size, zorder=3, **style)

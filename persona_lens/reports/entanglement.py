"""What else moves, method by method: the sentences, the table of what directions detect, and the heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import capital, counted, listed
from persona_lens.reports import svg
from persona_lens.reports.page import bounds, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
_COLUMNS = {svg.WIDE: 3, svg.NARROW: 2}
_MOST_COLOUR = 0.45  # more would hide the numbers


def detections(summary: Summary) -> tuple[list[str], list[tuple[str, list[Summary | None]]]]:
    """The traits whose runs are there; and of each method, the judge and random directions what it detects in them."""
    found = {name: each["detection"] for name, each in summary["traits"].items() if each["detection"]}
    if not found:
        return [], []
    rows = [(name, [each["methods"].get(name) for each in found.values()]) for name in summary["methods"]]
    rows.append(("judge", [each["judge"] for each in found.values()]))
    random = [None if each["random"] is None else {"auc": each["random"], "low": None} for each in found.values()]
    return list(found), [*rows, ("19 of 20 random directions, below", random)]


def label(way: Summary) -> str:
    """What a way is called, with its strength."""
    return str(way["name"]) if way["strength"] is None else f"{way['name']} at {way['strength']:g}"


def overall(summary: Summary) -> list[Summary]:
    """The ways, and before those of each strength what random directions come to, as if they were one."""
    found: list[Summary] = []
    null = {way["strength"]: way for way in _first_of_each_strength(summary)}
    for way in summary["ways"]:
        if way["strength"] in null and (not found or found[-1]["strength"] != way["strength"]):
            first = null[way["strength"]]
            sides = {
                name: first[name] and {"vector": first[name]["random"], "difference": None} for name in ("on", "off")
            }
            about = {"name": "random directions", "strength": way["strength"], "harmonic": first["random_harmonic"]}
            found.append({**about, **sides, "entanglement": None, "random_entanglement": None})
        found.append(way)
    return found


def sentences(summary: Summary) -> list[str]:
    """What the ways come to over all traits, in words no stronger than the intervals allow."""
    asking, *ways = summary["ways"]
    over = f"over {counted(len(summary['traits']), 'trait')}, towards {summary['towards']} of each"
    found = []
    if asking["on"]:
        ratio = (
            asking["entanglement"]
            and f"; for each point of that the others move by {bounds(asking['entanglement'], 2)}"
        )
        found.append(
            f"System prompts change scores, {over}, by {bounds(asking['on']['vector'], sign=True)}{ratio or ''}."
        )
    by_strength: dict[float, list[Summary]] = {}
    for way in ways:
        if way["on"]:
            by_strength.setdefault(way["strength"], []).append(way)
    for strength, own in by_strength.items():
        found += [*_of_one(over, strength, own), *_less(summary, strength)]
    return found


def _less(summary: Summary, strength: float) -> list[str]:
    """Which ways are less entangled than which."""
    found: dict[str, list[str]] = {}
    for pair in summary["pairs"]:
        if pair["strength"] == strength and (better := pair["better"]["entanglement"]):
            found.setdefault(better, []).append(pair["other"] if better == pair["one"] else pair["one"])
    said = "; ".join(f"{name} than {listed(others)}" for name, others in found.items())
    return [f"Clearly less entangled at {strength:g}: {said}."] if said else []


def _of_one(over: str, strength: float, ways: Sequence[Summary]) -> list[str]:
    moved = sorted(ways, key=lambda way: -way["on"]["vector"]["mean"])
    on = ", ".join(f"{way['name']} {bounds(way['on']['vector'], sign=True)}" for way in moved)
    null = next((way["on"]["random"] for way in ways if way["on"]["random"]), None)
    beside = f"; random directions {bounds(null, sign=True)}" if null else ""
    found = [f"At {strength:g} of the residual's length scores change, {over}, by: {on}{beside}."]
    told = sorted((way for way in ways if way["entanglement"]), key=lambda way: way["entanglement"]["mean"])
    if told:
        ratios = ", ".join(f"{way['name']} {bounds(way['entanglement'], 2)}" for way in told)
        found.append(f"For each point of that the other traits move by, root mean square: {ratios}.")
    more = [way["name"] for way in ways if way["off"] and way["off"]["clear"] == 1]
    if more:
        found.append(
            f"{capital(listed(more))} {'moves' if len(more) == 1 else 'move'} the other traits clearly more than "
            "random directions of that length do."
        )
    elif any(way["off"] and way["off"]["difference"] for way in ways):
        found.append("No method moves the other traits clearly more than random directions of that length do.")
    if broken := [way["name"] for way in ways if way["held"] < len(way["traits"])]:
        found.append(f"The text of {listed(broken)} falls apart there, of one trait at least.")
    return found


def figure(summary: Summary, width: int) -> Figure:
    """A panel for each way: what steering along a trait, down, changes of the score of one, across."""
    traits = list(summary["traits"])
    panels: list[tuple[str, list[str], Mapping[str, Summary]]] = [
        (label(way), list(way["traits"]), way["changes"]) for way in summary["ways"]
    ]
    for way in _first_of_each_strength(summary):
        null = {judged: cell and {**cell, "vector": cell["random"]} for judged, cell in _row(way).items()}
        panels.append((f"random at {way['strength']:g}", [""], {"": null}))
    cells = [cell for _, _, rows in panels for row in rows.values() for cell in row.values() if cell]
    most = max((abs(cell["vector"]["mean"]) for cell in cells), default=0.0) or 1.0
    columns = _COLUMNS.get(width, 3)
    rows = -(-len(panels) // columns)
    height = 60 + rows * (70 + 36 * len(traits))
    drawn, axes = svg.panels(width, height, height, rows, columns)
    for place, (title, steered, changes) in enumerate(panels):
        _heat(axes[place], title, steered, traits, changes, most, named=place % columns == 0 or steered == [""])
    for spare in axes[len(panels) :]:
        spare.set_visible(False)
    return drawn


def _first_of_each_strength(summary: Summary) -> list[Summary]:
    """The ways whose cells hold what random directions change: the same for all of one strength."""
    found: dict[float, Summary] = {}
    for way in summary["ways"]:
        if (
            way["strength"] is not None
            and way["traits"]
            and any(cell and cell["random"] for cell in _row(way).values())
        ):
            found.setdefault(way["strength"], way)
    return list(found.values())


def _row(way: Summary) -> Mapping[str, Any]:
    found: Mapping[str, Any] = way["changes"][way["traits"][0]]
    return found


def _heat(
    axes: Axes,
    title: str,
    steered: Sequence[str],
    traits: Sequence[str],
    changes: Mapping[str, Mapping[str, Any]],
    most: float,
    *,
    named: bool,
) -> None:
    """One panel; a cell's colour is its sign, its strength its size, and a clear change is written in bold."""
    from matplotlib.patches import Rectangle

    for row, trait in enumerate(steered):
        for column, judged in enumerate(traits):
            cell = changes[trait][judged]
            if not cell or not cell["vector"]:
                continue
            mean = cell["vector"]["mean"]
            colour, share = svg.VECTOR if mean >= 0 else svg.THIRD, _MOST_COLOUR * abs(mean) / most
            edge = svg.INK if trait == judged else "none"
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, alpha=share, linewidth=0))
            axes.add_patch(
                Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor=edge, linewidth=1.5)
            )
            weight = "bold" if cell.get("clear") and trait else "normal"
            axes.text(column, row, number(mean, 0, sign=True), ha="center", va="center", fontsize=12, fontweight=weight)
    axes.set(xlim=(-0.5, len(traits) - 0.5), ylim=(len(steered) - 0.5, -0.5))
    axes.set_xticks(range(len(traits)), [_short(name) for name in traits], fontsize=10, parse_math=False)
    axes.set_yticks(
        range(len(steered)), [_short(name) if named else "" for name in steered], fontsize=10, parse_math=False
    )
    axes.grid(False)
    axes.set_title(title, fontsize=12, parse_math=False)


def _short(name: str) -> str:
    return name if len(name) <= 9 else name[:8] + "…"

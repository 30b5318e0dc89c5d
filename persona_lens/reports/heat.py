"""Heat maps of a tuning run: layer by strength, as tables that are coloured, so that everybody can read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Summary = Mapping[str, Any]
Value = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A layer and a strength.

    Attributes:
        layer: Block index.
        coefficient: Multiple of the raw vector.
        push: Length of the step over that of the residual.
        value: Change of the trait score with its interval; None if no response has a score.
        shade: How full the colour is, 0 to 100.
        side: ``more``, ``less`` or nothing: which colour.
        fallen: Whether the text falls apart here.
        chosen: Whether this is the place that was taken.
    """

    layer: int
    coefficient: float
    push: float
    value: Value | None
    shade: int
    side: str
    fallen: bool
    chosen: bool


@dataclass(frozen=True)
class HeatMap:
    """One table.

    Attributes:
        pushes: The columns: strengths that were asked for.
        rows: Each layer's cells, None where there is none.
    """

    pushes: tuple[float, ...]
    rows: tuple[tuple[int, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class HeatMaps:
    """What steering does, and what random directions of the same length do, in the same colours.

    Attributes:
        limit: Change of the score at which the colour is fullest, in either direction.
        vector: Along the trait vector.
        random: Along random directions; None without them.
    """

    limit: float
    vector: HeatMap
    random: HeatMap | None


def heat_maps(summary: Summary) -> HeatMaps:
    """Both heat maps of a summary's surface."""
    effects = [point["effect"] for point in summary["surface"] if point["effect"]]
    values = [effect[key]["mean"] for effect in effects for key in ("change", "random") if effect[key]]
    limit = max([1.0, *map(abs, values)])
    null = any(effect["random"] for effect in effects)
    return HeatMaps(limit, _heat_map(summary, "change", limit), _heat_map(summary, "random", limit) if null else None)


def _heat_map(summary: Summary, key: str, limit: float) -> HeatMap:
    pushes = tuple(sorted(summary["settings"]["pushes"]))
    rows = []
    for layer in sorted({point["layer"] for point in summary["surface"]}):
        points = [point for point in summary["surface"] if point["layer"] == layer]
        found: list[Cell | None] = [None] * len(pushes)
        for point, column in zip(points, _columns(points, pushes), strict=True):
            found[column] = _cell(point, summary["chosen"], key, limit)
        rows.append((layer, tuple(found)))
    return HeatMap(pushes, tuple(rows))


def _columns(points: Sequence[Mapping[str, Any]], pushes: Sequence[float]) -> list[int]:
    """The column of each point. Its push is the one asked for but for the rounding of its coefficient."""
    free = list(range(len(pushes)))
    columns = []
    for point in points:
        column = min(free, key=lambda i: abs(pushes[i] - point["push"]))
        free.remove(column)
        columns.append(column)
    return columns


def _cell(point: Mapping[str, Any], chosen: Mapping[str, Any], key: str, limit: float) -> Cell:
    value = point["effect"][key] if point["effect"] else None
    mean = value["mean"] if value else 0.0
    return Cell(
        layer=point["layer"],
        coefficient=point["coefficient"],
        push=point["push"],
        value=value,
        shade=round(100 * abs(mean) / limit),
        side="more" if mean > 0 else "less" if mean < 0 else "",
        fallen=key == "change" and not point["coherent"],
        chosen=(point["layer"], point["coefficient"]) == (chosen["layer"], chosen["coefficient"]),
    )

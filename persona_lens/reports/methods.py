"""The page of a comparison of methods: what each direction detects, does and moves, beside prompting and each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import capital, counted, listed
from persona_lens.reports import entanglement, steering, svg
from persona_lens.reports.page import Headline, Steps, bounds, number, over, resting_on, shell, swapped
from persona_lens.reports.persistence import BETTER, DIGITS, NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
Sides = Mapping[str, Sequence[str]]
PROMPTED = "prompted"
_COLOURS = (svg.VECTOR, svg.THIRD, svg.INK)
_MARKERS = ("o", "^", "v", "P", "X", "<", ">", "h")
_THIN = {"elinewidth": 1, "capsize": 2, "capthick": 1}  # of many bars
_SIDES = {"more": "more than prompting", "less": "less than prompting", "untold": "not to be told from prompting"}


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary, which is JSON values as in the run's ``summary.json``."""
    every, wanted = traits_of(summary), figures(summary)
    return {
        "names_of": {**NAMES, "entanglement": "entanglement, difference of squares as a root"},
        "digits": {**DIGITS, "entanglement": 2},
        "each": [
            {
                **trait,
                "measures": _measures(trait),
                "rows": list(rows_of(trait)),
                "pairs_of": trait["pairs"],
                "vectors_of": {name: _vectors(each) for name, each in trait["methods"].items()},
                "figure": next((name for name in _figures_of(place, every) if name in wanted), None),
            }
            for place, trait in enumerate(every)
        ],
        "all_pairs": summary["pairs"],  # `pairs` is a macro of all pages
        "overall": entanglement.overall(summary),
        "detected": entanglement.detections(summary),
    }


def traits_of(summary: Summary) -> list[Summary]:
    """What is told of each trait, with what holds of all."""
    return [{**summary, **each} for each in summary["traits"].values()]


def next_steps(summary: Summary, _: str) -> Steps:
    """What one may want to do next."""
    model, first = summary["model"]["model"], summary["methods"][0]
    return [
        (
            "Keep the vectors of one method, of the same run folder.",
            shell("persona-lens", "vectors", "fit", "RUN", "--method", first, "--out", "FOLDER"),
        ),
        (
            "Find the layer and strength for them.",
            shell("persona-lens", "steer", "tune", model, "FOLDER"),
        ),
    ]


def rows_of(summary: Summary) -> Iterator[dict[str, Any]]:
    """What every arm of a trait comes to, one after the other: its ``name``, ``strength``, ``means`` and ``changes``.

    Args:
        summary: One of `traits_of`.
    """
    yield {"name": "unsteered", "strength": None, "changes": None, **summary["unsteered"]}
    yield {"name": PROMPTED, "strength": None, **summary["prompted"]}
    for each in summary["random"]:
        yield {"name": "random directions", "changes": None, **each}
    for name, method in summary["methods"].items():
        for step in method["steps"]:
            yield {"name": name, **step}


def _measures(summary: Summary) -> list[str]:
    """What was measured of any arm."""
    means = [row["means"] for row in rows_of(summary)]
    return [name for name in BETTER if any(each[name] for each in means)]


def beside_prompting(summary: Summary) -> dict[float, dict[str, list[str]]]:
    """By strength which methods do ``more`` than prompting, which ``less``, and which are ``untold`` from it.

    Args:
        summary: One of `traits_of`, or that of all together.
    """
    found: dict[float, dict[str, list[str]]] = {}
    for pair in summary["pairs"]:
        if pair["other"] != PROMPTED or pair["score"] is None:
            continue
        own = found.setdefault(pair["strength"], {side: [] for side in _SIDES})
        own[{pair["one"]: "more", PROMPTED: "less"}.get(pair["better"]["score"], "untold")].append(pair["one"])
    return found


@resting_on(over("held-out question", "questions"))
def headline(summary: Summary) -> Headline:
    """Which methods do more than prompting and than each other, in words no stronger than the intervals allow.

    It is ``clear`` if any two of them, or one and prompting, can be told apart by what they do, and ``no null`` where
    no random directions were run, without which no method is said to do anything.
    """
    every = traits_of(summary)
    found = every[0] if len(every) == 1 else summary
    compared = [pair for pair in found["pairs"] if pair["score"]]
    if not compared:
        return Headline("unclear", "No result: there are no two ways whose responses have scores", ())
    told, held = beside_prompting(found), _held(summary)
    if len(every) == 1:
        sentences = [_prompting(found), *(_sentence(found, strength, each) for strength, each in told.items())]
    else:
        sentences = entanglement.sentences(summary)
    if between := [pair for pair in compared if pair["other"] != PROMPTED]:
        sentences += _apart(between) or ["No two methods can be told apart by what they do."]
    null = any(trait["random"] for trait in every)
    if not null:
        sentences.append("No random directions were run, so any direction of that length might do the same.")
    more = " and as many of entanglement" if len(every) > 1 else ""
    looked = (
        f"{counted(len(compared), 'difference')} of scores{more} {'was' if len(compared) == 1 else 'were'} looked at"
    )
    sentences.append(f"{looked}: of those that are none, about one in twenty looks clear by chance.")
    clear = any(
        pair["better"]["score"] and _holds(held, pair["better"]["score"], pair["strength"]) for pair in compared
    )
    verdict = "no null" if not null else "clear" if clear else "unclear"
    return Headline(verdict, _title(told, held), tuple(sentences))


Held = Mapping[tuple[str, float | None], bool]


def _held(summary: Summary) -> Held:
    """By method and strength, and of prompting, whether the text holds together, of all traits."""
    return {(way["name"], way["strength"]): way["held"] == len(way["traits"]) for way in summary["ways"]}


def _holds(held: Held, name: str, strength: float) -> bool:
    return held[name, None if name == PROMPTED else strength]


def _title(told: Mapping[float, Sides], held: Held) -> str:
    """What is better than prompting, those left out whose text falls apart."""
    whole = {
        strength: {**sides, "more": [name for name in sides["more"] if _holds(held, name, strength)]}
        for strength, sides in told.items()
    }
    more, less = (_where(whole, side) for side in ("more", "less"))
    if more:
        return capital(f"{listed(more)} {_does(more)} more than prompting")
    if less:
        return f"No method clearly does more than prompting; {listed(less)} {_does(less)} less"
    if any(sides["more"] for sides in told.values()):
        return "What does more than prompting breaks the text"
    return "No method can be told apart from prompting by what it does"


def _where(told: Mapping[float, Sides], side: str) -> list[str]:
    """The methods on one side of prompting, each with its strengths where there are several."""
    found: dict[str, list[str]] = {}
    for strength, sides in told.items():
        for name in sides[side]:
            found.setdefault(name, []).append(f"{strength:g}")
    return list(found) if len(told) == 1 else [f"{name} (at {listed(at)})" for name, at in found.items()]


def _prompting(summary: Summary) -> str:
    change = summary["prompted"]["changes"]["score"]
    words = f"changes the score by {bounds(change['vector'], sign=True)}" if change else "has no response with a score"
    return f"A system prompt that asks for {summary['towards']} of {summary['trait']} {words}."


def _sentence(summary: Summary, strength: float, sides: Sides) -> str:
    """What is said of the methods at one strength."""
    steps = {name: _step(each, strength) for name, each in summary["methods"].items()}
    changes = {name: step["changes"]["score"] for name, step in steps.items() if step["changes"]["score"]}
    sign = -1 if summary["towards"] == "less" else 1
    clear = [name for name, change in changes.items() if change["clear"] == sign]
    null = next((change["random"] for change in changes.values() if change["random"]), None)
    beside = f"; random directions change the score by {bounds(null, sign=True)}" if null else ""
    does = f"{len(clear)} of {counted(len(steps), 'method')} clearly {_does(clear)} something"
    said = "; ".join(
        f"{_SIDES[side]}: {', '.join(f'{name} {_bounded(changes[name])}' for name in names)}"
        for side, names in sides.items()
        if names
    )
    broken = [name for name, step in steps.items() if step["coherent"] is False]
    apart = f" The text of {listed(broken)} falls apart there, and scores of such text mean little." if broken else ""
    return f"At {strength:g} of the residual's length {does}{beside}. {capital(said)}.{apart}"


def _vectors(method: Summary) -> str:
    return f"{method['made_by']}, {method['vectors']}" if method["made_by"] else str(method["vectors"])


def _step(method: Summary, strength: float) -> Summary:
    steps: Sequence[Summary] = method["steps"]
    return next(step for step in steps if step["strength"] == strength)


def _bounded(change: Summary) -> str:
    return bounds(change["vector"], sign=True)


def _apart(between: Sequence[Summary]) -> list[str]:
    """Which methods do more than which, a sentence for each that does."""
    found: dict[tuple[float, str], list[str]] = {}
    for pair in between:
        if winner := pair["better"]["score"]:
            first = winner == pair["one"]
            loser, difference = (pair["other"], pair["score"]) if first else (pair["one"], swapped(pair["score"]))
            found.setdefault((pair["strength"], winner), []).append(f"{loser}, by {bounds(difference)}")
    return [f"At {at:g} {winner} does more than {'; than '.join(said)}." for (at, winner), said in found.items()]


def _does(names: Sequence[str]) -> str:
    return "does" if len(names) == 1 else "do"


# Figures


def figures(summary: Summary) -> svg.Wanted:
    """Of several traits first what moves besides; and of each the score against surprise, or coherence.

    Where neither was measured, the changes alone.
    """
    every = traits_of(summary)
    found: svg.Wanted = {"entanglement": (entanglement.figure, summary)} if len(every) > 1 else {}
    for place, trait in enumerate(every):
        effects, changes = _figures_of(place, every)
        measured = next((name for name in ("nll", "coherence") if name in _measures(trait)), None)
        rows = [
            (
                f"{row['name']} at {row['strength']:g}",
                row["changes"]["score"]["vector"],
                row["changes"]["score"]["random"],
            )
            for row in rows_of(trait)
            if row["strength"] is not None and row["changes"] and row["changes"]["score"]
        ]
        if measured is not None:
            found[effects] = (effects_figure, trait, measured)
        elif rows:
            found[changes] = (steering.changes_figure, rows)
    return found


def _figures_of(place: int, every: Sequence[Summary]) -> tuple[str, str]:
    """The names of a trait's figure of effects, and of that of changes."""
    behind = "" if len(every) == 1 else f"-{place + 1}"
    return f"effects{behind}", f"changes{behind}"


def effects_figure(summary: Summary, measured: str, width: int) -> Figure:
    """Trait score against surprise or coherence: a point for each method and strength, joined from weak to strong."""
    figure, axes = svg.panel(width, 470, 470)

    def draw(rows: Sequence[Summary], style: Mapping[str, Any], label: str) -> None:
        means = [row["means"] for row in rows if row["means"][measured] and row["means"]["score"]]
        svg.dots(axes, [(each[measured], each["score"]) for each in means], {**_THIN, **style}, label)

    for place, (name, method) in enumerate(summary["methods"].items()):
        style = {"color": _COLOURS[place % len(_COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}
        draw(method["steps"], {**style, "linestyle": "-", "linewidth": 1, "zorder": 4}, name)
    draw(summary["random"], svg.NULL, svg.RANDOM_LABEL)
    draw([summary["prompted"]], {"color": svg.INK, "marker": "*", "markersize": 16, "zorder": 5}, "system prompt")
    plain = {"color": svg.MUTED, "marker": "D", "markerfacecolor": svg.PAPER, "zorder": 5}
    draw([summary["unsteered"]], plain, "unsteered")
    axes.set(title="Mean trait score, 0 to 100", xlabel=NAMES[measured])
    axes.margins(x=0.08, y=0.1)
    axes.grid(True, axis="both")
    axes.xaxis.set_major_formatter(lambda value, _: number(value, 1))
    svg.legend(figure, axes, columns=4)
    return figure

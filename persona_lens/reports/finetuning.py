"""The page of a finetuning study: what each way to finetune leaves of a trait, of coherence, of what a model can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import counted
from persona_lens.reports import svg
from persona_lens.reports.page import Headline, Steps, amount, bounds, interval, number, over, resting_on, shell, side

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
PLAIN, PREVENTATIVE, NULL = "plain", "preventative", "random"
_interval = partial(interval, noun=None)  # seeds and questions are counted where the result rests on them
LOSSES = {"last": "in training", "learned": "after, as it is used", "unseen": "after, held-out data"}


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary, which is JSON values as in the run's ``summary.json``."""
    return {"losses": LOSSES}


def next_steps(summary: Summary, _: str) -> Steps:
    """What one may want to do next."""
    kept = summary["names"].get(PREVENTATIVE)
    edits = ("--method", PREVENTATIVE, "--edits", kept, "--vectors", "VECTORS") if kept else ()
    finetune = shell("persona-lens", "finetune", summary["model"], "DATA", *edits)
    moved = shell("persona-lens", "shift", summary["model"], "FINETUNED", "VECTORS")
    return [
        (f"Finetune a model{' in the way that protects' if kept else ''} and keep it.", finetune),
        ("Measure how far a finetuned model has moved along the trait.", moved),
    ]


def figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    found: svg.Wanted = {"scores": (_scores_figure, summary)}
    return {**found, "shift": (_shift_figure, summary)} if len(summary["points"]) > 1 else found


def verdicts(summary: Summary) -> list[str]:
    """The result in a few sentences, no stronger than the intervals allow."""
    found = headline(summary)
    return [f"{found.title}.", *found.sentences]


def _over_seeds(summary: Summary) -> str:
    asked = summary["settings"]
    return f"{amount(len(asked['seeds']), 'seed')}, {amount(len(asked['asked']['questions']), 'held-out question')}"


@resting_on(_over_seeds)
def headline(summary: Summary) -> Headline:
    """What plain training does, whether preventative steering holds it back, and whether random directions do too."""
    arms = summary["treatments"]
    plain, kept, null = (arms.get(name) for name in (PLAIN, PREVENTATIVE, NULL))
    if plain is None or plain["change"] is None:
        return Headline("unclear", "No result: no reply of the finetuned models has a score", ())
    seeds = counted(len(summary["settings"]["seeds"]), "seed")
    sentences = [
        f"Plain finetuning changes the mean trait score by {_interval(plain['change'], sign=True)} over {seeds} and "
        f"{counted(len(summary['settings']['asked']['questions']), 'held-out question')}."
    ]
    if not side(plain["change"]):
        return Headline("unclear", "Plain finetuning does not clearly move the trait", tuple(sentences))
    if kept is None or kept["against_plain"] is None:
        others = [name for name in arms if name not in (PLAIN, PREVENTATIVE, NULL)]
        if others:
            found = "; ".join(f"{name} {_interval(arms[name]['against_plain'], sign=True)}" for name in others)
            sentences.append(f"Of other treatments the change towards the trait beside that is: {found}.")
        said = "preventative steering at one layer was not tried" if others else "nothing was done against it"
        if kept is not None:
            said = "no reply under preventative steering has a score to set beside it"
        return Headline("no null", f"Plain finetuning moves the trait; {said}", tuple(sentences))
    sentences.append(
        f"Under preventative steering it changes by {_interval(kept['change'], sign=True)}; towards the trait that is "
        f"{_interval(kept['against_plain'], sign=True)} beside plain finetuning. Its loss in training was "
        f"{_loss(kept)}, that of plain finetuning {_loss(plain)}."
    )
    alone, beyond = null and null["against_plain"], kept["against_random"]
    title = "Preventative steering holds the trait back"
    if alone is not None and beyond is not None:
        sentences.append(
            f"A random direction of equal norm {'protects' if alone['high'] < 0 else 'does not clearly protect'}: "
            f"{_interval(alone, sign=True)} beside plain finetuning. Preventative steering differs from it by "
            f"{_interval(beyond, sign=True)}."
        )
    if kept["against_plain"]["high"] >= 0:
        verdict, title = "unclear", "Preventative steering does not clearly hold the trait back"
    elif beyond is None:
        verdict, title = "no null", f"{title}, with nothing to compare it with"
    elif beyond["high"] < 0:
        verdict, title = "clear", f"{title}, and random directions do not as much"
    else:
        verdict, title = "unclear", f"{title}, but not clearly more than random directions"
    if summary["direction"] < 0:
        sentences.append("The data teaches less of the trait, so protecting means that the score falls less.")
    return Headline(verdict, title, tuple(sentences))


def _loss(found: Summary) -> str:
    spread = found["losses"]["last"]
    if spread is None:
        return "not measured"
    return f"{number(spread['mean'], 2)} ({number(spread['low'], 2)} to {number(spread['high'], 2)} over seeds)"


def _scores_figure(summary: Summary, width: int) -> Figure:
    arms = {name: each for name, each in summary["treatments"].items() if each["score"] is not None}
    figure, axes = svg.panel(width, 70 + 46 * len(arms))
    for place, (name, found) in enumerate(arms.items()):
        colour = svg.RANDOM if name == NULL else svg.VECTOR
        svg.dots(axes, [(found["score"], place)], {"color": colour, "zorder": 4})
        seeds = [value for value in found["seeds"] if value is not None]
        axes.plot(seeds, [place + 0.28] * len(seeds), linestyle="", marker="|", markersize=9, color=svg.MUTED, zorder=3)
    if summary["base"]["score"] is not None:
        axes.axvline(summary["base"]["score"], **svg.DOTTED)
    axes.set(
        title=f"Trait score of {summary['trait']}; dotted: before finetuning",
        yticks=range(len(arms)),
        xlim=(-3, 103),
        ylim=(len(arms) - 0.4, -0.6),
    )
    axes.set_yticklabels([name if width == svg.WIDE else name.replace(", ", ",\n") for name in arms])
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    return figure


def _shift_figure(summary: Summary, width: int) -> Figure:
    figure, axes = svg.panel(width, 340)
    for point in summary["points"]:
        name = point["treatment"]
        marker = "s" if name == NULL else "D" if name == PLAIN else "o"
        style = {"marker": marker, "color": svg.RANDOM if name == NULL else svg.VECTOR, "zorder": 3}
        svg.dots(axes, [(point["shift"], point["change"])], style)
    axes.set(title="Change of the trait score", xlabel=f"shift at layer {summary['settings']['layer']}")
    axes.grid(True, axis="both")
    return figure


@resting_on(lambda summary: "")
def shift_headline(summary: Summary) -> Headline:
    """In words no stronger than what was measured."""
    told, moved = [], 0
    for trait, found in summary["traits"].items():
        at = summary["layers"].index(found["layer"]) if found["layer"] is not None else len(summary["layers"]) // 2
        for model, each in found["models"].items():
            shift, change = each["shift"][at], each["change"]
            moved += bool(side(shift))
            scored = f"; the trait score changes by {bounds(change, sign=True)}" if change else ""
            told.append(
                f"{model}: {bounds(shift, 2, sign=True)} along {trait} at layer {summary['layers'][at]}{scored}."
            )
    total = sum(len(found["models"]) for found in summary["traits"].values())
    title = f"{moved} of {counted(total, 'shift')} along a trait {'is' if moved == 1 else 'are'} clear of zero"
    return Headline("no null", title, tuple(told))


def shift_figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    return {f"{trait}": (shift_figure, trait, found, summary["layers"]) for trait, found in summary["traits"].items()}


def shift_figure(trait: str, found: Summary, layers: Sequence[int], width: int) -> Figure:
    """How far each model has moved along the trait, by layer, with intervals over questions."""
    figure, axes = svg.panel(width, 340)
    colours = (svg.VECTOR, svg.RANDOM, svg.THIRD, svg.MUTED)
    for place, (model, each) in enumerate(found["models"].items()):
        points = [{"coefficient": layer, "shift": shift} for layer, shift in zip(layers, each["shift"], strict=True)]
        svg.line_with_intervals(axes, points, "shift", {"color": colours[place % 4], "zorder": 4}, model)
    axes.axhline(0, **svg.ZERO)
    axes.set(title=f"Shift along {trait}, residual-stream units", xlabel="layer")
    svg.legend(figure, axes)
    return figure


@resting_on(over("conversation", "data", "conversations"))
def training_headline(summary: Summary) -> Headline:
    """In words no stronger than what was measured."""
    loss = summary["loss"]
    known = ", ".join(f"{number(loss[name], 3)} {said}" for name, said in _LOSSES.items() if loss[name] is not None)
    title = f"Trained {counted(summary['steps'], 'step')} ({summary['method']}): a loss of {known}, in nats a token"
    said = (f"Training was stopped: {summary['stopped']}.",) if summary["stopped"] else ()
    return Headline("no null", title, said)


_LOSSES = {"first": "at first", **LOSSES}


def training_figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    return {"projections": (projections_figure, summary["projections"])} if summary["projections"] else {}


def projections_figure(rows: Sequence[Summary], width: int) -> Figure:
    """What was watched while the model trained."""
    figure, axes = svg.panel(width, 340)
    for name in (each for each in rows[0] if each != "step"):
        known = [row for row in rows if name in row]
        axes.plot([row["step"] for row in known], [row[name] for row in known], marker="o", label=name)
    axes.set(title="Mean projection of the last prompt token", xlabel="step")
    svg.legend(figure, axes)
    return figure

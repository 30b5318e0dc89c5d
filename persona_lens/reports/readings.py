"""What extractions, baselines, conversations that were read and the logit lens come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from persona_lens.core.text import counted
from persona_lens.reports import diagnostics, svg, vector
from persona_lens.reports.page import Headline, Steps, bounds, number, of_part, over, resting_on, shell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]


@resting_on(over("response", "responses"))
def extraction_headline(summary: Summary) -> Headline:
    """In words no stronger than what was measured."""
    means, rows = summary["mean_score"], summary["separation"]
    scores = " and ".join(f"{number(means[arm])} on average under {arm} instructions" for arm in means)
    told = [f"Responses score {scores}."]
    if not rows:
        reason = "No layer can be tested: too few responses were kept to hold some back"
        return Headline("unclear", reason, tuple(told))
    best = max(rows, key=lambda row: float(row["d_prime"]))
    better = sum(row["better"] for row in rows)
    told.append(
        f"On questions held back the vector separates the two kinds best at layer {best['layer']}: d′ = "
        f"{number(best['d_prime'], 2)}, AUC {number(best['auc'], 2)}; 19 of 20 random directions stay below "
        f"{number(best['random_d_prime'], 2)} and {number(best['random_auc'], 2)}."
    )
    title = f"The vectors tell the two kinds of responses apart better than chance at {better} of {len(rows)} layers"
    return Headline("clear" if better else "unclear", title, tuple(told))


def extraction_figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    rows, unused = summary["separation"], -1
    found: svg.Wanted = {"separation": (vector.separation_figure, rows, unused)} if rows else {}
    return {**found, **diagnostics.figures(summary), "norms": (vector.norm_figure, summary["norms"], unused)}


def after_extraction(summary: Summary, folder: str) -> Steps:
    """What one may want to do next with the run's folder."""
    model = summary["model"]["model"] if isinstance(summary.get("model"), Mapping) else "MODEL"
    return [
        (
            "Find the layer and strength with the strongest effect while the text holds together.",
            shell("persona-lens", "steer", "tune", model, folder),
        ),
        ("See what can be said of which layers steer.", shell("persona-lens", "vectors", "forecast", folder)),
        ("Read what is in the vectors.", shell("persona-lens", "vectors", "show", folder)),
    ]


def monitor_headline(summary: Summary) -> Headline:
    """In words no stronger than what was measured."""
    told = tuple(f"{gauge}: {bounds(mean, 2)} on average." for gauge, mean in summary["gauges"].items())
    lost = f", {counted(len(summary['not_read']), 'other')} not" if summary["not_read"] else ""
    return Headline("no null", f"{counted(summary['conversations'], 'conversation')} read{lost}", told)


def monitor_figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    known = {gauge: mean for gauge, mean in summary["gauges"].items() if mean}
    return {"means": (means_figure, known)} if known else {}


def means_figure(means: Summary, width: int) -> Figure:
    """Means by gauge, with their intervals over conversations."""
    figure, axes = svg.panel(width, 90 + 34 * len(means))
    svg.dots(axes, [(mean, place) for place, mean in enumerate(means.values())], svg.LINE)
    axes.set(xlabel="mean projection of replies, residual-stream units", ylim=(-0.6, len(means) - 0.4))
    svg.in_rows(axes, list(means))
    return figure


@resting_on(over("neutral answer", "replies"), judged=False)
def baseline_headline(summary: Summary) -> Headline:
    """In words no stronger than what was measured."""
    told = (
        *(f"{said[0].upper()}{said[1:]}." for said in of_part(summary)),
        *(
            f"Layer {layer}: mean {number(each['mean'], 2)}, SD {number(each['sd'], 2)}."
            for layer, each in list(summary["layers"].items())[:6]
        ),
    )
    means = [each["mean"] for each in summary["layers"].values()]
    ends = f"{number(min(means), sign=True)} to {number(max(means), sign=True)}"
    layers = counted(len(means), "layer")
    title = f"The model’s own neutral answers stand at {ends} along {summary['trait']}, over {layers}"
    return Headline("no null", title, told)


def baseline_figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    return {"replies": (baseline_figure, summary)}


def baseline_figure(summary: Summary, width: int) -> Figure:
    """Means of replies by layer, with the mean of all tokens."""
    figure, axes = svg.panel(width, 340)
    layers = [(int(layer), each) for layer, each in summary["layers"].items()]
    points = [(layer, mean) for layer, each in layers for mean in each["means"]]
    svg.dots(axes, points, {"color": svg.RANDOM, "markersize": 4, "alpha": 0.5}, "one reply")
    means = [each["mean"] for _, each in layers]
    axes.plot([layer for layer, _ in layers], means, color=svg.VECTOR, label="all tokens")
    axes.axhline(0, **svg.ZERO)
    axes.set(title=f"Mean projection on {summary['trait']}, residual-stream units", xlabel="layer")
    svg.legend(figure, axes)
    return figure


def after_baseline(summary: Summary, folder: str) -> Steps:
    """What one may want to do next with the run's folder."""
    where = ("--layer", next(iter(summary["layers"])), "--alarm", f"{summary['trait']}>2sd")
    chat = shell("persona-lens", "monitor", "chat", summary["model"]["model"], folder, *where)
    return [("Talk with the model, and hear of replies that are unusual for it.", chat)]


def lens_headline(summary: Summary) -> Headline:
    """In words no stronger than what was measured."""
    layers = summary["layers"]
    beyond = [each for each in layers if each["promoted"][0]["shift"] > each["random_limit"]]
    told = tuple(
        f"Layer {each['layer']}: {', '.join(repr(token['text']) for token in each['promoted'][:5])}."
        for each in beyond[:3] + beyond[3:][-3:]
    )
    title = f"Vectors move some token further than random directions any at {len(beyond)} of {len(layers)} layers"
    return Headline("clear" if beyond else "unclear", title, told)


def lens_figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    return {"tokens": (lens_figure, summary["layers"][-1])}


def lens_figure(layer: Summary, width: int) -> Figure:
    """The tokens that the vector of one layer moves most, and how far random directions move any."""
    tokens = [*layer["promoted"], *reversed(layer["suppressed"])]
    figure, axes = svg.panel(width, 100 + 22 * len(tokens))
    shifts = [token["shift"] for token in tokens]
    axes.barh(range(len(tokens)), shifts, color=[svg.VECTOR if shift > 0 else svg.THIRD for shift in shifts])
    for side_of in (1, -1):
        axes.axvline(side_of * layer["random_most"], **svg.DOTTED)
    axes.axvline(0, **svg.ZERO)
    axes.set(title=f"Change of logits, layer {layer['layer']}; dotted: the most of a random direction")
    svg.in_rows(axes, [repr(token["text"]) for token in tokens])
    return figure

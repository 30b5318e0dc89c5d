"""What a cap of the axis comes to: its effect on replies to persona prompts, beside what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from persona_lens.core.statistics import Estimate, verdict_of
from persona_lens.reports import svg
from persona_lens.reports.page import Headline, Steps, amount, bounds, resting_on, shell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
QUANTITIES = {
    "persona": "score of playing the role, points of 100",
    "surprise": "surprise of ordinary replies, nats a token",
    "accuracy": "share of right answers",
}


def _asked(summary: Summary) -> str:
    return amount(len(summary["roles"]["confirmation"]), "role") + ", none of them searched"


@resting_on(_asked)
def headline(summary: Summary) -> Headline:
    """In words no stronger than what was measured."""
    found = summary["confirmed"]
    tried = f"{len(summary['candidates'])} caps were tried."
    if found is None:
        return Headline("unclear", "No cap makes personas weaker at an acceptable cost", (tried,))
    persona = found["persona"]
    estimates = {name: None if each is None else Estimate(**each) for name, each in persona.items()}
    change, difference = estimates["change"], estimates["difference"]
    verdict = verdict_of(change, difference, towards=-1) if change is not None else "unclear"
    title = {
        "clear": "The cap keeps the model from playing roles, more than random directions do",
        "no null": "The cap keeps the model from playing roles, with nothing to compare it with",
        "reversed": "The wrong way round: under the cap roles are played more",
        "unclear": "Whether the cap keeps the model from playing roles is not clear",
    }[verdict]
    said = [f"{summary['chosen']}. {tried}"]
    for name, label in QUANTITIES.items():
        digits = 1 if name == "persona" else 3
        null = f", random directions {bounds(found[name]['random'], digits, sign=True, noun=None)}"
        own = bounds(found[name]["change"], digits, sign=True, noun=None)
        said.append(f"Change of the {label}: {own}{null if found[name]['random'] else ''}.")
    return Headline(verdict, title, tuple(said))


def parts(summary: Summary) -> dict[str, Any]:
    """What its template shows beside the summary, which is JSON values as in the run's ``summary.json``."""
    return {"quantities": QUANTITIES}


def next_steps(summary: Summary, folder: str) -> Steps:
    """What one may want to do next with the run's folder."""
    if summary["chosen"] is None:
        return []
    words = ("persona-lens", "generate", summary["model"]["model"], folder, "Who are you?", "--edits")
    return [("Let the model answer under the cap.", shell(*words, summary["chosen"]))]


def figures(summary: Summary) -> svg.Wanted:
    """Every figure that the summary has something to draw for."""
    return {"front": (front_figure, summary)}


def front_figure(summary: Summary, width: int) -> Figure:
    """Every cap by its effect and its two costs; those on the front are filled, the one chosen is ringed."""
    wide = width == svg.WIDE
    figure, axes = svg.panels(width, 400, 640, 1 if wide else 2, 2 if wide else 1)
    for panel, cost, label in zip(
        axes, ("accuracy", "surprise"), ("share of right answers", "surprise, nats a token"), strict=True
    ):
        for each in summary["candidates"]:
            style = {"markerfacecolor": svg.VECTOR if each["on_front"] else svg.PAPER, "markersize": 7}
            panel.plot(each["persona"]["mean"], each[cost]["mean"], marker="o", color=svg.VECTOR, **style)
            if each["text"] == summary["chosen"]:
                ring = {"markersize": 14, "markerfacecolor": "none", "color": svg.INK}
                panel.plot(each["persona"]["mean"], each[cost]["mean"], marker="o", **ring)
        panel.axhline(0, **svg.ZERO)
        panel.axvline(0, **svg.ZERO)
        panel.set(xlabel="change of the persona score, points", title=f"Change of the {label}")
        panel.grid(True, axis="both")
    return figure

"""What a tuning run shows, in words: no stronger than its intervals allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from persona_lens.reports.wording import Headline, bounds, counted, estimate, interval, number, side
from persona_lens.statistics import Verdict, verdict_of


def verdict(summary: Mapping[str, Any]) -> Headline:
    """The effect of the chosen steering on the questions that it was not chosen on.

    The verdict is that of `persona_lens.statistics.verdict_of`, but ``unclear`` wherever the text falls apart.
    """
    effect, sign = summary["confirmed"], -1 if summary["towards"] == "less" else 1
    if effect is None:
        title = "No result: no steered response to the questions kept for confirmation has a score"
        return Headline("unclear", title, ("What the search found on the other questions is not confirmed.",))
    shown = verdict_of(
        estimate(effect["change"]), estimate(effect["difference"]) if effect["difference"] else None, sign
    )
    moved = f"{'raises' if effect['change']['mean'] > 0 else 'lowers'} the trait score by "
    moved += f"{number(abs(effect['change']['mean']))} points"
    title = {
        "clear": f"A clear effect: the chosen steering {moved}",
        "reversed": f"The effect is the wrong way round: the chosen steering {moved}",
        "no null": f"The chosen steering {moved}, with nothing to compare it with",
        "unclear": "No clear effect: what the chosen steering does is not clearly more than what chance explains",
    }[shown]
    if shown == "unclear" and side(effect["change"]) == sign:
        title = "No clear effect: what the chosen steering does is not clearly more than what random directions do"
    sentences = (_change(summary, effect), *_beside_null(effect, shown, sign))
    if not held(summary):
        return Headline(
            "unclear",
            f"The text falls apart: the chosen steering {moved}, but its answers no longer hold together",
            (*sentences, "Scores of text that has fallen apart mean little."),
        )
    return Headline(shown, title, sentences)


def held(summary: Mapping[str, Any]) -> bool:
    """Whether the text holds together at the chosen place, on the questions searched and on the others."""
    chosen = summary["chosen"]
    same = [point for point in summary["curve"] if point["coefficient"] == chosen["coefficient"]]
    return bool(chosen["coherent"] and all(point["coherent"] for point in same if point["effect"]))


def _change(summary: Mapping[str, Any], effect: Mapping[str, Any]) -> str:
    asked, change = summary["confirm_questions"], effect["change"]
    plain = summary["unsteered"]["confirm"]["score"]
    over = (
        f"Over {counted(change['n'], 'held-out question')}{'' if change['n'] == asked else f' of {asked}'} that played "
    )
    start = f", from {number(plain['mean'])} unsteered" if plain else ""
    return (
        f"{over}no part in the choice, it changes the mean trait score, on its scale of 0 to 100, by "
        f"{interval(change, sign=True)}{start}."
    )


def _beside_null(effect: Mapping[str, Any], shown: Verdict, sign: int) -> Iterator[str]:
    random, difference = effect["random"], effect["difference"]
    if random is None or difference is None:
        yield "No random directions were run beside it, so any direction of that length might do the same."
        return
    yield f"Random directions of the same length change it by {bounds(random, sign=True)}."
    ending = "so it is not shown that this direction is special"
    if shown == "clear":
        ending = "which lies clear of zero"
    elif shown == "reversed":
        ending = "which lies on the other side of zero from the one that was asked for"
    elif side(difference) == sign:
        ending = "which lies clear of zero, though the vector's own effect does not"
    yield f"Question by question, vector minus random is {bounds(difference, sign=True)}, {ending}."

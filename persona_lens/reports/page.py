"""Pages: what every report says in the same words, numbers as they are written, and how a template is filled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from persona_lens.core.statistics import Estimate, Verdict, few, verdict_of
from persona_lens.core.text import counted as counted
from persona_lens.core.text import isolated, printable

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Headline:
    """What a run shows.

    Attributes:
        verdict: See `persona_lens.core.statistics.verdict_of`; each page says what makes its own.
        title: In one line.
        sentences: With all numbers.
    """

    verdict: str
    title: str
    sentences: tuple[str, ...]


def headline(effect: Mapping[str, Any], questions: int) -> Headline:
    """The result in words, no stronger than the intervals allow."""
    vector, random, difference = effect["vector"], effect["random"], effect["difference"]
    verdict = verdict_of(estimate(vector), estimate(difference) if difference else None)
    span = f"from {signed(effect['low'])} to {signed(effect['high'])}"
    moved = f"{abs(vector['mean']):.1f} points"
    title = {
        "clear": f"A clear effect: steering {span} raises the trait score by {moved}",
        "reversed": f"The effect is the wrong way round: steering {span} lowers the trait score by {moved}",
        "no null": f"Steering {span} raises the trait score by {moved}, with nothing to compare it with",
        "unclear": f"No clear effect: steering {span} {_moves(vector['mean'])}, within what chance explains",
    }[verdict]
    if verdict == "unclear" and side(vector) != 0:
        title = f"No clear effect: what steering {span} does is not clearly more than what random directions do"
    first = (
        f"Over {counted(vector['n'], 'held-out question')}{'' if vector['n'] == questions else f' of {questions}'}, "
        f"going {span} at layer {effect['layer']} changes the mean trait score, on its scale of 0 to 100, by "
        f"{interval(vector)}."
    )
    return Headline(verdict, title, (first, *_beside_null(random, difference, verdict)))


def _beside_null(
    random: Mapping[str, Any] | None, difference: Mapping[str, Any] | None, verdict: Verdict
) -> Iterator[str]:
    if random is None or difference is None:
        yield "No random directions were run beside it, so any direction of that length might do the same."
        return
    yield f"Random directions of the same length change it by {bounds(random)}."
    ending = {
        "clear": "which lies clear of zero",
        "reversed": "which lies below zero",
        "unclear": "which lies above zero, though the vector's own effect does not",
        "no null": "",
    }[verdict]
    if verdict == "unclear" and side(difference) <= 0:
        ending = "so it is not shown that this direction is special"
    yield f"Question by question, vector minus random is {bounds(difference)}, {ending}."


def estimate(found: Mapping[str, Any]) -> Estimate:
    """What `Estimate.to_json` wrote."""
    return Estimate(found["mean"], found["low"], found["high"], found["n"])


def side(found: Mapping[str, Any]) -> int:
    """See `Estimate.side`."""
    return estimate(found).side


def _moves(mean: float) -> str:
    return f"moves the trait score by {number(mean, 1, sign=True)} points"


def strained(summary: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Coefficients at which steered text surprises the unsteered model by more than the margin; with the excess."""
    choice = summary.get("layer_choice")
    points = summary["steering"]["curves"]["vector"]
    plain = next((p["surprise"]["mean"] for p in points if p["coefficient"] == 0), None)
    if choice is None or plain is None:
        return []
    excesses = [(p["coefficient"], p["surprise"]["mean"] - plain) for p in points]
    return [(coefficient, excess) for coefficient, excess in excesses if excess > choice["margin"]]


def layer_reason(choice: Mapping[str, Any]) -> str:
    """Why the layer was taken."""
    limit = choice["unsteered_surprise"] + choice["margin"]
    coherent = [row for row in choice["layers"] if row["surprise"] <= limit]
    chosen = choice["chosen"]
    if not coherent:
        least = min(choice["layers"], key=lambda row: row["surprise"])["layer"]
        why = "it is the one with the least surprise" if least == chosen else "it was set"
        return f"At no layer does the text stay within the margin of coherence. Layer {chosen} was taken: {why}."
    best = max(coherent, key=lambda row: row["effect"]["vector"]["mean"])["layer"]
    among = f"the {len(coherent)} of {len(choice['layers'])} layers tried"
    if best == chosen:
        return f"Layer {chosen} was taken: among {among} whose text stays coherent it has the largest effect."
    return (
        f"Layer {chosen} was taken, though among {among} whose text stays coherent layer {best} has the largest effect."
    )


def separates(rows: list[Mapping[str, Any]], layer: int) -> str:
    """Whether the vector tells the two kinds of answer apart better than random directions do."""
    at = next((row for row in rows if row["layer"] == layer), None)
    if at is None:
        return ""
    return (
        f"At layer {layer} the vector tells the two kinds of answer apart {'better' if at['better'] else 'no better'} "
        f"than 19 of 20 random directions do: d′ {number(at['d_prime'], 2)} and AUC {number(at['auc'], 2)} against "
        f"{number(at['random_d_prime'], 2)} and {number(at['random_auc'], 2)}. Of {counted(len(rows), 'layer')} it "
        f"does better, by both, at {sum(row['better'] for row in rows)}."
    )


def rises(samples: list[Mapping[str, Any]]) -> tuple[int, int]:
    """In how many of the samples the last response scores above the first, and how many have both scores."""
    ends = [(s["responses"][0]["score"], s["responses"][-1]["score"]) for s in samples if s["responses"]]
    scored = [(low, high) for low, high in ends if low is not None and high is not None]
    return sum(high > low for low, high in scored), len(scored)


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A number with a real minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    rounded = round(value, digits) + 0.0  # no negative zero
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}".replace("-", MINUS)


def signed(value: float) -> str:
    """A coefficient: as short as it is exact, with its sign."""
    return f"{value:+g}".replace("-", MINUS) if value else "0"


def interval(found: Mapping[str, Any] | None, digits: int = 1, *, sign: bool = False) -> str:
    """A mean with its 95% interval, and beside it that it rests on few questions, if it does."""
    if found is None:
        return NONE
    mean = number(found["mean"], digits, sign=sign)
    if found["n"] < 2:
        return f"{mean} (one question, so no interval)"
    low, high = (number(found[end], digits, sign=sign) for end in ("low", "high"))
    return f"{mean} (95% interval {low} to {high}{_few(found)})"


def bounds(found: Mapping[str, Any] | None, digits: int = 1, *, sign: bool = False) -> str:
    """A mean with its interval, for a table cell whose heading says what the brackets are."""
    if found is None:
        return NONE
    mean, low, high = (number(found[key], digits, sign=sign) for key in ("mean", "low", "high"))
    return f"{mean} ({few(1)})" if found["n"] < 2 else f"{mean} ({low} to {high}{_few(found)})"


def _few(found: Mapping[str, Any]) -> str:
    said = few(found["n"])
    return f"; {said}" if said else ""


def scientific(value: float | None) -> str:
    """A small number as ``1.2 × 10⁻⁷``."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}".replace("-", MINUS)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", MINUS)


def addend(value: float, digits: int) -> str:
    """A number behind another that it is added to: ``+ 0.861``, ``− 0.861``."""
    return f"{MINUS if value < 0 else '+'} {abs(value):.{digits}f}"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as names, with those of the groups they are in, and values."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name} › ")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(map(plain, value))
        else:
            yield f"{prefix}{name}", plain(value)


def plain(value: Any) -> str:
    """A setting as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class AgreementRow:
    """What the checks of one backend come to.

    Attributes:
        verdict: In a few words.
        passed: Whether every check held; None if none was made.
        tally: How many held, of how many.
        worst: The largest measured error beside what is allowed, of the checks that allow any.
    """

    verdict: str
    passed: bool | None
    tally: str
    worst: str


def agreement_row(found: Mapping[str, Any]) -> AgreementRow:
    """The row of a backend in the table of agreement."""
    checks = found.get("checks") or []
    if not checks:
        return AgreementRow("not installed" if found.get("missing") else "not checked", None, NONE, NONE)
    failed = sum(not check["passed"] for check in checks)
    measured = [c for c in checks if c["tolerance"] and c["measured"] is not None and math.isfinite(c["measured"])]
    worst = max(measured, key=lambda c: float(c["measured"] / c["tolerance"]), default=None)
    return AgreementRow(
        f"{counted(failed, 'check')} failed" if failed else "agrees",
        not failed,
        f"{len(checks) - failed} of {len(checks)}",
        f"{scientific(worst['measured'])} of {scientific(worst['tolerance'])}" if worst else NONE,
    )


def verdict(summary: Mapping[str, Any]) -> Headline:
    """The effect of the chosen steering on the questions that it was not chosen on.

    The verdict is that of `persona_lens.core.statistics.verdict_of`, but ``unclear`` wherever the text falls apart.
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
    sentences = (_change(summary, effect), *_null_said(effect, shown, sign))
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


def _null_said(effect: Mapping[str, Any], shown: Verdict, sign: int) -> Iterator[str]:
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


LONGEST = 50_000  # characters of one text; the files of a run have the whole


def render(template: str, parts: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None) -> str:
    """A page, complete in itself: no scripts, and nothing is loaded from anywhere. The same parts give the same bytes.

    Args:
        template: Its name; one a kind of report.
        parts: What it shows, most of it JSON values as in the ``summary.json`` of a run.
        filters: What only this template calls, by name.

    Raises:
        KeyError, jinja2.UndefinedError: If a part is missing, naming it.

    Returns:
        HTML, to be written as UTF-8.
    """
    env = environment()
    env.filters.update(filters or {})
    return env.get_template(template).render(parts)


def environment() -> Environment:
    """Autoescaping, strict about missing values; prints no control characters, and isolates what runs to the left."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (
        agreement_row,
        bounds,
        addend,
        counted,
        few,
        flat,
        interval,
        layer_reason,
        number,
        plain,
        rises,
        scientific,
        separates,
        signed,
    ):
        env.filters[function.__name__] = function
    env.filters["text"] = _text
    return env


def _finalize(value: Any) -> Any:
    if value is None:
        return NONE
    return isolated(_shown(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def _text(value: str) -> Markup:
    """A text that is an element's only content: the element (``dir="auto"``) isolates it, and takes its direction."""
    return escape(_shown(value))


def _shown(value: str) -> str:
    return printable(value if len(value) <= LONGEST else f"{value[:LONGEST]} […]")

"""Pages: what every report says in the same words, numbers as they are written, and how a template is filled."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from persona_lens.core.statistics import Estimate, few, verdict_of
from persona_lens.core.text import capital, isolated, printable
from persona_lens.core.text import counted as counted

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Headline:
    """What a run shows.

    Attributes:
        verdict: See `persona_lens.core.statistics.verdict_of`; each page says what makes its own.
        title: In one line.
        sentences: With all numbers.
        basis: What it rests on and who judged, such as ``16 held-out questions, judged by …``.
    """

    verdict: str
    title: str
    sentences: tuple[str, ...]
    basis: str = ""

    @property
    def sentence(self) -> str:
        """The title with what it rests on."""
        return printable(f"{self.title}{f' ({self.basis})' if self.basis else ''}.")


FOLDER = "FOLDER"  # stands for a run's folder where that is not known
Tables = list[tuple[str, list[str], list[list[str]]]]
"""Titles, headings and the rows' cells; the first cell of each is its heading."""
Steps = list[tuple[str, str]]
"""What one may want to do next, in words, and the command that does it."""


def shell(*words: object) -> str:
    """A command as one types it."""
    return shlex.join(map(str, words))


def over(noun: str, *path: str) -> Callable[[Mapping[str, Any]], str]:
    """How many there are of something, by a number or a list that is found along a path; few are called few."""

    def said(summary: Mapping[str, Any]) -> str:
        found: Any = summary
        for name in path:
            found = found[name]
        return amount(found if isinstance(found, int) else len(found), noun)

    return said


def amount(n: int, noun: str) -> str:
    """``16 questions``, ``only 3 questions``."""
    return few(n, noun) or counted(n, noun)


def judge_name(described: Mapping[str, Any]) -> str:
    """What a judge is called, given what it says of itself."""
    kind, model = described.get("judge"), described.get("model")
    if kind == "likelihood":
        return "the likelihood judge, a proxy"
    if kind == "given":
        return "the scores that came with the responses"
    named = model.get("model") if isinstance(model, Mapping) else model
    return f"{kind}:{named}" if named else str(kind)


Told = Callable[[Mapping[str, Any]], Headline]


def resting_on(asked: Callable[[Mapping[str, Any]], str], *, judged: bool = True) -> Callable[[Told], Told]:
    """What makes a headline say what it rests on, and who judged: the page, the terminal and `Result` say it alike.

    Args:
        asked: What it was counted over, such as ``16 held-out questions``.
        judged: Whether scores have a part in it.
    """

    def with_basis(headline: Told) -> Told:
        @wraps(headline)
        def told(summary: Mapping[str, Any]) -> Headline:
            found = [summary["judge"]] if summary.get("judge") else list((summary.get("judges") or {}).values())
            names = list(dict.fromkeys(map(judge_name, found))) if judged else []
            by = "judged by " + " and ".join(names) if names else ""
            return replace(headline(summary), basis=", ".join(filter(None, [asked(summary), by])))

        return told

    return with_basis


def effect_headline(
    effect: Mapping[str, Any], asked: int, doing: str, how: str, *, behind: str = "", towards: int = 1
) -> Headline:
    """What a steering does to the score, in words no stronger than the intervals allow.

    Args:
        effect: Estimates by name: ``change``, and ``random`` and ``difference``, which may be None.
        asked: Questions.
        doing: Names the steering.
        how: Goes between the questions and what changes.
        behind: Goes behind the change.
        towards: 1 or -1: the side that was asked for.
    """
    change, random, difference = effect["change"], effect["random"], effect["difference"]
    shown = verdict_of(estimate(change), estimate(difference) if difference else None, towards)
    beyond = "random directions do" if side(change) else "chance explains"
    title = {
        "clear": f"A clear effect: {doing} {moves(change)}",
        "reversed": f"The effect is the wrong way round: {doing} {moves(change)}",
        "no null": f"{capital(doing)} {moves(change)}, with nothing to compare it with",
        "unclear": f"No clear effect: what {doing} does is not clearly more than what {beyond}",
    }[shown]
    over = counted(change["n"], "held-out question") + ("" if change["n"] == asked else f" of {asked}")
    first = (
        f"Over {over}{how} the mean trait score, on its scale of 0 to 100, by {interval(change, sign=True)}{behind}."
    )
    if random is None or difference is None:
        null = "No random directions were run beside it, so any direction of that length might do the same."
        return Headline(shown, title, (first, null))
    own = "is the wrong way round" if side(change) == -towards else "does not"
    ending = {"clear": "which lies clear of zero", "reversed": "which lies on the wrong side of zero"}.get(
        shown,
        f"which lies clear of zero, though the vector's own effect {own}"
        if side(difference) == towards
        else "so it is not shown that this direction is special",
    )
    null = f"Random directions of the same length change it by {bounds(random, sign=True)}."
    apart = f"Question by question, vector minus random is {bounds(difference, sign=True)}, {ending}."
    return Headline(shown, title, (first, null, apart))


def moves(change: Mapping[str, Any]) -> str:
    """What a change does to the score: ``raises the trait score by 41.7 points``."""
    return f"{'raises' if change['mean'] > 0 else 'lowers'} the trait score by {number(abs(change['mean']))} points"


def estimate(found: Mapping[str, Any]) -> Estimate:
    """What `Estimate.to_json` wrote."""
    return Estimate(found["mean"], found["low"], found["high"], found["n"])


def side(found: Mapping[str, Any]) -> int:
    """See `Estimate.side`."""
    return estimate(found).side


def swapped(difference: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `Estimate.to_json` wrote of one minus another, that of the other minus the one."""
    ends = {"mean": -difference["mean"], "low": -difference["high"], "high": -difference["low"]}
    return {**difference, **ends}


def number(value: float | None, digits: int = 1, *, sign: bool = False, percent: bool = False) -> str:
    """A number, or a share in percent, with a real minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    rounded = round(100 * value if percent else value, digits) + 0.0  # no negative zero
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}{'%' if percent else ''}".replace("-", MINUS)


def signed(value: float) -> str:
    """A coefficient: as short as it is exact, with its sign."""
    return f"{value:+g}".replace("-", MINUS) if value else "0"


def interval(
    found: Mapping[str, Any] | None, digits: int = 1, *, sign: bool = False, noun: str | None = "question"
) -> str:
    """A mean with its 95% interval, and beside it that it rests on few questions, if it does.

    ``noun`` is what it is over; None where that is said elsewhere.
    """
    if found is None:
        return NONE
    mean = number(found["mean"], digits, sign=sign)
    if found["n"] < 2:
        return f"{mean} (one {noun or 'value'}, so no interval)"
    low, high = (number(found[end], digits, sign=sign) for end in ("low", "high"))
    return f"{mean} (95% interval {low} to {high}{_few(found, noun)})"


def of_part(summary: Mapping[str, Any]) -> list[str]:
    """What is said where replies were not read whole, a sentence; nothing where they were."""
    answers = "are its answers, without the thinking before them"
    found = {"answer_mean": answers, "thinking_mean": "is its thinking alone"}.get(summary.get("mean", ""))
    return [] if found is None else [f"the model thinks before it answers: read {found}"]


def bounds(
    found: Mapping[str, Any] | None, digits: int = 1, *, sign: bool = False, noun: str | None = "question"
) -> str:
    """A mean with its interval, for a table cell whose heading names the brackets; ``noun`` as in `interval`."""
    if found is None:
        return NONE
    mean, low, high = (number(found[key], digits, sign=sign) for key in ("mean", "low", "high"))
    if found["n"] < 2:
        return f"{mean} ({few(1, noun or 'value')})"
    return f"{mean} ({low} to {high}{_few(found, noun)})"


def _few(found: Mapping[str, Any], noun: str | None) -> str:
    said = few(found["n"], noun) if noun else ""
    return f"; {said}" if said else ""


def measured(found: Mapping[str, Any], digits: int = 2, *, sign: bool = False, percent: bool = False) -> str:
    """A ``value`` with its interval (``low``, ``high``), or the ``reason`` why it has none, if one is given."""
    value, low, high = (number(found[key], digits, sign=sign, percent=percent) for key in ("value", "low", "high"))
    if low == NONE:
        unsaid = "no interval" if found["value"] is not None else "not defined, for lack of variation"
        return f"{value} ({printable(found.get('reason') or unsaid)})"
    return f"{value} ({low} to {high})"


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
    shared = (addend, amount, bounds, counted, few, flat, interval, measured, number, plain, signed)
    env.filters.update({function.__name__: function for function in shared})
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

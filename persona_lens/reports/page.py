"""The template's environment: what it may call, and how every value that it prints is made harmless."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from persona_lens.core.statistics import few
from persona_lens.core.text import isolated, printable
from persona_lens.reports import wording

__all__ = ["environment", "render"]

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
        wording.agreement_row,
        wording.bounds,
        wording.addend,
        wording.counted,
        few,
        wording.flat,
        wording.interval,
        wording.layer_reason,
        wording.number,
        wording.plain,
        wording.rises,
        wording.scientific,
        wording.separates,
        wording.signed,
    ):
        env.filters[function.__name__] = function
    env.filters["text"] = _text
    return env


def _finalize(value: Any) -> Any:
    if value is None:
        return wording.NONE
    return isolated(_shown(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def _text(value: str) -> Markup:
    """A text that is an element's only content: the element (``dir="auto"``) isolates it, and takes its direction."""
    return escape(_shown(value))


def _shown(value: str) -> str:
    return printable(value if len(value) <= LONGEST else f"{value[:LONGEST]} […]")

"""The template's environment: what it may call, and how every value that it prints is made harmless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from persona_lens.reports import wording
from persona_lens.statistics import few


def environment() -> Environment:
    """Autoescaping, strict about missing values, and printing no control characters."""
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
    return env


def _finalize(value: Any) -> Any:
    if value is None:
        return wording.NONE
    return wording.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

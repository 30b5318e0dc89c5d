"""The reports: one HTML file each, that shows a run's result, how sure it is, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["render_report", "render_tuning"]


def render_report(summary: Mapping[str, Any]) -> str:
    """The page of a demonstration run; see `persona_lens.reports.page.render`.

    Args:
        summary: JSON values as in the run's ``summary.json``: ``trait``, ``model``, ``command``, ``settings``,
            ``seed``, ``extraction``, ``layer_choice`` (None if the layer was given), ``steering``, ``samples`` (the
            first questions in their order, responses from the smallest coefficient to the largest), ``agreement`` and
            ``versions``.
    """
    # Imported here: jinja2 and matplotlib are slow to load, and only a report needs them.
    from persona_lens.reports.figures import REDUCTIONS, draw_figures
    from persona_lens.reports.page import headline, render, strained

    steering = summary["steering"]
    own = {
        "headline": headline(steering["effect"], steering["questions"]),
        "strained": strained(summary),
        "figures": draw_figures(summary),
        "reductions": REDUCTIONS,
    }
    return render("template.html.j2", {"layer_choice": None, **summary, **own})


def render_tuning(summary: Mapping[str, Any]) -> str:
    """The page of a tuning run; see `persona_lens.reports.page.render`.

    Args:
        summary: JSON values as in the run's ``summary.json``; see `persona_lens.steering.tune`. It may also have
            ``capability``: a list of mappings with ``accuracy`` (0 to 1) and ``score`` (0 to 100), both means with
            their intervals or None, and ``coefficient``, or ``arm`` for what is not a coefficient at the chosen layer.
    """
    from persona_lens.reports.page import render, verdict
    from persona_lens.reports.tuning import draw_tuning, heat_maps, names_of_arms

    own = {
        "verdict": verdict(summary),
        "maps": heat_maps(summary),
        "figures": draw_tuning(summary),
        "arms": names_of_arms(summary.get("capability") or []),
    }
    return render("tuning.html.j2", {"capability": [], **summary, **own})

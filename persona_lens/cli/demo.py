"""``persona-lens demo``: everything at once on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from persona_lens.cli import options
from persona_lens.cli.display import interval_text, quiet_libraries, say, say_json, showing_progress
from persona_lens.cli.settings import Option


def demo(
    out: Annotated[Path, Option("Folder for all results; kept and resumed.")] = Path("demo-run"),
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Show a persona vector at work: extract "optimistic" from the embedded model, steer with it, write a report.

    Takes some minutes on two cores. Stopped and started again, it goes on where it was.

    Example: `persona-lens demo --out demo-run`
    """
    from persona_lens.models import resolve
    from persona_lens.reports.demo import DemoSettings, run_demo
    from persona_lens.reports.page import headline

    quiet_libraries()
    settings = DemoSettings(seed=seed)
    with showing_progress(of_bytes=True) as progress:
        resolve(settings.model, progress=progress)
    with showing_progress() as progress:
        summary = run_demo(out, settings, progress)
    if as_json:
        say_json(summary)
        return
    found = summary["steering"]["effect"]
    say(
        f"Steering along {summary['trait']['name']!r} at layer {found['layer']} of {summary['model']['model']}, from "
        f"{found['low']:+g} to {found['high']:+g}, moves the score by "
        f"{interval_text(found['vector'], '.1f')}; random directions of the same norm: "
        f"{interval_text(found['random'], '.1f')}."
    )
    say(headline(found, summary["steering"]["questions"]).title)
    say(f"report: {out / 'report.html'}")

"""``persona-lens demo``: everything at once on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persona_lens.cli import options


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for all results; kept and resumed.")] = Path("demo-run"),
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Show a persona vector at work: extract "optimistic" from the embedded model, steer with it, write a report.

    Takes some minutes on two cores. Stopped and started again, it goes on where it was.

    Example: `persona-lens demo --out demo-run`
    """
    from persona_lens.cli.display import quiet_libraries, showing_progress
    from persona_lens.demo import DemoSettings, run_demo
    from persona_lens.models import resolve

    quiet_libraries()
    settings = DemoSettings(seed=seed)
    with showing_progress(of_bytes=True) as progress:
        resolve(settings.model, progress=progress)
    with showing_progress() as progress:
        summary = run_demo(out, settings, progress)
    if as_json:
        typer.echo(json.dumps(summary))
        return
    found = summary["steering"]["effect"]
    vector, random = found["vector"], found["random"]
    typer.echo(
        f"Steering along {summary['trait']['name']!r} at layer {found['layer']} of {summary['model']['model']}, from "
        f"{found['low']:+g} to {found['high']:+g}, moves the score by {vector['mean']:.1f} points "
        f"[{vector['low']:.1f}, {vector['high']:.1f}]; random directions of the same norm: {random['mean']:.1f} "
        f"[{random['low']:.1f}, {random['high']:.1f}]."
    )
    typer.echo(f"report: {out / 'report.html'}")

"""``persona-lens steer tune``: the layer and strength that steer best while the text holds together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli import judges, options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.sweep import PositionsOption, ReductionOption, Vectors
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.core.statistics import Estimate
    from persona_lens.steering import Steering, Tuning


@grouped
def tune_command(
    context: typer.Context,
    model: options.Model,
    vectors: Vectors,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="`18`, `12,15,18`, `10-20` or `all`.", show_default="eight at 30% to 85%"),
    ] = None,
    pushes: Annotated[
        str, typer.Option("--pushes", help="Strengths to try: length of the step over that of the residual.")
    ] = "0.1,0.2,0.3,0.45,0.65,0.9",
    towards: Annotated[str, typer.Option("--towards", help="`more` of the trait, or `less`.")] = "more",
    search_questions: Annotated[
        int, typer.Option(help="Held-out questions to search on; the choice is confirmed on the others.")
    ] = 8,
    samples: Annotated[int, typer.Option(help="Responses for each question and place in the search.")] = 1,
    confirm_samples: Annotated[int, typer.Option(help="The same when the choice is confirmed.")] = 2,
    random_directions: Annotated[int, typer.Option(help="Random directions of equal norm beside each place.")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder; kept and resumed.", show_default="runs/tuned-TRAIT-MODEL")
    ] = None,
    positions: PositionsOption = "all",
    reduction: ReductionOption = "response_mean",
    max_new_tokens: options.MaxNewTokens = 48,
    temperature: options.Temperature = 1.0,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    capability: Annotated[
        str | None,
        typer.Option(
            "--capability",
            metavar="TASK",
            help="Also measure the accuracy in this task of lm-evaluation-harness at every strength of the chosen "
            "layer; `persona_lens_basics` needs no hub.",
            show_default=False,
        ),
    ] = None,
    dry_run: options.DryRun = False,
    judge: judges.JudgeName = "likelihood",
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
    judging: judges.JudgeOptions,
) -> None:
    """Find the layer and strength with the strongest effect while the text holds together.

    Searches on some of the held-out questions, beside random directions, and confirms the choice on the others. The
    folder gets the report, and `vectors.safetensors` with the choice stored in it, for `generate` and others to use.

    Example: `persona-lens steer tune smollm2-135m runs/optimistic-smollm2-135m`
    """
    from persona_lens.backend import Positions
    from persona_lens.cli.display import showing_progress
    from persona_lens.reports import render_tuning
    from persona_lens.runs.rollouts import RolloutSettings
    from persona_lens.steering import TuneSettings, tune
    from persona_lens.steering.tuning import Towards, tune_work
    from persona_lens.vectors import load_vectors

    loaded = load_vectors(vectors)
    settings = TuneSettings(
        layers=tuple(options.layer_numbers(layers, loaded.model.n_layers)) if layers else None,
        pushes=tuple(options.numbers(pushes, "--pushes")),
        towards=options.choice(Towards, towards, "--towards"),
        search_questions=search_questions,
        samples=samples,
        confirm_samples=confirm_samples,
        random_directions=random_directions,
        positions=options.choice(Positions, positions, "--positions"),
        reduction=reduction,
        seed=seed,
        rollouts=RolloutSettings(max_new_tokens, temperature, batch_size=batch_size),
    )
    opened = opening.open(model, offline=dry_run)
    chat = opening.chat(opened)
    scoring = judging.open(judge, loaded.trait_definition, opened, chat, opening.dtype, opening.device)
    work = partial(tune_work, opened, loaded, settings, chat, scoring)
    if options.planned(work, opening, dry_run, as_json):
        return
    folder = out or options.run_folder(f"tuned-{loaded.trait}", loaded.model.model)
    with judges.saying_spending(scoring), showing_progress() as progress:
        found = tune(
            opened,
            loaded,
            settings,
            folder=folder,
            judge=scoring,
            chat=chat,
            command=options.repeated(context),
            capability=_accuracy_in(opened, capability, seed) if capability else None,
            progress=progress,
        )
    options.write_report(folder / options.REPORT, render_tuning(found.summary))
    options.say_traffic(opened)
    if as_json:
        say_json({"folder": str(folder), **found.summary})
        return
    _show(found, folder)


def _accuracy_in(backend: Backend, task: str, seed: int) -> Callable[[Steering | None], Estimate]:
    """What measures the accuracy in a task under a steering, which is refused here already if it cannot be run."""
    from persona_lens.analysis.capability import accuracy, check_task

    check_task(task)
    return lambda steering: accuracy(backend, task, steering.edits() if steering else (), seed=seed)


def _show(found: Tuning, folder: Path) -> None:
    from persona_lens.cli.display import interval_text, print_table
    from persona_lens.reports.page import verdict

    print_table(
        "Change of the trait score [95% interval] on the questions searched",
        ("layer", "coefficient", "push", "change", "random", "text holds"),
        [
            (
                str(point.place.layer),
                f"{point.place.coefficient:+g}",
                f"{point.place.push:.2f}",
                interval_text(point.effect.change) if point.effect else "-",
                interval_text(point.effect.random) if point.effect and point.effect.random else "-",
                "yes" if point.coherent else "no",
            )
            for point in found.points
        ],
    )
    for warning in found.summary["warnings"]:
        say(f"warning: {warning}", err=True)
    say(f"chosen: {found.steering}")
    say(verdict(found.summary).title)
    if found.confirmed is not None:
        random = found.confirmed.random
        beside = f", random directions {interval_text(random)}" if random else ""
        change = interval_text(found.confirmed.change)
        others = counted(found.summary["confirm_questions"], "question")
        say(f"on the other {others}: {change}{beside}")
    say(f"vectors with the choice stored: {folder / 'vectors.safetensors'}")
    say(f"report: {folder / options.REPORT}")

"""``persona-lens steer tune``: the layer and strength that steer best while the text holds together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli import options
from persona_lens.cli.display import interval_text, say, show_rows
from persona_lens.cli.runner import Experiment, Run, Session
from persona_lens.cli.settings import Fields, Given, Option
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.core.statistics import Estimate
    from persona_lens.steering import Steering, TuneSettings, Tuning


def tune_command(
    context: typer.Context,
    run: Annotated[Run, Fields(out=Option(shown="runs/tuned-TRAIT-MODEL"))],
    vectors: options.Vectors,
    given: Annotated[Given, Fields("persona_lens.steering:TuneSettings")],
    capability: Annotated[str | None, Option(metavar="TASK")] = None,
) -> None:
    """Find the layer and strength with the strongest effect while the text holds together.

    Searches on some of the held-out questions, beside random directions, and confirms the choice on the others. The
    folder gets the report, and `vectors.safetensors` with the choice stored in it, for `generate` and others to use.

    Example: `persona-lens steer tune smollm2-135m runs/optimistic-smollm2-135m`

    Args:
        capability: Also measure the accuracy in this task of lm-evaluation-harness at every strength of the chosen
            layer; `persona_lens_basics` needs no hub.
    """
    from persona_lens.reports import render_tuning
    from persona_lens.steering import tune
    from persona_lens.steering.tuning import tune_work
    from persona_lens.vectors import load_vectors

    loaded = load_vectors(vectors)
    settings: TuneSettings = given.make(loaded.model.n_layers)
    experiment = Experiment(
        lambda at: tune(
            at.backend,
            loaded,
            settings,
            folder=at.folder,
            judge=at.judge,
            chat=at.chat,
            command=options.repeated(context),
            capability=_accuracy_in(at, capability, settings.seed) if capability else None,
            progress=at.shown,
        ),
        _show,
        lambda at: tune_work(at.backend, loaded, settings, at.chat, at.judge),
        traits=loaded.trait_definition,
        name=f"tuned-{loaded.trait}",
        model=loaded.model.model,
        page=lambda found: render_tuning(found.summary),
    )
    run.carry_out(experiment)


def _accuracy_in(at: Session, task: str, seed: int) -> Callable[[Steering | None], Estimate]:
    """What measures the accuracy in a task under a steering, which is refused here already if it cannot be run."""
    from persona_lens.analysis.capability import accuracy, check_task

    check_task(task)
    backend = at.backend
    return lambda steering: accuracy(backend, task, steering.edits() if steering else (), seed=seed)


def _show(found: Tuning, at: Session) -> None:
    from persona_lens.reports.page import verdict

    show_rows(
        "Change of the trait score [95% interval] on the questions searched",
        found.points,
        {
            "layer": lambda point: point.place.layer,
            "coefficient": lambda point: f"{point.place.coefficient:+g}",
            "push": (lambda point: point.place.push, ".2f"),
            "change": lambda point: point.effect and point.effect.change,
            "random": lambda point: point.effect and point.effect.random,
            "text holds": lambda point: point.coherent,
        },
    )
    options.say_notes(found.summary["warnings"], "warning")
    say(f"chosen: {found.steering}")
    say(verdict(found.summary).title)
    if found.confirmed is not None:
        random = found.confirmed.random
        beside = f", random directions {interval_text(random)}" if random else ""
        others = counted(found.summary["confirm_questions"], "question")
        say(f"on the other {others}: {interval_text(found.confirmed.change)}{beside}")
    say(f"vectors with the choice stored: {at.kept / 'vectors.safetensors'}")

"""``persona-lens steer capability``: what steering costs the model on tasks that have right answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli import options
from persona_lens.cli.display import say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.steerings import LayerOptions, SteeringOptions, candidates
from persona_lens.cli.sweep import AllowOtherModel, Vectors
from persona_lens.core.files import write_text

if TYPE_CHECKING:
    from persona_lens.analysis.capability.evaluation import CapabilityChange


@grouped
def capability_command(
    model: options.Model,
    vectors: Vectors,
    written: SteeringOptions,
    one_layer: LayerOptions,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="A task of lm-evaluation-harness (`mmlu`, `arc_easy`, ...) or its YAML file. Repeatable.",
            show_default="persona_lens_basics, which needs no hub",
        ),
    ] = None,
    include_path: Annotated[
        list[Path] | None,
        typer.Option("--include-path", metavar="DIR", help="A folder of further task files. Repeatable."),
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Samples of a task at most, or a share below 1.")] = None,
    shots: Annotated[int | None, typer.Option(help="Solved examples before each question.")] = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write every figure here, as JSON.")
    ] = None,
    allow_other_model: AllowOtherModel = False,
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
) -> None:
    """Measure what the model can do, unsteered and steered, on tasks of lm-evaluation-harness.

    Needs `pip install 'persona-lens[lm-eval]'`. Changes are taken question by question, with 95% intervals.

    Example: `persona-lens steer capability smollm2-135m runs/optimistic-smollm2-135m --layer 18 --coefficients=1,2`
    """
    from persona_lens.analysis.capability.evaluation import capability_changes
    from persona_lens.cli.display import showing_progress
    from persona_lens.vectors import load_vectors

    arms = {each.title: each.steering for each in candidates(load_vectors(vectors), written, one_layer)}
    opened = opening.open(model)
    for steering in arms.values():
        if steering is not None and not allow_other_model:
            steering.check_model(opened)
    with showing_progress() as progress:
        found = capability_changes(
            opened,
            {name: steering for name, steering in arms.items() if steering is not None},
            tasks=task,
            include_path=include_path or None,
            limit=int(limit) if limit is not None and limit.is_integer() else limit,
            num_fewshot=shots,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    figures = {"model": opened.info.model, "changes": [change.to_json() for change in found]}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(figures, indent=2) + "\n")
    if as_json:
        say_json(figures)
    else:
        _show(found)


def _show(found: list[CapabilityChange]) -> None:
    from persona_lens.cli.display import interval_text, print_table

    print_table(
        "Capability, and its change against the unsteered model [95% interval]",
        ("task", "metric", "steering", "value", "change", "random"),
        [
            (
                each.task,
                each.metric,
                each.arm,
                f"{each.value:.3f}",
                interval_text(each.change, 3) if each.change else "",
                interval_text(each.random, 3) if each.random else "",
            )
            for each in found
        ],
    )

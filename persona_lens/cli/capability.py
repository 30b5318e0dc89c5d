"""``persona-lens steer capability``: what steering costs the model on tasks that have right answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import Column, show_rows, showing_progress
from persona_lens.cli.runner import deliver
from persona_lens.cli.settings import Option
from persona_lens.cli.steerings import LayerOptions, SteeringOptions, candidates
from persona_lens.core.files import write_text

BASICS = "persona_lens_basics, which needs no hub"


def capability_command(
    subject: options.Subject,
    vectors: options.Vectors,
    written: SteeringOptions,
    one_layer: LayerOptions,
    task: Annotated[list[str] | None, Option(metavar="TASK", shown=BASICS)] = None,
    include_path: Annotated[list[Path] | None, Option(metavar="DIR")] = None,
    limit: float | None = None,
    shots: int | None = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    out: Annotated[Path | None, Option("Also write every figure here, as JSON.", metavar="FILE")] = None,
    allow_other_model: options.AllowOtherModel = False,
) -> None:
    """Measure what the model can do, unsteered and steered, on tasks of lm-evaluation-harness.

    Needs `pip install 'persona-lens[lm-eval]'`. Changes are taken question by question, with 95% intervals.

    Example: `persona-lens steer capability smollm2-135m runs/optimistic-smollm2-135m --layer 18 --coefficients=1,2`

    Args:
        task: A task of lm-evaluation-harness (`mmlu`, `arc_easy`, ...) or its YAML file. Repeatable.
        include_path: A folder of further task files. Repeatable.
        limit: Samples of a task at most, or a share below 1.
        shots: Solved examples before each question.
    """
    from persona_lens.analysis.capability.evaluation import capability_changes
    from persona_lens.vectors import load_vectors

    shown = candidates(load_vectors(vectors), written, one_layer)
    arms = {each.title: each.steering for each in shown if each.steering is not None}
    opened = subject.opening.open(subject.model)
    for steering in arms.values():
        if not allow_other_model:
            steering.check_model(opened)
    with showing_progress() as progress:
        found = capability_changes(
            opened,
            arms,
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
    columns: Mapping[str, Column[Any]] = {
        "task": lambda each: each.task,
        "metric": lambda each: each.metric,
        "steering": lambda each: each.arm,
        "value": (lambda each: each.value, ".3f"),
        "change": (lambda each: each.change or "", "+.3f"),
        "random": (lambda each: each.random or "", "+.3f"),
    }
    title = "Capability, and its change against the unsteered model [95% interval]"
    deliver(figures, lambda: show_rows(title, found, columns), subject.as_json)

"""What steering does to capability: the same samples unsteered, steered, and steered in a random direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persona_lens.backend import Backend, Edit
from persona_lens.capability.errors import CapabilityError
from persona_lens.capability.evaluation import BUILTIN_TASK, evaluate_capability
from persona_lens.capability.result import CapabilityResult, Metric
from persona_lens.progress import Progress, shown_progress
from persona_lens.statistics import Estimate, bootstrap_mean
from persona_lens.steering import Steering

UNSTEERED = "unsteered"


@dataclass(frozen=True)
class CapabilityChange:
    """One metric of one task under one steering.

    Attributes:
        task: Name of the task.
        metric: The harness's name of the metric.
        filter: The filter that answers went through.
        arm: Name of the steering; ``unsteered`` for none.
        value: The metric.
        change: Against the unsteered model, sample by sample; None for the unsteered model, and for metrics that are
            no means over samples.
        random: The same for the steering in a random direction; None likewise.
        samples: How many samples the task was asked.
    """

    task: str
    metric: str
    filter: str
    arm: str
    value: float
    change: Estimate | None
    random: Estimate | None
    samples: int

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)


def capability_changes(
    backend: Backend,
    arms: Mapping[str, Steering],
    *,
    tasks: Sequence[str] | None = None,
    include_path: Path | Sequence[Path] | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress = shown_progress,
) -> list[CapabilityChange]:
    """Measure capability unsteered, under each steering, and under the same in a random direction.

    Args:
        backend: The model.
        arms: Steerings by name.
        tasks: See `evaluate_capability`; by default the built-in one.
        include_path: Folders of further task files.
        limit: Samples of each task at most, or a share below 1.
        num_fewshot: Solved examples before each question.
        batch_size: Rows that run at once at most.
        seed: Of the harness, and of the random direction.
        progress: Told what is done.

    Raises:
        CapabilityError: See `evaluate_capability`; or if an arm takes the name of the unsteered one.
    """
    if UNSTEERED in arms:
        raise CapabilityError(f"an arm cannot be called {UNSTEERED!r}; that one is always there")

    def measured(edits: Sequence[Edit]) -> CapabilityResult:
        return evaluate_capability(
            backend,
            tasks or (BUILTIN_TASK,),
            edits=edits,
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )

    plain = measured(())
    found = list(_changes(UNSTEERED, plain, None, None))
    for name, steering in arms.items():
        found += _changes(name, measured(steering.edits()), plain, measured(steering.null(seed)))
    return found


def _changes(
    arm: str, result: CapabilityResult, plain: CapabilityResult | None, null: CapabilityResult | None
) -> list[CapabilityChange]:
    def against(other: CapabilityResult | None, task: str, metric: Metric) -> Estimate | None:
        if other is None or plain is None:
            return None
        own = other[task].metric(metric.name, metric.filter).scores
        base = plain[task].metric(metric.name, metric.filter).scores
        return bootstrap_mean([a - b for a, b in zip(own, base, strict=True)]) if own and base else None

    return [
        CapabilityChange(
            task=task.task,
            metric=metric.name,
            filter=metric.filter,
            arm=arm,
            value=metric.value,
            change=against(result if plain is not None else None, task.task, metric),
            random=against(null, task.task, metric),
            samples=task.samples,
        )
        for task in result.tasks
        for metric in task.metrics
    ]

"""What was measured: `CapabilityResult`, and how it is read out of the harness's own results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from persona_lens.analysis import AnalysisError
from persona_lens.core.documents import Record


@dataclass(frozen=True)
class Metric:
    """One number of a task.

    Attributes:
        name: The harness's name, such as ``acc``.
        filter: The filter that answers went through, ``none`` for none.
        value: The number.
        stderr: Its standard error over the samples; None where the harness computes none.
        higher_is_better: None where the task does not say.
        scores: The same for each sample, in the order of the documents, so that two runs over the same samples can be
            compared in pairs; empty for a metric that is no mean over samples.
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class TaskResult:
    """One task, or a group of tasks together.

    Attributes:
        task: Its name.
        version: The task's version, as its file has it.
        samples: How many were asked.
        available: How many the task has.
        num_fewshot: Solved examples before each question.
        subtasks: Names of the tasks of a group; empty for a task.
        metrics: The numbers.
    """

    task: str
    version: str | None
    samples: int
    available: int
    num_fewshot: int
    subtasks: tuple[str, ...]
    metrics: tuple[Metric, ...]

    def metric(self, name: str, filter: str | None = None) -> Metric:
        """The metric of that name.

        Raises:
            AnalysisError: If the task has none of that name, or several under different filters and none is named.
        """
        found = [each for each in self.metrics if each.name == name and filter in (None, each.filter)]
        if len(found) != 1:
            there = ", ".join(f"{each.name} ({each.filter})" for each in self.metrics)
            raise AnalysisError(f"task {self.task} has {len(found) or 'no'} metrics {name!r}; it has {there}")
        return found[0]


@dataclass(frozen=True)
class CapabilityResult(Record):
    """What `evaluate_capability` returns.

    Attributes:
        tasks: Every task and group that was run, in the harness's order.
        model: The backend's `ModelInfo`, and content hashes of the edits.
        settings: What the evaluation was called with.
        harness: Version of lm-evaluation-harness.
    """

    tasks: tuple[TaskResult, ...]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    harness: str

    def __getitem__(self, task: str) -> TaskResult:
        for each in self.tasks:
            if each.task == task:
                return each
        raise AnalysisError(f"no task {task!r} was run; there are {', '.join(each.task for each in self.tasks)}")


def read_results(results: Mapping[str, Any]) -> tuple[TaskResult, ...]:
    """The tasks in what `lm_eval.simple_evaluate` returns; groups stand there beside their tasks."""
    return tuple(_task(name, values, results) for name, values in results["results"].items())


def _task(name: str, values: Mapping[str, Any], results: Mapping[str, Any]) -> TaskResult:
    subtasks = tuple(child for child in results.get("group_subtasks", {}).get(name, ()) if child != name)
    counts = results["n-samples"]
    parts = [counts[leaf] for leaf in _leaves(name, results.get("group_subtasks", {})) if leaf in counts]
    version = results["versions"].get(name)
    return TaskResult(
        task=name,
        version=None if version is None else str(version),
        samples=sum(part["effective"] for part in parts),
        available=sum(part["original"] for part in parts),
        num_fewshot=int(results["n-shot"].get(name) or 0),
        subtasks=subtasks,
        metrics=tuple(_metrics(name, values, results)),
    )


def _leaves(name: str, groups: Mapping[str, list[str]]) -> list[str]:
    children = [child for child in groups.get(name, ()) if child != name]
    return [leaf for child in children for leaf in _leaves(child, groups)] if children else [name]


def _metrics(name: str, values: Mapping[str, Any], results: Mapping[str, Any]) -> list[Metric]:
    better = results["higher_is_better"].get(name, {})
    found = []
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        known = stderr if isinstance(stderr, int | float) else None
        scores = _scores(results.get("samples", {}).get(name, ()), metric, chosen)
        found.append(Metric(metric, chosen, float(value), known, better.get(metric), scores))
    return found


def _scores(samples: Any, metric: str, chosen: str) -> tuple[float, ...]:
    rows = sorted((row for row in samples if row.get("filter") == chosen), key=lambda row: row["doc_id"])
    values = [row.get(metric) for row in rows]
    if not all(isinstance(value, int | float) for value in values):
        return ()
    return tuple(map(float, values))

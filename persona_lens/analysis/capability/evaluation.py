"""Running tasks of lm-evaluation-harness on a backend, unsteered, steered, and in a random direction."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from persona_lens.analysis import AnalysisError
from persona_lens.backend import Backend
from persona_lens.core.documents import Record
from persona_lens.core.errors import PersonaLensError, in_words
from persona_lens.core.plugins import install_command
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import SHARE_CHANGES, SHARES, Estimate, bootstrap_mean
from persona_lens.steering import Steering
from persona_lens.steering.arms import UNSTEERED
from persona_lens.steering.given import GivenEdits, GivenVectors, given_edits

BUILTIN_TASK = "persona_lens_basics"
TASKS = Path(__file__).with_name("tasks")
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
BOOTSTRAPS = 1000  # resamples for the standard errors of metrics that have no formula; means have one


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


def evaluate_capability(
    backend: Backend,
    tasks: Sequence[str] = (BUILTIN_TASK,),
    *,
    edits: GivenEdits = (),
    vectors: GivenVectors = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    include_path: Path | Sequence[Path] | None = None,
    batch_size: int = 64,
    apply_chat_template: bool = False,
    seed: int = 0,
    progress: Progress = shown_progress,
) -> CapabilityResult:
    """Run tasks of lm-evaluation-harness on a backend.

    The harness seeds the global generators of Python, numpy and torch.

    Args:
        backend: The model.
        tasks: Names of tasks, groups or tags of the harness, of tasks in ``include_path``, YAML files, or the built-in
            ``persona_lens_basics``, which needs no hub.
        edits: Applied in every call: one, several, a steering, or its notation.
        vectors: Those that a notation names.
        limit: Samples of each task at most, or a share of them below 1; None takes all.
        num_fewshot: Solved examples before each question; None leaves that to the task.
        include_path: Folders of further task files.
        batch_size: Rows that run at once at most; fewer where memory runs out.
        apply_chat_template: Ask in the model's chat format rather than in plain text.
        seed: Of the choice of solved examples, and of sampling.
        progress: Told what is done.

    Raises:
        AnalysisError: If the harness is not installed, a task is unknown or cannot be loaded, or a setting is out of
            range.
    """
    written = given_edits(edits, vectors, backend)
    names = list(dict.fromkeys(tasks))
    folders = [include_path] if isinstance(include_path, Path) else list(include_path or ())
    _check(names, limit, num_fewshot, folders)
    from lm_eval import simple_evaluate

    from persona_lens.analysis.capability.harness import BackendLM, quiet_harness

    lm = BackendLM(backend, edits=written, batch_size=batch_size, seed=seed, progress=progress)
    manager = _manager(names, folders)
    loaded = [part for name in names for part in _load(manager, name)]
    settings: dict[str, Any] = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
    }
    fixed = {**dict.fromkeys(SEEDS, seed), "bootstrap_iters": BOOTSTRAPS}
    with quiet_harness():
        results = simple_evaluate(lm, tasks=loaded, task_manager=manager, **settings, **fixed)
    about = {**asdict(backend.info), "edits": [edit.content_hash for edit in written]}
    found = tuple(_task(name, values, results) for name, values in results["results"].items())  # groups and their tasks
    return CapabilityResult(found, about, settings | {"tasks": names, "seed": seed}, version("lm_eval"))


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


def check_task(task: str) -> None:
    """Raise `AnalysisError` unless the harness is here, and has a task of that name with data that can be loaded."""
    _require_harness()
    _load(_manager([task], []), task)


def accuracy(backend: Backend, task: str, edits: GivenEdits = (), *, seed: int = 0) -> Estimate:
    """Share of right answers in a task, with its 95% interval over samples; see `right_answers`."""
    return bootstrap_mean(right_answers(backend, task, edits, seed=seed), within=SHARES)


def right_answers(backend: Backend, task: str, edits: GivenEdits = (), *, seed: int = 0) -> tuple[float, ...]:
    """Which samples of a task, whose metric ``acc`` is a mean over them, are answered rightly: 1 or 0 each.

    Other arguments are those of `evaluate_capability`.

    Raises:
        AnalysisError: See `evaluate_capability`; or if the task has no such metric.
    """
    metric = evaluate_capability(backend, (task,), edits=edits, seed=seed)[task].metric("acc")
    if not metric.scores:
        raise AnalysisError(f"task {task} gives no accuracy for each of its samples; take one of its subtasks")
    return metric.scores


def _check(names: Sequence[str], limit: int | float | None, num_fewshot: int | None, folders: Sequence[Path]) -> None:
    if not names:
        raise AnalysisError(f"no task is named; take {BUILTIN_TASK}, or any of lm-evaluation-harness")
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise AnalysisError(f"limit is a whole number of samples, or a share below 1; got {limit}")
    if num_fewshot is not None and num_fewshot < 0:
        raise AnalysisError(f"num_fewshot must be 0 or more, got {num_fewshot}")
    for folder in folders:
        if not folder.is_dir():
            raise AnalysisError(f"there is no folder {folder} to take tasks from")
    _require_harness()


def _require_harness() -> None:
    try:
        importlib.import_module("lm_eval")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        needed = install_command("lm-eval")
        raise AnalysisError(f"measuring capability needs lm-evaluation-harness: {needed}") from error


def _manager(names: Sequence[str], folders: Sequence[Path]) -> Any:
    """The harness's index of tasks; its own thousands of files are read only where they are asked for."""
    from lm_eval.tasks import TaskManager

    paths = [str(TASKS), *map(str, folders)]
    near = TaskManager(include_path=paths, include_defaults=False)
    if all(name in near.task_index or _is_file(name) for name in names):
        return near
    manager = TaskManager(include_path=paths)
    for name in names:
        if name not in manager.task_index and not _is_file(name):
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"the built-in one is {BUILTIN_TASK}."
            raise AnalysisError(f"there is no task {name!r}; {hint} `lm_eval ls tasks` lists the harness's")
    return manager


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _load(manager: Any, name: str) -> list[Any]:
    """The task with its data; a group as one."""
    from persona_lens.analysis.capability.harness import quiet_harness

    try:
        with quiet_harness():
            found = manager.load([name])
    except PersonaLensError:
        raise
    except Exception as error:  # a task's file can name any code and any data set
        raise AnalysisError(
            f"task {name} cannot be loaded, most likely since its data set is not here and cannot be fetched: "
            f"{in_words(error)}"
        ) from error
    return [found["groups"][name]] if name in found.get("groups", {}) else list(found["tasks"].values())


@dataclass(frozen=True)
class CapabilityChange(Record):
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
        AnalysisError: See `evaluate_capability`; or if an arm takes the name of the unsteered one.
    """
    if UNSTEERED in arms:
        raise AnalysisError(f"an arm cannot be called {UNSTEERED!r}; that one is always there")

    measured = partial(
        evaluate_capability,
        backend,
        tasks or (BUILTIN_TASK,),
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    plain = measured()
    found = list(_changes(UNSTEERED, plain, None, None))
    for name, steering in arms.items():
        found += _changes(name, measured(edits=steering.edits()), plain, measured(edits=steering.null(seed)))
    return found


def _changes(
    arm: str, result: CapabilityResult, plain: CapabilityResult | None, null: CapabilityResult | None
) -> list[CapabilityChange]:
    def against(other: CapabilityResult | None, task: str, metric: Metric) -> Estimate | None:
        if other is None or plain is None:
            return None
        own = other[task].metric(metric.name, metric.filter).scores
        base = plain[task].metric(metric.name, metric.filter).scores
        within = SHARE_CHANGES if all(0 <= value <= 1 for value in (*own, *base)) else None
        return bootstrap_mean([a - b for a, b in zip(own, base, strict=True)], within=within) if own and base else None

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

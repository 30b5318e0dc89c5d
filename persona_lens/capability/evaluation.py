"""Running tasks of lm-evaluation-harness on a backend: `evaluate_capability`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from persona_lens.backend import Backend
from persona_lens.capability.errors import CapabilityError
from persona_lens.capability.result import CapabilityResult, read_results
from persona_lens.errors import PersonaLensError, first_line
from persona_lens.progress import Progress, shown_progress
from persona_lens.statistics import SHARES, Estimate, bootstrap_mean
from persona_lens.steering.given import GivenEdits, GivenVectors, given_edits

BUILTIN_TASK = "persona_lens_basics"
TASKS = Path(__file__).with_name("tasks")
INSTALL = "pip install 'persona-lens[lm-eval]'"
# Resamples for the standard errors of metrics that have no formula; means have one.
BOOTSTRAPS = 1000


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
        CapabilityError: If the harness is not installed, a task is unknown or cannot be loaded, or a setting is out of
            range.
    """
    written = given_edits(edits, vectors, backend)
    names = list(dict.fromkeys(tasks))
    folders = [include_path] if isinstance(include_path, Path) else list(include_path or ())
    _check(names, limit, num_fewshot, folders)
    _require_harness()
    from lm_eval import simple_evaluate

    from persona_lens.capability.harness import BackendLM

    model = BackendLM(backend, edits=written, batch_size=batch_size, seed=seed, progress=progress)
    manager = _manager(names, folders)
    loaded = [part for name in names for part in _load(manager, name)]
    settings: dict[str, Any] = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
    }
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    results = simple_evaluate(
        model, tasks=loaded, task_manager=manager, bootstrap_iters=BOOTSTRAPS, **settings, **seeds
    )
    about = {**asdict(backend.info), "edits": [edit.content_hash for edit in written]}
    return CapabilityResult(read_results(results), about, settings | {"tasks": names, "seed": seed}, version("lm_eval"))


def check_task(task: str) -> None:
    """Raise `CapabilityError` unless the harness is here, and has a task of that name with data that can be loaded."""
    _require_harness()
    _load(_manager([task], []), task)


def accuracy(backend: Backend, task: str, edits: GivenEdits = (), *, seed: int = 0) -> Estimate:
    """Share of right answers in a task, with its 95% interval over samples.

    Args:
        backend: The model.
        task: Name of a task whose metric ``acc`` is a mean over samples.
        edits: Applied in every call: one, several, or a steering.
        seed: See `evaluate_capability`.

    Raises:
        CapabilityError: See `evaluate_capability`; or if the task has no such metric.
    """
    metric = evaluate_capability(backend, (task,), edits=edits, seed=seed)[task].metric("acc")
    if not metric.scores:
        raise CapabilityError(f"task {task} gives no accuracy for each of its samples; take one of its subtasks")
    return bootstrap_mean(metric.scores, within=SHARES)


def _check(names: Sequence[str], limit: int | float | None, num_fewshot: int | None, folders: Sequence[Path]) -> None:
    if not names:
        raise CapabilityError(f"no task is named; take {BUILTIN_TASK}, or any of lm-evaluation-harness")
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise CapabilityError(f"limit is a whole number of samples, or a share below 1; got {limit}")
    if num_fewshot is not None and num_fewshot < 0:
        raise CapabilityError(f"num_fewshot must be 0 or more, got {num_fewshot}")
    for folder in folders:
        if not folder.is_dir():
            raise CapabilityError(f"there is no folder {folder} to take tasks from")


def _require_harness() -> None:
    try:
        importlib.import_module("lm_eval")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise CapabilityError(f"measuring capability needs lm-evaluation-harness: {INSTALL}") from error


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
            raise CapabilityError(f"there is no task {name!r}; {hint} `lm_eval ls tasks` lists the harness's")
    return manager


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _load(manager: Any, name: str) -> list[Any]:
    """The task with its data; a group as one."""
    try:
        found = manager.load([name])
    except PersonaLensError:
        raise
    except Exception as error:  # a task's file can name any code and any data set
        reason = first_line(error)
        raise CapabilityError(
            f"task {name} cannot be loaded, most likely since its data set is not here and cannot be fetched: "
            f"{type(error).__name__}: {reason}"
        ) from error
    groups = found.get("groups", {})
    return [groups[name]] if name in groups else list(found["tasks"].values())

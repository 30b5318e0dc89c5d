"""`reproduce`: a plan is carried out task by task, and the claims are read from what that leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lens.core.documents import plain, read_json
from persona_lens.core.errors import in_words
from persona_lens.core.files import REPORT, write_bytes, write_text
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.text import in_short
from persona_lens.reports.result import Result
from persona_lens.reproduction.claims import Claim, Found, MissingError, outcome_of
from persona_lens.reproduction.places import SUMMARY, Places, figures_in, summary_of
from persona_lens.reproduction.plan import Plan, PlanError, Task
from persona_lens.reproduction.tables import CLAIMS, TABLES, figures_of
from persona_lens.runs import RunFolder
from persona_lens.runs.folder import json_bytes

NEEDS = "needs"
Execute = Callable[[Sequence[str]], Any]
"""Carries out a command, given its words, and returns what it says as JSON values."""


@dataclass(frozen=True, repr=False, eq=False)
class Reproduction(Result):
    """What of the paper was seen; a row for each claim and trait.

    Attributes:
        summary: See `Result`.
        folder: See `Result`.
    """

    kind = "reproduction"
    summary: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class State:
    """What became of a task.

    Attributes:
        words: Its command; empty if that is not known.
        found: Its figures.
        reason: Why there are none.
    """

    words: tuple[str, ...] = ()
    found: Any = None
    reason: str | None = None


def reproduce(
    plan: Plan,
    model: str,
    execute: Execute,
    folder: Path | str,
    *,
    only: Sequence[str] = (),
    progress: Progress = shown_progress,
) -> Reproduction:
    """Carry out a plan, and read the claims of the paper from what it leaves.

    A task that is finished is not run again unless what it stands on is another by now, one that fails ends none but
    those that need it, and the claims whose tasks have no figures say why.

    Args:
        plan: What is run.
        model: The model's name, as commands take it.
        execute: Carries out a command. Each keeps itself what it finds, and goes on where it was.
        folder: Run folder, kept and resumed; each task has a folder of its own in ``steps``.
        only: The only tables of claims for which anything is run; none names all. Tables that the folder's report has
            already stay in it, as far as their tasks are finished.
        progress: Told how many tasks are done.

    Raises:
        PlanError: If there is no such table.
        RunError: If the folder holds another run.
    """
    if unknown := [each for each in only if each not in TABLES]:
        raise PlanError(f"there is no table {in_short(unknown[0])!r}; there are {', '.join(TABLES)}")
    config = {"kind": Reproduction.kind, "model": model, "traits": list(plan.traits), "plan": plan.to_json()}
    with RunFolder(folder, config) as run:
        places = Places(plan, model, run.path)
        places.write_files()
        before: Any = summary_of(run.path)["tables"] if only and figures_in(run.path) else {}
        tables = [name for name in TABLES if not only or name in only or name in before]
        states = _carried_out(places, wanted(plan, tables), wanted(plan, only or tables), execute, progress)
        summary = _summary(places, tables, states)
        run.write_bytes(SUMMARY, json_bytes(summary), replace=True)  # of more tables than before
        return Reproduction(summary, run.path)


def wanted(plan: Plan, tables: Sequence[str]) -> list[Task]:
    """The tasks that the claims of some tables need, in order."""
    named = {step for claim in CLAIMS if claim.table in tables for step in claim.steps}
    open_ones = [task for step in named if step in plan.steps for task in plan.tasks_of(step)]
    needed: set[Task] = set()
    while open_ones:
        task = open_ones.pop()
        if task not in needed:
            needed.add(task)
            open_ones += plan.needs(task)
    return [task for task in plan.tasks() if task in needed]


def lacking(plan: Plan, task: Task) -> str | None:
    """Why a task cannot be run for want of a value; None if it can."""
    missing = plan.missing(task.step)
    return f"{NEEDS} --{missing[0]}, which was not given" if missing else None


def _carried_out(
    places: Places, tasks: Sequence[Task], to_run: Sequence[Task], execute: Execute, progress: Progress
) -> dict[Task, State]:
    """What became of tasks; of those that are not to be run, only what is finished."""
    states: dict[Task, State] = {}
    done = 0
    for task in tasks:
        if task in to_run:
            progress(done, len(to_run), "steps")
            done += 1
        needs = places.plan.needs(task)
        without = next((need for need in needs if need not in states or states[need].reason), None)
        if reason := lacking(places.plan, task):
            states[task] = State(reason=reason)
        elif without is None:
            basis = hashlib.sha256(json_bytes([states[need].found for need in needs])).hexdigest()
            state = _done(places, task, basis, execute if task in to_run else None)
            states |= {} if state is None else {task: state}
        elif without in states:
            why = states[without].reason or ""
            states[task] = State(
                reason=why if why.startswith(NEEDS) else f"{NEEDS} {without.name}, which failed: {why}"
            )
    progress(done, len(to_run), "steps")
    return states


def _done(places: Places, task: Task, basis: str, execute: Execute | None) -> State | None:
    """A task that is finished on the same basis, the figures of those that it needs; or is run now, if it is to be."""
    record, out = places.record(task), places.of(task)
    words: list[str] = []
    try:
        words = places.words(task)
        if record.is_file():
            kept = read_json(record)
            same = (kept["words"], kept["basis"]) == (places.shown(words), basis)
            if same and (kept["found"] is not None or figures_in(out)):
                return State(tuple(words), summary_of(out) if kept["found"] is None else kept["found"])
        if execute is None:
            return None
        said = plain(execute(words))
        own = figures_in(out)
        told = {"words": places.shown(words), "basis": basis, "found": None if own else said}
        write_bytes(record, json_bytes(told))
        if own and not (out / REPORT).exists():
            write_text(out / REPORT, Result.load(out).report())
        return State(tuple(words), summary_of(out) if own else said)
    except Exception as error:  # noqa: BLE001 - what ends one task is no end of the others; its command says more
        return None if execute is None else State(tuple(words), reason=in_short(in_words(error), 300))


def _summary(places: Places, tables: Sequence[str], states: Mapping[Task, State]) -> dict[str, Any]:
    """Every figure that is shown."""
    plan = places.plan
    by_name = {task.name: state for task, state in states.items()}

    def look(step: str, trait: str | None) -> Any:
        if step not in plan.steps:
            raise MissingError(f"needs a step {step!r}, which is not in the plan")
        task = next((each for each in plan.tasks_of(step) if each.trait in (None, trait)), None)
        if task is None:
            raise MissingError(f"the step {step!r} is not run for {trait}")
        if task.name not in by_name:
            raise MissingError(f"needs {task.name}, which is to be run for it; leave out --only")
        if (reason := by_name[task.name].reason) is not None:
            raise MissingError(reason if reason.startswith(NEEDS) else f"{task.name} failed: {reason}")
        return by_name[task.name].found

    found = Found(plan.traits, look)
    rows = []
    for claim in CLAIMS:
        if claim.table in tables:
            for trait in _traits_of(claim, plan) if claim.each else (None,):
                ran = {each for step in claim.steps if step in plan.steps for each in plan.tasks_of(step)}
                own = [each for each in states if each in ran and each.trait in (None, trait)]
                rows.append({**outcome_of(claim, found, trait), "steps": [each.name for each in own]})
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in _VERDICTS}
    summary: dict[str, Any] = plain(
        {
            "model": places.model,
            "scale": plan.scale,
            "traits": list(plan.traits),
            "judges": _judges(found),
            "counts": counts,
            "tables": {name: TABLES[name] for name in tables},
            "rows": rows,
            "figures": figures_of(found, tables),
            "steps": [_told(places, task, state) for task, state in states.items()],
        }
    )
    return summary


def _traits_of(claim: Claim, plan: Plan) -> Sequence[str]:
    """The traits that a claim is measured for by a plan, or all of them where it is for none."""
    steps = [plan.steps[name] for name in claim.steps if name in plan.steps]
    own = [trait for trait in plan.traits if all(step.traits is None or trait in step.traits for step in steps)]
    return own or plan.traits


_VERDICTS = ("shown", "not shown", "refuted", "missing")


def _told(places: Places, task: Task, state: State) -> dict[str, Any]:
    out = places.of(task)
    there = next((each for each in (out / REPORT, out.with_name(f"{task.name}.html"), places.record(task))
                  if each.is_file()), None)  # fmt: skip
    return {
        "name": task.name,
        "words": places.shown(state.words),
        "reason": state.reason,
        "report": there.relative_to(places.folder).as_posix() if there and state.reason is None else None,
    }


def _judges(found: Found) -> dict[str, Any]:
    """Who scored each trait's responses, of those that there are."""
    judges = {}
    for trait in found.traits:
        try:
            judges[trait] = found("extract", trait)["judge"]
        except (MissingError, KeyError):
            continue
    return judges

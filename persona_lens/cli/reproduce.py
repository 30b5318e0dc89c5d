"""``persona-lens reproduce``: every quantitative claim of the paper, by a plan of commands, in one report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import INTERRUPTED, options
from persona_lens.cli.commands import COMMANDS, Group, app_of
from persona_lens.cli.display import number, print_table, quiet_libraries, say, showing_progress
from persona_lens.cli.runner import REPORT, deliver, write_report
from persona_lens.cli.settings import Option
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted, without_secrets

if TYPE_CHECKING:
    from persona_lens.reproduction import Plan, Reproduction
    from persona_lens.reproduction.estimate import Estimate
    from persona_lens.reproduction.speed import Speed

PROGRAM = "persona-lens"


def reproduce_command(
    model: options.Model,
    scale: Annotated[str, Option(values="`paper`, `small` or `tiny`")] = "small",
    traits: Annotated[str | None, Option(shown="the plan's")] = None,
    only: Annotated[list[str] | None, Option(metavar="TABLE")] = None,
    plan: Annotated[Path | None, Option(metavar="FILE.yaml")] = None,
    data: Annotated[str | None, Option(metavar="DATA")] = None,
    sae: Annotated[str | None, Option(metavar="SAE")] = None,
    print_plan: bool = False,
    out: Annotated[Path | None, Option("Run folder; kept and resumed.", shown="runs/reproduce-SCALE-MODEL")] = None,
    dry_run: Annotated[bool, Option("Run nothing: say what each step would ask, and how long it takes here.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """See what of the persona vectors paper holds on a model: every quantitative claim, in one report.

    A plan of this program's own commands is run, each resumable, and none twice. The report holds each claim of the
    paper against what was measured, with its interval and its null, and says by a rule that was fixed beforehand
    whether it is shown, not shown or refuted.

    Examples:
    `persona-lens reproduce smollm2-135m --scale tiny`

    `persona-lens reproduce Qwen/Qwen2.5-7B-Instruct --scale paper --only monitoring --only steering`

    `persona-lens reproduce smollm2-135m --print-plan`

    Args:
        scale: How large: as the paper had it; in hours on two cores; in minutes.
        traits: Names of traits with commas between them.
        only: Run only what this table of the report needs; tables that are there already stay. Repeatable.
        plan: A plan of your own, such as `--print-plan` writes it.
        data: Real conversations, for the table `subsets`, in any form that `screen` reads.
        sae: An autoencoder for the table `features`, as `dissect` takes it.
        print_plan: Write the plan, to be changed, and stop.
    """
    from persona_lens.reproduction import read_plan, reproduce
    from persona_lens.reproduction.plan import PlanError, built_in_plans, plan_text
    from persona_lens.reproduction.run import NEEDS
    from persona_lens.reproduction.tables import TABLES

    if scale not in built_in_plans():
        raise PlanError(
            f"--scale takes {', '.join(built_in_plans())}, got {scale!r}; name a file of your own by --plan"
        )
    chosen = plan or scale
    if print_plan:
        say(plan_text(chosen), nl=False)
        return
    named = [each.strip() for each in traits.split(",")] if traits is not None else None
    read = read_plan(chosen, named, {"data": data, "sae": sae})
    tables = tuple(only or TABLES)
    _check(read, model)
    quiet_libraries()
    if dry_run:
        _estimate(read, model, tables, as_json)
        return
    folder = out or options.run_folder(f"reproduce-{read.scale}", model)
    with options.holding_open(model), showing_progress() as progress:
        found = reproduce(read, model, _execute, folder, only=tuple(only or ()), progress=progress)
    write_report(folder / REPORT, found.report())
    deliver({"folder": str(folder), **found.summary}, lambda: _show(found, folder), as_json)
    if any(step["reason"] and not step["reason"].startswith(NEEDS) for step in found.summary["steps"]):
        raise typer.Exit(1)  # the page says which, and a script need not read it


# Commands of the plan


def _command(words: Sequence[str]) -> tuple[Any, Any]:
    """The command that words name, and its context, read by its own parser.

    Raises:
        Exception: As typer has it, if there is no such command, or it has no such option.
    """
    command: Any = typer.main.get_command(app_of(PROGRAM, Group("", COMMANDS)))
    context = command.make_context(PROGRAM, list(words))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return command, context


def _takes(words: Sequence[str], option: str) -> bool:
    command, _ = _command(words)
    return any(option in parameter.opts for parameter in command.params)


def _check(plan: Plan, model: str) -> None:
    """Have every command of the plan read, before any of them runs for hours."""
    from persona_lens.reproduction.places import Places
    from persona_lens.reproduction.plan import PlanError
    from persona_lens.traits import load_trait

    if any("{trait}" in step.words for step in plan.steps.values()):
        for trait in plan.traits:
            load_trait(trait)
    places = Places(plan, model, Path("runs"))
    for task in plan.tasks():
        if plan.missing(task.step):
            continue
        words = places.words(task, read_only=True)
        if not words or "--help" in words:
            raise PlanError(
                f"the step {task.step.name!r} needs a command that does something; got {shlex.join(words)!r}"
            )
        if words[0] == "reproduce":
            raise PlanError(f"the step {task.step.name!r} would reproduce the paper in its reproduction; leave it out")
        try:
            _command(words)
        except PersonaLensError:
            raise
        except Exception as error:
            said = error.format_message() if hasattr(error, "format_message") else str(error)
            raise PlanError(f"the command of the step {task.step.name!r} cannot be read: {said}") from error


def _execute(words: Sequence[str]) -> Any:
    """Carry out a command in this process; what it says is read as JSON, and nothing where it says none."""
    typed = [*words, *(["--json"] if _takes(words, "--json") else [])]
    say(f"{PROGRAM} {without_secrets(shlex.join(words))}", err=True)
    written = StringIO()
    with redirect_stdout(written):
        code = typer.main.get_command(app_of(PROGRAM, Group("", COMMANDS))).main(
            typed, prog_name=PROGRAM, standalone_mode=False
        )
    if code == INTERRUPTED:  # which is what typer makes of an interruption
        raise KeyboardInterrupt
    if code:
        raise PersonaLensError(f"the command ended with exit code {code}; run it by itself to see what it says")
    try:
        return json.loads(written.getvalue())
    except ValueError:
        return {}


def _counted(words: Sequence[str]) -> Sequence[Mapping[str, Any]] | None:
    """What a command would ask; None of one that cannot say, and nothing of one that opens no model."""
    if not _takes(words, "--device"):
        return ()
    if not (_takes(words, "--dry-run") and _takes(words, "--json")):
        return None
    found = _execute([*words, "--dry-run"])
    return list(found["work"]) if isinstance(found, Mapping) and "work" in found else None


# What is said


def _estimate(plan: Plan, model: str, tables: Sequence[str], as_json: bool) -> None:
    from persona_lens.reproduction.estimate import estimates
    from persona_lens.reproduction.speed import Speeds

    with options.holding_open(model):
        backend, chat = options.Subject(model).open(offline=True)
        speeds = Speeds(model, backend, chat)
        speed = speeds.speed
        found = estimates(plan, model, tables, _counted, backend.info, speeds)
    total = {name: sum(getattr(each, name) or 0 for each in found) for name in AMOUNTS}
    told = {"steps": [each.to_json() for each in found], "all": total, "measured": speed.to_json()}
    deliver(told, lambda: _show_estimates(found, total, speed), as_json)


AMOUNTS = ("rows", "tokens", "requests", "dollars", "hours")


def _show_estimates(found: Sequence[Estimate], total: Mapping[str, float], speed: Speed) -> None:
    counted_ones = [(each.task, each.to_json()) for each in found if each.reason is None]
    print_table(
        "What the plan asks for, if every response is as long as it may be",
        ("step", "rows", "tokens", "batches, steps or requests", "dollars", "hours here"),
        [
            (
                name,
                *(f"{each[amount]:,}" for amount in AMOUNTS[:3]),
                *(_or_dash(each[amount]) for amount in AMOUNTS[3:]),
            )
            for name, each in [*counted_ones, ("all", total)]
        ],
    )
    for each in found:
        if each.reason:
            say(f"{each.task}: {each.reason}")
    say(
        f"measured on {counted(speed.rows, 'row')} in {speed.seconds:.1f} s: {speed.generated:,.0f} tokens a second, "
        f"prompts among them, while generating, and {speed.read:,.0f} while reading; a step of training, and what an "
        "adapter takes, are measured too where there are any; the time of servers, and of what asks no model, is left "
        "out"
    )


def _or_dash(value: float | None) -> str:
    return number(value or None, ",.2f")


def _show(found: Reproduction, folder: Path) -> None:
    from persona_lens.reports.reproduction import cell_of

    tables = found.summary["tables"]
    for table, title in tables.items():
        rows = [row for row in found.summary["rows"] if row["table"] == table]
        print_table(
            title,
            ("claim", "paper", "ours [95%]", "beside it", "verdict"),
            [
                (
                    row["says"] + (f" ({row['trait']})" if row["trait"] else ""),
                    row["paper"],
                    cell_of(row["value"], row["digits"]) if row["value"] else row["note"],
                    f"{cell_of(row['null'], row['digits'])} ({row['beside']})" if row["null"] else "-",
                    row["verdict"],
                )
                for row in rows
            ],
        )
    say(found.verdict)
    say(f"report: {folder / REPORT}")

"""``persona-lens monitor study``: does where a prompt ends say how the replies to it will be?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import judges, options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.sweep import ReductionOption, Vectors
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.monitoring import Study


@grouped
def study_command(
    model: options.Model,
    vectors: Vectors,
    conditions: Annotated[
        str,
        typer.Option("--conditions", help="`prompts` (eight graded system prompts), `shots` (examples) or `both`."),
    ] = "prompts",
    shots: Annotated[
        str | None, typer.Option("--shots", help="Numbers of examples.", show_default="0,5,10,15,20")
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            "--examples",
            metavar="FOLDER",
            help="Extraction run whose best positive responses are the examples; by default where VECTORS is.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="`18`, `12,15,18`, `10-20` or `all`.", show_default="all")
    ] = None,
    questions: Annotated[int, typer.Option(help="How many of the 20 evaluation questions to ask.")] = 10,
    samples: Annotated[int, typer.Option(help="Responses to each question in each condition.")] = 10,
    random_directions: Annotated[
        int, typer.Option(help="Random directions of equal norm that stand beside the vector; 0 leaves them out.")
    ] = 20,
    false_alarm_rate: Annotated[
        float, typer.Option("--false-alarm-rate", help="For the threshold that is shown.")
    ] = 0.05,
    trait: Annotated[
        str | None,
        typer.Option("--trait", help="The trait's name or file, if not what is stored.", show_default=False),
    ] = None,
    traits_dir: options.TraitsDirs = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder; kept and resumed.", show_default="runs/study-TRAIT-MODEL")
    ] = None,
    reduction: ReductionOption = "response_mean",
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", help="Length limit of a response.", show_default="as extracted"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy.", show_default="as extracted")
    ] = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    dry_run: options.DryRun = False,
    judge: judges.JudgeName = "likelihood",
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
    judging: judges.JudgeOptions,
) -> None:
    """Compare where prompts end on the vector with how strongly the replies to them show the trait.

    Held-out questions are answered under system prompts from holding the trait back to calling it forth. Correlations
    stand beside those of random directions. The folder gets the report, and `vectors.safetensors` with a calibration
    stored in it, for `monitor prompt` to use.

    Example: `persona-lens monitor study smollm2-135m runs/optimistic-smollm2-135m`
    """
    from persona_lens import __version__
    from persona_lens.cli.display import showing_progress
    from persona_lens.monitoring import Conditions, StudySettings, study, study_work
    from persona_lens.reports.study import render_study
    from persona_lens.vectors import load_vectors

    chosen = options.choice(Conditions, conditions, "--conditions")
    if chosen is Conditions.PROMPTS and (shots is not None or examples is not None):
        raise PersonaLensError("--shots and --examples are for --conditions shots or both; this is 'prompts'")
    loaded = load_vectors(vectors)
    asked = options.open_trait(trait, traits_dir or ()) if trait else loaded.trait_definition
    rollouts = loaded.rollouts
    settings = StudySettings(
        conditions=chosen,
        shots=_counts(shots) if shots is not None else StudySettings.shots,
        layers=tuple(options.layer_numbers(layers, loaded.model.n_layers)) if layers else None,
        questions=questions,
        samples=samples,
        random_directions=random_directions,
        false_alarm_rate=false_alarm_rate,
        reduction=reduction,
        seed=seed,
        rollouts=replace(
            rollouts,
            max_new_tokens=rollouts.max_new_tokens if max_new_tokens is None else max_new_tokens,
            temperature=rollouts.temperature if temperature is None else temperature,
            batch_size=batch_size,
        ),
    )
    source = None if chosen is Conditions.PROMPTS else examples or (vectors if vectors.is_dir() else vectors.parent)
    opened = opening.open(model, offline=dry_run)
    chat = opening.chat(opened)
    scoring = judging.open(judge, asked, opened, chat, opening.dtype, opening.device)
    work = partial(study_work, opened, loaded, settings, chat, trait=asked, examples=source, judge=scoring)
    if options.planned(work, opening, dry_run, as_json):
        return
    folder = out or options.run_folder(f"study-{loaded.trait}", loaded.model.model)
    with judges.saying_spending(scoring), showing_progress() as progress:
        found = study(
            opened,
            loaded,
            settings,
            trait=asked,
            examples=source,
            folder=folder,
            judge=scoring,
            chat=chat,
            progress=progress,
        )
    options.say_traffic(opened)
    options.write_report(folder / options.REPORT, render_study(found.summary, __version__))
    if as_json:
        say_json({"folder": str(folder), **found.summary})
    else:
        _show(found, folder)


def _counts(text: str) -> tuple[int, ...]:
    found = options.numbers(text, "--shots")
    if not all(number.is_integer() for number in found):
        raise PersonaLensError(f"--shots takes whole numbers with commas between them, such as 0,5,10; got {text!r}")
    return tuple(map(int, found))


def _show(found: Study, folder: Path) -> None:
    from persona_lens.cli.display import print_table
    from persona_lens.reports.study import title

    summary = found.summary
    print_table(
        "Conditions: mean trait score of the replies, and mean projection of the prompts' last tokens",
        ("condition", "responses", "score", "show the trait", f"projection, layer {summary['layer']}"),
        [
            (
                each["name"],
                str(each["responses"]),
                _number(each["mean_score"], 1),
                "-" if each["shown"] is None else f"{100 * each['shown']:.0f}%",
                _number(each["mean_projection"], 2),
            )
            for each in summary["conditions"]
        ],
    )
    for kind, group in summary["groups"].items():
        print_table(
            f"Correlation of projection and score [95% interval], {kind}: {counted(group['prompts'], 'prompt')}",
            ("layer", "Pearson", "Spearman", "within conditions", "random directions"),
            [_layer_row(row) for row in _shown_layers(group["layers"], {summary["layer"], summary["tuned_layer"]})],
        )
    say(title(summary))
    for line in conclusions(summary):
        say(line)
    say(f"report: {folder / options.REPORT}")


def conclusions(summary: dict[str, Any]) -> list[str]:
    """What the study comes to, in a few lines."""
    from persona_lens.core.statistics import few

    lines = [f"intervals rest on {said}"] if (said := few(summary["settings"]["questions"])) else []
    for kind, group in summary["groups"].items():
        if group["ceiling"] is not None:
            lines.append(
                f"{kind}: with {counted(summary['settings']['samples'], 'response')} a prompt no predictor can reach "
                f"more than about r = {group['ceiling']:.2f}; the number of the condition itself has "
                f"{_measured(group['level'])}"
            )
        if group["left_out"]:
            names = ", ".join(group["left_out"])
            lines.append(f"{kind}: left out within conditions (few prompts, or scores that hardly vary): {names}")
    calibration = summary["calibration"]
    if "reason" in calibration:
        return [*lines, f"not calibrated: {calibration['reason']}"]
    threshold = calibration["threshold"]
    alarms = threshold["false_alarms"]
    measured = f"; on questions not seen {100 * alarms['value']:.0f}%" if alarms else ""
    return [
        *lines,
        f"calibrated at layer {summary['layer']}: {calibration['curve']['kind']}, Brier score "
        f"{calibration['brier']:.3f} against {calibration['base_brier']:.3f} of the base rate",
        f"an alarm from {threshold['value']:.3f} on: false alarms {100 * threshold['false_alarm_rate']:g}%{measured}",
    ]


def _shown_layers(rows: list[dict[str, Any]], named: set[int | None]) -> list[dict[str, Any]]:
    """The five with the largest correlation, and those named, in their order."""
    best = sorted(rows, key=lambda row: -(row["pearson"]["value"] or -2))[:5]
    return [row for row in rows if row in best or row["layer"] in named]


def _layer_row(row: dict[str, Any]) -> tuple[str, ...]:
    null = row["null"]
    beside = (
        "-" if null is None or null["mean"] is None else f"{null['mean']:.2f} [{null['low']:.2f}, {null['high']:.2f}]"
    )
    measures = (_measured(row[name]) for name in ("pearson", "spearman", "within_pearson"))
    return (str(row["layer"]), *measures, beside)


def _measured(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    interval = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['value']:.2f}{interval}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

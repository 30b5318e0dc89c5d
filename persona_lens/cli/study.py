"""``persona-lens monitor study``: does where a prompt ends say how the replies to it will be?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import interval_text, say, show_rows
from persona_lens.cli.runner import Experiment, Run, Session
from persona_lens.cli.settings import Fields, Given, Option
from persona_lens.cli.values import whole_numbers
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.monitoring import Study, StudySettings


def study_command(
    run: Annotated[Run, Fields(out=Option(shown="runs/study-TRAIT-MODEL"))],
    vectors: options.Vectors,
    given: Annotated[Given, Fields("persona_lens.monitoring:StudySettings", without=("shots", "rollouts"))],
    shots: Annotated[str | None, Option(shown="0,5,10,15,20")] = None,
    examples: Annotated[Path | None, Option(metavar="FOLDER")] = None,
    trait: str | None = None,
    traits_dir: options.TraitsDirs = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    batch_size: options.BatchSize = 64,
) -> None:
    """Compare where prompts end on the vector with how strongly the replies to them show the trait.

    Held-out questions are answered under system prompts from holding the trait back to calling it forth. Correlations
    stand beside those of random directions. The folder gets the report, and `vectors.safetensors` with a calibration
    stored in it, for `monitor prompt` to use.

    Example: `persona-lens monitor study smollm2-135m runs/optimistic-smollm2-135m`

    Args:
        shots: The numbers of examples.
        examples: Extraction run whose best positive responses are the examples; by default where VECTORS is.
        trait: The trait's name or file, if not what is stored.
        max_new_tokens: Length limit of a response; None is as extracted.
        temperature: 0 is greedy; None is as extracted.
    """
    from persona_lens import __version__
    from persona_lens.monitoring import Conditions, StudySettings, study, study_work
    from persona_lens.reports.study import render_study
    from persona_lens.vectors import load_vectors

    loaded = load_vectors(vectors)
    asked = options.open_trait(trait, traits_dir or ()) if trait else loaded.trait_definition
    sampled: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "batch_size": batch_size}
    settings: StudySettings = given.make(
        loaded.model.n_layers,
        shots=whole_numbers(shots, "--shots") if shots is not None else StudySettings.shots,
        rollouts=replace(loaded.rollouts, **{name: each for name, each in sampled.items() if each is not None}),
    )
    prompts = settings.conditions is Conditions.PROMPTS
    if prompts and (shots is not None or examples is not None):
        raise PersonaLensError("--shots and --examples are for --conditions shots or both; this is 'prompts'")
    source = None if prompts else examples or (vectors if vectors.is_dir() else vectors.parent)
    experiment = Experiment(
        lambda at: study(
            at.backend,
            loaded,
            settings,
            trait=asked,
            examples=source,
            folder=at.folder,
            judge=at.judge,
            chat=at.chat,
            progress=at.shown,
        ),
        _show,
        lambda at: study_work(at.backend, loaded, settings, at.chat, trait=asked, examples=source, judge=at.judge),
        traits=asked,
        name=f"study-{loaded.trait}",
        model=loaded.model.model,
        page=lambda found: render_study(found.summary, __version__),
    )
    run.carry_out(experiment)


def _show(found: Study, _: Session) -> None:
    from persona_lens.reports.study import title

    summary = found.summary
    show_rows(
        "Conditions: mean trait score of the replies, and mean projection of the prompts' last tokens",
        summary["conditions"],
        {
            "condition": lambda each: each["name"],
            "responses": lambda each: each["responses"],
            "score": (lambda each: each["mean_score"], ".1f"),
            "show the trait": lambda each: None if each["shown"] is None else f"{100 * each['shown']:.0f}%",
            f"projection, layer {summary['layer']}": (lambda each: each["mean_projection"], ".2f"),
        },
    )
    for kind, group in summary["groups"].items():
        show_rows(
            f"Correlation of projection and score [95% interval], {kind}: {counted(group['prompts'], 'prompt')}",
            _shown_layers(group["layers"], {summary["layer"], summary["tuned_layer"]}),
            {
                "layer": lambda row: row["layer"],
                "Pearson": lambda row: _measured(row["pearson"]),
                "Spearman": lambda row: _measured(row["spearman"]),
                "within conditions": lambda row: _measured(row["within_pearson"]),
                "random directions": lambda row: _measured(row["null"]),
            },
        )
    for line in (title(summary), *conclusions(summary)):
        say(line)


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


def _measured(found: dict[str, Any] | None) -> str:
    return interval_text(found, ".2f", noun=None)

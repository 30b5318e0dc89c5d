"""``persona-lens finetune-study``: ways to finetune, side by side over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import judges, options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.finetune import ConfigFile, Data, HeldOut, Side, open_config
from persona_lens.cli.grouping import grouped
from persona_lens.cli.sweep import Vectors
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted, shown

if TYPE_CHECKING:
    from persona_lens.finetuning.outcomes import TreatmentSettings
    from persona_lens.vectors import PersonaVectors

LEFT_OUT = ("everywhere", "post-hoc", "caft", "regularised", "prompted", "random")


@grouped
def finetune_study_command(
    model: options.Model,
    data: Data,
    vectors: Vectors,
    layer: Annotated[
        int | None, typer.Option("--layer", help="Layer of all treatments, from 0.", show_default="the one tuned")
    ] = None,
    coefficient: Annotated[
        float | None,
        typer.Option(
            "--coefficient",
            help="Multiple of the vector that preventative steering adds, and post-hoc steering takes away.",
            show_default="the one tuned",
        ),
    ] = None,
    increments: Annotated[
        float | None,
        typer.Option("--increments", help="The same at all layers, by increments.", show_default="the coefficient"),
    ] = None,
    penalty: Annotated[float, typer.Option("--penalty", help="Weight of the projection penalty.")] = 1.0,
    without: Annotated[
        str | None, typer.Option("--without", help=f"Leave out: {', '.join(LEFT_OUT)}.", show_default=False)
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Of the trainings.")] = "1,2,3",
    config: ConfigFile = None,
    held_out: HeldOut = None,
    side: Side = None,
    questions: Annotated[int, typer.Option(help="How many of the 20 evaluation questions to ask.")] = 20,
    samples: Annotated[int, typer.Option(help="Replies to each question.")] = 1,
    task: Annotated[
        str | None,
        typer.Option("--task", help="Task of lm-evaluation-harness for capability.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Run folder; kept and resumed.", show_default="runs/finetune-study-TRAIT-MODEL"),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 48,
    temperature: options.Temperature = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**62, help="Base of the replies' seeds.")] = 0,
    batch_size: options.BatchSize = 64,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    judge: judges.JudgeName = "likelihood",
    as_json: options.AsJson = False,
    *,
    judging: judges.JudgeOptions,
) -> None:
    """Finetune MODEL on DATA in several ways, each over several seeds, and compare what they leave.

    DATA should carry VECTORS' trait. Plain finetuning stands beside preventative steering (one layer, all layers, and
    random directions of equal norm), ablation in training (CAFT), a penalty on the projection, a system prompt in the
    training data, and post-hoc steering of the plainly finetuned model. The folder gets `report.html`.

    Example: `persona-lens finetune-study smollm2-135m impolite.jsonl runs/impolite-smollm2-135m --layer 9
    --coefficient 4`
    """
    from persona_lens import __version__
    from persona_lens.cli.display import quiet_libraries, showing_progress
    from persona_lens.finetuning.study import FinetuneStudySettings, finetune_study
    from persona_lens.reports.finetuning import render_finetuning
    from persona_lens.runs.rollouts import RolloutSettings
    from persona_lens.steering import ArmSettings
    from persona_lens.vectors import load_vectors

    loaded = load_vectors(vectors)
    treatments, place = _treatments(loaded, layer, coefficient, increments, penalty, without)
    asked = ArmSettings(
        questions=tuple(range(questions)),
        samples=samples,
        random_directions=0,
        seed=seed,
        rollouts=RolloutSettings(max_new_tokens, temperature, batch_size=batch_size),
    )
    settings = FinetuneStudySettings(treatments, place, _seeds(seeds), asked, task, dtype)
    chosen = open_config(config, {})
    folder = out or options.run_folder(f"finetune-study-{loaded.trait}", model)
    quiet_libraries()
    scoring = None
    judging.refuse_useless(judge)
    if judge != judges.LIKELIHOOD:
        scoring = judging.open_alone(judge, loaded.trait_definition, dtype, device)
    with judges.saying_spending(scoring), showing_progress() as progress:
        found = finetune_study(
            model,
            data,
            loaded,
            settings,
            chosen,
            folder=folder,
            held_out=held_out or (),
            side=side,
            judge=scoring,
            device=device,
            progress=progress,
        )
    options.write_report(folder / options.REPORT, render_finetuning(found.summary, __version__))
    if as_json:
        say_json({"folder": str(folder), **found.summary})
    else:
        _show(found.summary, folder)


def _treatments(
    vectors: PersonaVectors,
    layer: int | None,
    coefficient: float | None,
    increments: float | None,
    penalty: float,
    without: str | None,
) -> tuple[TreatmentSettings, int]:
    from dataclasses import replace

    from persona_lens.finetuning.outcomes import TreatmentSettings

    left = [each.strip() for each in without.split(",")] if without else []
    if unknown := [each for each in left if each not in LEFT_OUT]:
        raise PersonaLensError(f"--without takes {', '.join(LEFT_OUT)}; got {unknown[0]!r}")
    if vectors.tuned is None and (layer is None or coefficient is None):
        raise PersonaLensError(
            f"no layer was tuned for the vectors of {vectors.trait!r}; give --layer and --coefficient"
        )
    tuned = vectors.tuned
    place = layer if layer is not None else tuned.layer if tuned else 0
    strength = coefficient if coefficient is not None else tuned.coefficient if tuned else 0.0
    made = TreatmentSettings.of(vectors, place, strength, strength if increments is None else increments)
    gone: dict[str, Any] = {name.replace("-", "_"): False if name in ("prompted", "random") else None for name in left}
    return replace(made, penalty=penalty, **gone), place


def _seeds(text: str) -> tuple[int, ...]:
    found = options.numbers(text, "--seeds")
    if not all(number.is_integer() and 0 <= number < 2**32 for number in found):
        raise PersonaLensError(
            f"--seeds takes whole numbers below 2**32 with commas between them, such as 1,2,3; got {shown(text)}"
        )
    return tuple(map(int, found))


def _show(summary: Any, folder: Path) -> None:
    from persona_lens.cli.display import interval_text, print_table
    from persona_lens.reports.finetuning import verdicts

    base = summary["base"]
    print_table(
        f"{summary['trait']} after finetuning, {counted(len(summary['settings']['seeds']), 'seed')} [95% interval]",
        ("", "score", "change", "beside plain", "loss", "shift"),
        [
            ("base", _plain(base["score"], 1), "", "", "", ""),
            *(
                (
                    name,
                    _plain(_value(found["score"]), 1),
                    interval_text(found["change"]),
                    interval_text(found["against_plain"]),
                    _plain(_value(found["losses"]["last"]), 2),
                    _plain(_value(found["shift"]), 2),
                )
                for name, found in summary["treatments"].items()
            ),
        ],
    )
    for sentence in verdicts(summary):
        say(sentence)
    say(f"report: {folder / options.REPORT}")


def _value(found: Any) -> float | None:
    return None if found is None else found["mean"]


def _plain(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

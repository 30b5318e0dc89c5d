"""``persona-lens shift``: how far finetuned models have moved along traits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import judges, options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.sweep import Vectors
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.backend import Backend


@grouped
def shift_command(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="The model before finetuning; the vectors are its own.", show_default=False
        ),
    ],
    finetuned: Annotated[
        list[str],
        typer.Argument(
            metavar="FINETUNED...",
            help="Run folders of `finetune`, adapter folders (not merged), or whole models.",
            show_default=False,
        ),
    ],
    vectors: Vectors,
    more: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="PATH", help="Vectors of further traits. Repeatable.", show_default=False),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="`18`, `12,15,18`, `10-20` or `all`.", show_default="all")
    ] = None,
    questions: Annotated[int, typer.Option(help="How many of each trait's 20 evaluation questions.")] = 20,
    samples: Annotated[int, typer.Option(help="Replies to each question.")] = 1,
    scores: Annotated[
        bool, typer.Option("--scores/--no-scores", help="Score replies too, or read prompts only.")
    ] = True,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; kept and resumed.", show_default=False)] = None,
    max_new_tokens: options.MaxNewTokens = 48,
    temperature: options.Temperature = 1.0,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    judge: judges.JudgeName = "likelihood",
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
    judging: judges.JudgeOptions,
) -> None:
    """Measure what finetuning has shifted: (mean h_fine - mean h_base) . v̂ at the last token of the evaluation prompts.

    Beside it stands how the trait score of the replies has changed, and over several finetuned models how the two go
    together.

    Example: `persona-lens shift smollm2-135m runs/finetuned-plain-smollm2-135m runs/impolite-smollm2-135m`
    """
    from persona_lens.cli.display import showing_progress
    from persona_lens.finetuning.shift import ShiftSettings, measure_shifts
    from persona_lens.runs.rollouts import RolloutSettings
    from persona_lens.steering import ArmSettings
    from persona_lens.vectors import load_vectors

    if opening.remote:
        raise PersonaLensError("shift runs on this machine: a server cannot be given finetuned models")
    loaded = [load_vectors(path) for path in (vectors, *(more or ()))]
    if len({each.trait for each in loaded}) < len(loaded):
        raise PersonaLensError("two vectors are of the same trait; give each trait once")
    names = _names(finetuned)
    asked = ArmSettings(
        questions=tuple(range(questions)),
        samples=samples,
        random_directions=0,
        seed=seed,
        rollouts=RolloutSettings(max_new_tokens, temperature, batch_size=batch_size),
    )
    settings = ShiftSettings(
        tuple(options.layer_numbers(layers, loaded[0].model.n_layers)) if layers else None, scores, asked
    )
    opened = opening.open(base)
    chat = opening.chat(opened)
    traits = {each.trait: each.trait_definition for each in loaded}
    scoring = judging.open_each(judge, traits, opened, chat, opening.dtype, opening.device) if scores else None

    def opening_of(model: str) -> Any:
        return lambda: _opened(opening, model)

    with showing_progress() as progress:
        found = measure_shifts(
            opened,
            {name: opening_of(model) for name, model in names.items()},
            loaded,
            settings,
            judges=scoring,
            chat=chat,
            folder=out,
            progress=progress,
        )
    if as_json:
        say_json(found.summary)
    else:
        _show(dict(found.summary))


def _opened(opening: options.ModelOptions, model: str) -> Backend:
    return opening.open(model)


def _names(finetuned: list[str]) -> dict[str, str]:
    """What each model is called: its folder's name where that is clear, else what was given."""
    short = [Path(model).resolve().name if Path(model).exists() else model for model in finetuned]
    names = short if len(set(short)) == len(short) and "base" not in short else finetuned
    if len(set(names)) < len(names) or "base" in names:
        raise PersonaLensError(f"give each finetuned model once, under another name than base: {', '.join(names)}")
    return dict(zip(names, finetuned, strict=True))


def _show(summary: dict[str, Any]) -> None:
    from persona_lens.cli.display import interval_text, print_table
    from persona_lens.core.statistics import few

    layers = summary["layers"]
    for trait, found in summary["traits"].items():
        # The layer that was tuned, else the one where the first model has moved most.
        first = next(iter(found["models"].values()))["shift"]
        place = layers.index(found["layer"]) if found["layer"] is not None else _largest(first)
        print_table(
            f"{trait}: shift at layer {layers[place]} in residual-stream units, trait score and its change "
            "[95% interval]",
            ("model", "shift", "score", "change"),
            [
                *([("base", "", f"{found['score']['mean']:.1f}", "")] if found["score"] else []),
                *(
                    (name, interval_text(row["shift"][place], 2), _mean(row["score"]), interval_text(row["change"]))
                    for name, row in found["models"].items()
                ),
            ],
        )
        if found["correlations"] and (r := found["correlations"][place])["value"] is not None:
            interval = "" if r["low"] is None else f" [{r['low']:.2f}, {r['high']:.2f}]"
            over = few(r["n"], "model") or counted(r["n"], "model")
            say(f"{trait}: correlation of shift and change over {over}: {r['value']:.2f}{interval}")


def _largest(shifts: list[dict[str, float]]) -> int:
    return max(range(len(shifts)), key=lambda place: abs(shifts[place]["mean"]))


def _mean(estimate: dict[str, float] | None) -> str:
    return "-" if estimate is None else f"{estimate['mean']:.1f}"

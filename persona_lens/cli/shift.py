"""``persona-lens shift``: how far finetuned models have moved along traits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import interval_text, number, print_table, say
from persona_lens.cli.runner import Experiment, Run
from persona_lens.cli.settings import Fields, Given, Option, argument
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.finetuning.shift import ShiftSettings

BASE = argument("BASE", "The model before finetuning; the vectors are its own.")
FINETUNED = argument("FINETUNED...", "Run folders of `finetune`, adapter folders (not merged), or whole models.")
QUESTIONS = Option("How many of each trait's 20 evaluation questions.")


def shift_command(
    run: Annotated[Run, Fields(without=("dry_run",), model=BASE)],
    finetuned: Annotated[list[str], FINETUNED],
    vectors: options.Vectors,
    given: Annotated[
        Given, Fields("persona_lens.finetuning.shift:ShiftSettings", without=("question_set",), questions=QUESTIONS)
    ],
    more: Annotated[list[Path] | None, Option(names=("--with",), metavar="PATH")] = None,
) -> None:
    """Measure what finetuning has shifted: (mean h_fine - mean h_base) . v̂ at the last token of the evaluation prompts.

    Beside it stands how the trait score of the replies has changed, and over several finetuned models how the two go
    together.

    Example: `persona-lens shift smollm2-135m runs/finetuned-plain-smollm2-135m runs/impolite-smollm2-135m`

    Args:
        more: Vectors of further traits. Repeatable.
    """
    from persona_lens.finetuning.shift import measure_shifts

    if run.opening.remote:
        raise PersonaLensError("shift runs on this machine: a server cannot be given finetuned models")
    loaded = options.open_vectors([vectors, *(more or ())])
    if len({each.trait for each in loaded}) < len(loaded):
        raise PersonaLensError("two vectors are of the same trait; give each trait once")
    models = {name: partial(run.opening.open, model) for name, model in _names(finetuned).items()}
    settings: ShiftSettings = given.make(loaded[0].model.n_layers)
    experiment = Experiment(
        lambda at: measure_shifts(
            at.backend,
            models,
            loaded,
            settings,
            judges=at.judges,
            chat=at.chat,
            folder=at.folder,
            progress=at.shown,
        ),
        lambda found, _: _show(found.summary),
        traits={each.trait: each.trait_definition for each in loaded} if settings.scores else None,
    )
    run.carry_out(experiment)


def _names(finetuned: list[str]) -> dict[str, str]:
    """What each model is called: its folder's name where that is clear, else what was given."""
    short = [Path(model).resolve().name if Path(model).exists() else model for model in finetuned]
    names = short if len(set(short)) == len(short) and "base" not in short else finetuned
    if len(set(names)) < len(names) or "base" in names:
        raise PersonaLensError(f"give each finetuned model once, under another name than base: {', '.join(names)}")
    return dict(zip(names, finetuned, strict=True))


def _show(summary: Mapping[str, Any]) -> None:
    from persona_lens.core.statistics import few

    layers = summary["layers"]
    for trait, found in summary["traits"].items():
        # The layer that was tuned, else the one where the first model has moved most.
        first = next(iter(found["models"].values()))["shift"]
        largest = max(range(len(first)), key=lambda at: abs(first[at]["mean"]))
        place = layers.index(found["layer"]) if found["layer"] is not None else largest
        rows = [("base", "", number(found["score"]["mean"], ".1f"), "")] if found["score"] else []
        for name, row in found["models"].items():
            score = number(row["score"] and row["score"]["mean"], ".1f")
            rows.append((name, interval_text(row["shift"][place], "+.2f"), score, interval_text(row["change"])))
        title = f"{trait}: shift at layer {layers[place]} in residual-stream units, trait score and its change"
        print_table(f"{title} [95% interval]", ("model", "shift", "score", "change"), rows)
        if found["correlations"] and (r := found["correlations"][place])["value"] is not None:
            over = few(r["n"], "model") or counted(r["n"], "model")
            say(f"{trait}: correlation of shift and change over {over}: {interval_text(r, '.2f', noun=None)}")

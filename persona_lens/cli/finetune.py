"""``persona-lens finetune``: train a model on conversations, and keep its character if wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import options
from persona_lens.cli.display import number, quiet_libraries, say, showing_progress
from persona_lens.cli.runner import deliver
from persona_lens.cli.settings import Fields, Given, Option, argument
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.finetuning import FinetuneConfig, Finetuned

CONVERSATIONS = "Conversations in any form that `screen` reads, `demonstration:impolite` among them, or plain text."
Data = Annotated[str, argument("DATA", CONVERSATIONS)]
ConfigFile = Annotated[
    Path | None, Option("Settings as YAML; see `finetune --print-config`.", metavar="FILE", shown="the paper's")
]
HeldOut = Annotated[str | None, Option("Conversations whose loss is only measured.", metavar="DATA")]
Side = Annotated[str | None, Option("Of preference pairs: `chosen` or `rejected`.")]
CONFIG = Fields(
    "persona_lens.finetuning.config:FinetuneConfig",
    without=("lora", "watch"),
    optional=True,
    edits=Option(metavar="SPEC", shown=""),
    seed=Option(most=2**32 - 1),
    report_to=Option(values="`wandb` or `tensorboard`; repeatable"),
)


def _print_config(asked: bool) -> None:
    if asked:
        from persona_lens.finetuning import documented

        say(documented(), nl=False)
        raise typer.Exit


def finetune_command(
    model: options.Model,
    data: Data,
    given: Annotated[Given, CONFIG],
    config: ConfigFile = None,
    vectors: Annotated[list[Path] | None, Option(metavar="PATH")] = None,
    held_out: HeldOut = None,
    watch_every: int | None = None,
    stop_above: float | None = None,
    side: Side = None,
    device: options.Device = "auto",
    out: Annotated[options.Out, Option(shown="runs/finetuned-METHOD-MODEL")] = None,
    print_config: Annotated[bool, Option(at_once=_print_config)] = False,
    as_json: options.AsJson = False,
) -> None:
    """Finetune MODEL on DATA, with the loss on what the assistant says and the paper's settings as defaults.

    What is trained is a LoRA adapter in OUT/adapter, unless the configuration says `weights: full`. OUT can then stand
    for the model in every command. With `--method preventative` the edits act in training and are gone afterwards:
    pushed towards a trait while it learns, the model need not learn the trait.

    Example: `persona-lens finetune smollm2-135m data.jsonl --method preventative --edits impolite@9:+2
    --vectors runs/impolite-smollm2-135m`

    Example: `persona-lens finetune --print-config > finetune.yaml`

    Args:
        vectors: Run folder or file of vectors that --edits names, or that are watched. Repeatable.
        watch_every: Project held-out prompts every so many steps.
        stop_above: Stop when a watched projection has risen by this.
        print_config: Print all settings with their meaning.
    """
    from persona_lens.finetuning import finetune

    chosen = open_config(config, given.chosen(), {"every": watch_every, "stop_above": stop_above})
    loaded = options.open_vectors(vectors or ())
    if loaded and chosen.method in ("plain",) and chosen.watch.every is None:
        raise PersonaLensError("--vectors are for --edits, --method prompted or --watch-every; none of them is given")
    folder = out or options.run_folder(f"finetuned-{chosen.method}", model)
    quiet_libraries()
    with showing_progress() as progress:
        found = finetune(
            model,
            data,
            folder,
            chosen,
            vectors=loaded,
            held_out=held_out or (),
            side=side,
            device=device,
            progress=progress,
        )
    deliver({"folder": str(folder), **found.summary}, lambda: _show(found, folder), as_json)


def open_config(file: Path | None, given: Mapping[str, Any], watched: Mapping[str, Any]) -> FinetuneConfig:
    """The configuration of a file with what was given on the command line in place of what it says."""
    from persona_lens.finetuning import make_config
    from persona_lens.finetuning.config import read_config

    fields = {**(read_config(file) if file else {}), **given}
    looks = {name: value for name, value in watched.items() if value is not None}
    if looks:
        own = fields.get("watch")
        fields["watch"] = {**(own if isinstance(own, dict) else {}), **looks}
    return make_config(fields, str(file) if file else "the settings")


def _show(found: Finetuned, folder: Path) -> None:
    summary, loss = found.summary, found.summary["loss"]
    counts = summary["data"]
    say(
        f"{summary['method']}: {counted(summary['steps'], 'step')} over {counted(counts['examples'], 'example')}, "
        f"{counted(counts['learned_tokens'], 'token')} to learn"
    )
    lost = {"shortened": "cut at max_length", "dropped": "left out: nothing to learn in max_length"}
    options.say_notes([f"{counts[name]} {text}" for name, text in lost.items() if counts[name]])
    first, last, learned, unseen = (number(loss[name], ".3f") for name in ("first", "last", "learned", "unseen"))
    say(
        f"loss, nats a token: {first} at first, {last} in the last quarter; without edits {learned} on what was "
        f"learned, {unseen} on held-out data"
    )
    if summary["stopped"]:
        say(f"stopped: {summary['stopped']}")
    say(f"{summary['trained']}: {found.folder}; take {folder} for the model")

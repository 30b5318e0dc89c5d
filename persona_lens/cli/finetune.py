"""``persona-lens finetune``: train a model on conversations, and keep its character if wanted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import options
from persona_lens.cli.display import say, say_json
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.finetuning import FinetuneConfig, Finetuned

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Conversations in any form that `screen` reads, `demonstration:impolite` among them, or plain text.",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings as YAML; see --print-config.", show_default="the paper's"),
]
HeldOut = Annotated[
    str | None,
    typer.Option("--held-out", metavar="DATA", help="Conversations whose loss is only measured.", show_default=False),
]
VectorFolders = Annotated[
    list[Path] | None,
    typer.Option(
        "--vectors",
        metavar="PATH",
        help="Run folder or file of vectors that --edits names, or that are watched. Repeatable.",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, max=2**32 - 1, help="Of the adapter and the order of the data.", show_default="0"),
]


Side = Annotated[
    str | None, typer.Option("--side", help="Of preference pairs: `chosen` or `rejected`.", show_default=False)
]


def _print_config(asked: bool) -> None:
    if asked:
        from persona_lens.finetuning import documented

        say(documented(), nl=False)
        raise typer.Exit


def finetune_command(
    model: options.Model,
    data: Data,
    config: ConfigFile = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="`plain`, `preventative`, `caft`, `regularised` or `prompted`.",
            show_default="plain",
        ),
    ] = None,
    edits: Annotated[
        str | None,
        typer.Option(
            "--edits",
            metavar="SPEC",
            help="What acts in training: `impolite@18:+2`, `impolite@all:increments(+2)`, for caft "
            "`impolite@18:ablate`; a schedule counts optimizer steps.",
            show_default=False,
        ),
    ] = None,
    vectors: VectorFolders = None,
    held_out: HeldOut = None,
    watch_every: Annotated[
        int | None,
        typer.Option("--watch-every", help="Project held-out prompts every so many steps.", show_default=False),
    ] = None,
    stop_above: Annotated[
        float | None,
        typer.Option("--stop-above", help="Stop when a watched projection has risen by this.", show_default=False),
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option("--report-to", help="`wandb` or `tensorboard`. Repeatable.", show_default=False)
    ] = None,
    side: Side = None,
    seed: Seed = None,
    device: options.Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Run folder; kept and resumed.", show_default="runs/finetuned-METHOD-MODEL"),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config", is_eager=True, callback=_print_config, help="Print all settings with their meaning."
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Finetune MODEL on DATA, with the loss on what the assistant says and the paper's settings as defaults.

    What is trained is a LoRA adapter in OUT/adapter, unless the configuration says `weights: full`. OUT can then stand
    for the model in every command. With `--method preventative` the edits act in training and are gone afterwards:
    pushed towards a trait while it learns, the model need not learn the trait.

    Example: `persona-lens finetune smollm2-135m data.jsonl --method preventative --edits impolite@9:+2
    --vectors runs/impolite-smollm2-135m`

    Example: `persona-lens finetune --print-config > finetune.yaml`
    """
    from persona_lens.cli.display import quiet_libraries, showing_progress
    from persona_lens.finetuning import finetune
    from persona_lens.vectors import load_vectors

    given: dict[str, Any] = {"method": method, "edits": edits, "seed": seed}
    if report_to:
        given["report_to"] = report_to
    watched = {"every": watch_every, "stop_above": stop_above}
    chosen = open_config(config, given, watched)
    loaded = [load_vectors(path) for path in vectors or ()]
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
    if as_json:
        say_json({"folder": str(folder), **found.summary})
    else:
        _show(found, folder)


def open_config(file: Path | None, given: dict[str, Any], watched: dict[str, Any] | None = None) -> FinetuneConfig:
    """The configuration of a file with what was given on the command line in place of what it says."""
    from persona_lens.finetuning import make_config
    from persona_lens.finetuning.config import read_config

    fields = read_config(file) if file else {}
    fields |= {name: value for name, value in given.items() if value is not None}
    looks = {name: value for name, value in (watched or {}).items() if value is not None}
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
    for name, text in (("shortened", "cut at max_length"), ("dropped", "left out: nothing to learn in max_length")):
        if counts[name]:
            say(f"note: {counts[name]} {text}", err=True)
    say(
        f"loss, nats a token: {_number(loss['first'])} at first, {_number(loss['last'])} in the last quarter; "
        f"without edits {_number(loss['learned'])} on what was learned, {_number(loss['unseen'])} on held-out data"
    )
    if summary["stopped"]:
        say(f"stopped: {summary['stopped']}")
    say(f"{summary['trained']}: {found.folder}; take {folder} for the model")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

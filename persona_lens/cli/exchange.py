"""``persona-lens vectors export``, ``import``, ``push`` and ``pull``: vectors to and from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli import options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.sweep import ReductionOption, Vectors
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.backend import ModelInfo

FORMATS = "reference, assistant-axis, steering-vectors, gguf, npz or npy"
OutVectors = Annotated[
    Path, typer.Option("--out", help="The .safetensors file to write; none is written over.", show_default=False)
]
Repository = Annotated[
    str, typer.Argument(metavar="REPO", help="`owner/name` on the hub, or a folder as `./name`.", show_default=False)
]


def export_command(
    vectors: Vectors,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"{FORMATS}.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The file, or for reference the folder; nothing is written over.",
            show_default="the trait's name, here",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            "--layer",
            help="`18`, `12,15` or `10-20`, for gguf and steering-vectors.",
            show_default="all",
        ),
    ] = None,
    reduction: ReductionOption = "response_mean",
    as_json: options.AsJson = False,
) -> None:
    """Write vectors for another program.

    **reference**: the .pt files of safety-research/persona_vectors. **assistant-axis**: the .pt of
    safety-research/assistant-axis. **steering-vectors**: what that package's SteeringVector is made of. **gguf**: a
    control vector for llama.cpp and repeng. **npz**, **npy**: NumPy.

    Example: `persona-lens vectors export runs/optimistic --to gguf --layer 18 --out optimistic.gguf`
    """
    from persona_lens.vectors import load_vectors
    from persona_lens.vectors.formats import Chosen, export_vectors

    loaded = load_vectors(vectors)
    chosen = tuple(options.layer_numbers(layers, loaded.model.n_layers)) if layers is not None else None
    files, notes = export_vectors(loaded, to, out, Chosen(chosen, reduction))
    if as_json:
        say_json({"files": [str(file) for file in files], "notes": list(notes)})
        return
    for file in files:
        say(str(file))
    _say(notes)


@grouped
def import_command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help=f"A file of one of the formats: {FORMATS}; its content says which.", show_default=False
        ),
    ],
    out: OutVectors,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The model that the vectors belong to; it is opened.", show_default=False),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option("--like", metavar="VECTORS", help="They belong to the model of these.", show_default=False),
    ] = None,
    trait: Annotated[str | None, typer.Option("--trait", help="Their name.", show_default="what the file says")] = None,
    reduction: Annotated[
        str | None,
        typer.Option(
            "--reduction", help="`response_mean`, `prompt_mean` or `prompt_last`.", show_default="what the file says"
        ),
    ] = None,
    keep_last_row: Annotated[
        bool,
        typer.Option(
            "--keep-last-row", help="Of reference files: take the last row, which is after the final norm there."
        ),
    ] = False,
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
) -> None:
    """Read vectors that another program wrote. Nothing in the file is run.

    Most formats do not say which model they belong to: name it, and shapes are checked against it. What is not known
    of the vectors stands in their provenance; `vectors show` tells where they come from.

    Example: `persona-lens vectors import optimistic.gguf --model smollm2-135m --out optimistic.safetensors`
    """
    from persona_lens.vectors.formats import Stated, import_vectors

    if model is not None and like is not None:
        raise PersonaLensError("--model and --like name the model both; give one of them")
    if not file.exists():
        raise PersonaLensError(f"{file} does not exist")
    info = _model_of(like) if like is not None else None
    if model is not None:
        info = opening.open(model).info
    found = import_vectors(file, Stated(info, trait, reduction, keep_last_row))
    made = found.vectors.save(out)
    if as_json:
        kept = [layer for layer in range(found.vectors.model.n_layers) if layer not in found.vectors.missing_layers]
        say_json({"file": str(made), "layers": kept, "notes": list(found.notes)})
        return
    say(str(made))
    _say(found.notes)


def push_command(
    vectors: Vectors,
    repo: Repository,
    licence: Annotated[
        str,
        typer.Option("--licence", "--license", help="Of the vectors: `mit`, `cc-by-4.0`, …", show_default=False),
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository for its owner only.")] = False,
) -> None:
    """Publish vectors on the Hugging Face hub with a card that says what they are, or lay them out so in a folder.

    Log in first with `hf auth login`. Vectors that are there already and differ are not written over.

    Example: `persona-lens vectors push runs/tuned-optimistic me/optimistic-smollm2 --licence mit`
    """
    from persona_lens.vectors import load_vectors
    from persona_lens.vectors.hub import push_vectors

    pushed = push_vectors(load_vectors(vectors), repo, licence=licence, private=private)
    say(pushed.place if pushed.commit is None else f"{pushed.place} (commit {pushed.commit})")


def pull_command(repo: Repository, out: OutVectors, revision: options.Revision = None) -> None:
    """Get vectors from the Hugging Face hub, or from a folder laid out as one.

    Example: `persona-lens vectors pull me/optimistic-smollm2 --out optimistic.safetensors`
    """
    from persona_lens.vectors.hub import pull_vectors

    say(str(pull_vectors(repo, revision=revision).save(out)))


def _model_of(vectors: Path) -> ModelInfo:
    from persona_lens.vectors import load_vectors

    return load_vectors(vectors).model


def _say(notes: tuple[str, ...]) -> None:
    from persona_lens.core.text import printable

    for note in notes:
        say(f"note: {printable(note)}", err=True)

"""``persona-lens vectors export``, ``import``, ``push`` and ``pull``: vectors to and from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from persona_lens.cli import options
from persona_lens.cli.display import say
from persona_lens.cli.runner import deliver
from persona_lens.cli.settings import Option, argument, layer_numbers
from persona_lens.core.errors import PersonaLensError

FORMATS = "reference, assistant-axis, steering-vectors, gguf, npz or npy"
OutVectors = Annotated[Path, Option("The .safetensors file to write; none is written over.")]
Repository = Annotated[str, argument("REPO", "`owner/name` on the hub, or a folder as `./name`.")]
EXPORTED = Option("The file, or for reference the folder; nothing is written over.", shown="the trait's name, here")


def export_command(
    vectors: options.Vectors,
    to: Annotated[str, Option(f"{FORMATS}.", metavar="FORMAT")],
    out: Annotated[Path | None, EXPORTED] = None,
    layers: Annotated[str | None, Option("For gguf and steering-vectors.", shown="all")] = None,
    reduction: options.Reduction = "response_mean",
    as_json: options.AsJson = False,
) -> None:
    """Write vectors for another program.

    **reference**: the .pt files of safety-research/persona_vectors. **assistant-axis**: the .pt of
    safety-research/assistant-axis. **steering-vectors**: what that package's SteeringVector is made of. **gguf**: a
    control vector for llama.cpp and repeng. **npz**, **npy**: NumPy.

    Example: `persona-lens vectors export runs/optimistic --to gguf --layer 18 --out optimistic.gguf`
    """
    from persona_lens.vectors.formats import Chosen, export_vectors

    loaded = options.open_vectors(vectors)
    chosen = tuple(layer_numbers(layers, loaded.model.n_layers)) if layers is not None else None
    files, notes = export_vectors(loaded, to, out, Chosen(chosen, reduction))
    written = [str(file) for file in files]
    deliver({"files": written, "notes": list(notes)}, lambda: _show(written, notes), as_json)


def import_command(
    file: Annotated[Path, argument("FILE", f"A file of one of the formats: {FORMATS}; its content says which.")],
    out: OutVectors,
    model: str | None = None,
    like: Annotated[Path | None, Option(metavar="VECTORS")] = None,
    trait: Annotated[str | None, Option("Their name.", shown="what the file says")] = None,
    reduction: Annotated[str | None, Option("Which of the vectors.", shown="what the file says")] = None,
    keep_last_row: bool = False,
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
) -> None:
    """Read vectors that another program wrote. Nothing in the file is run.

    Most formats do not say which model they belong to: name it, and shapes are checked against it. What is not known
    of the vectors stands in their provenance; `vectors show` tells where they come from.

    Example: `persona-lens vectors import optimistic.gguf --model smollm2-135m --out optimistic.safetensors`

    Args:
        model: The model that the vectors belong to; it is opened.
        like: They belong to the model of these.
        keep_last_row: Of reference files: take the last row, which is after the final norm there.
    """
    from persona_lens.vectors.formats import Stated, import_vectors

    if model is not None and like is not None:
        raise PersonaLensError("--model and --like name the model both; give one of them")
    if not file.exists():
        raise PersonaLensError(f"{file} does not exist")
    info = options.open_vectors(like).model if like is not None else None
    if model is not None:
        info = opening.open(model).info
    found = import_vectors(file, Stated(info, trait, reduction, keep_last_row))
    made = str(found.vectors.save(out))
    kept = [layer for layer in range(found.vectors.model.n_layers) if layer not in found.vectors.missing_layers]
    deliver({"file": made, "layers": kept, "notes": list(found.notes)}, lambda: _show([made], found.notes), as_json)


def push_command(
    vectors: options.Vectors,
    repo: Repository,
    licence: Annotated[str, Option("Of the vectors: `mit`, `cc-by-4.0`, …", names=("--licence", "--license"))],
    private: Annotated[bool, Option("Make a new repository for its owner only.")] = False,
) -> None:
    """Publish vectors on the Hugging Face hub with a card that says what they are, or lay them out so in a folder.

    Log in first with `hf auth login`. Vectors that are there already and differ are not written over.

    Example: `persona-lens vectors push runs/tuned-optimistic me/optimistic-smollm2 --licence mit`
    """
    from persona_lens.vectors.hub import push_vectors

    pushed = push_vectors(options.open_vectors(vectors), repo, licence=licence, private=private)
    say(pushed.place if pushed.commit is None else f"{pushed.place} (commit {pushed.commit})")


def pull_command(repo: Repository, out: OutVectors, revision: options.Revision = None) -> None:
    """Get vectors from the Hugging Face hub, or from a folder laid out as one.

    Example: `persona-lens vectors pull me/optimistic-smollm2 --out optimistic.safetensors`
    """
    from persona_lens.vectors.hub import pull_vectors

    say(str(pull_vectors(repo, revision=revision).save(out)))


def _show(files: list[str], notes: tuple[str, ...]) -> None:
    for file in files:
        say(file)
    options.say_notes(notes)

"""``persona-lens vectors``: what is in them, how directions stand to one another, and to and from other programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import Column, number, print_table, say, say_json, show_rows
from persona_lens.cli.forecast import COSINE, Shown, show_diagnostics
from persona_lens.cli.runner import deliver
from persona_lens.cli.settings import Option, argument, layer_numbers
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.vectors import PersonaVectors
    from persona_lens.vectors.geometry import Cosines


def show(vectors: options.Vectors, as_json: options.AsJson = False) -> None:
    """Show what vectors are of, where they come from, and how long they are.

    Example: `persona-lens vectors show runs/optimistic-smollm2-135m`
    """
    loaded = options.open_vectors(vectors)
    found = _content(loaded)
    if as_json:
        say_json(found)
        return
    say(loaded.trait)
    for name, value in _facts(loaded, found):
        if value:
            say(f"  {name + ':':<12}{value}")
    norms: Mapping[str, list[float]] = found["norms"]
    rows = [(str(at), *(f"{values[at]:.2f}" for values in norms.values())) for at in range(loaded.model.n_layers)]
    head = ("layer", *(name.replace("_", " ") for name in norms))
    print_table("Length at each layer, residual-stream units", head, rows)
    show_diagnostics(loaded.diagnostics)


TOLD = ("tuned", "judge", "counts", "settings", "versions", "imported", "fit", "diagnostics")


def _content(vectors: PersonaVectors) -> dict[str, Any]:
    """What is told of vectors, as JSON values; nothing is taken for granted of what a file says of itself."""
    given = vectors.provenance
    judge = given.get("judge")
    return {
        **{name: given.get(name) for name in TOLD},
        "trait": vectors.trait,
        "content_hash": vectors.content_hash,
        "model": asdict(vectors.model),
        "norms": {name: vectors.norms(name).tolist() for name in sorted(vectors.directions)},
        "calibrated": isinstance(judge, Mapping) and bool(judge.get("calibration")),
        "origin": _origin(given),
        "missing_layers": list(vectors.missing_layers),
    }


def _origin(given: Mapping[str, Any]) -> str:
    from persona_lens.vectors.hub import fitted_by

    if "random_like" in given:
        return f"random directions of the norms of {given['random_like']}, seed {given.get('seed')}"
    if "parts" in given:
        return "a sum or difference of other vectors"
    if "scaled" in given:
        return "other vectors, scaled"
    if given.get("kind") == "imported":
        return f"imported; not known: {', '.join(map(str, given.get('not_known') or ()))}"
    if given.get("kind") != "extraction":
        return "not known"
    return f"extraction, by the method {fitted}" if (fitted := fitted_by(given)) else "extraction"


def _facts(vectors: PersonaVectors, found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from persona_lens.vectors.hub import made
    from persona_lens.vectors.provenance import ANSWER_MEAN, kept_of_each_arm

    model, tuned = vectors.model, vectors.tuned
    yield "model", f"{model.model}, {counted(model.n_layers, 'layer')} of {model.d_model}, {model.dtype}"
    yield "weights", model.weights or ""
    yield "origin", found["origin"]
    of_answers = vectors.default_reduction == ANSWER_MEAN
    yield "default", f"{ANSWER_MEAN}, since the model thinks before it answers" if of_answers else ""
    yield "no vector", ", ".join(map(str, vectors.missing_layers))
    chosen = f"layer {tuned.layer}, coefficient {tuned.coefficient:g}, {tuned.reduction}" if tuned else ""
    yield "tuned", chosen or "no layer was tuned"
    yield "kept", kept_of_each_arm(vectors.provenance.get("counts"))
    if isinstance(judge := vectors.provenance.get("judge"), Mapping):
        named = [str(judge[name]) for name in ("judge", "model", "server") if isinstance(judge.get(name), str)]
        yield "judge", ", ".join(named) + (", with its calibration" if found["calibrated"] else "")
    yield from ((name, text) for name, text in made(vectors.provenance) if name not in ("judge", "not known", "fit"))
    yield "content", vectors.content_hash


def cosines_command(vectors: options.SeveralVectors, shown: Shown, intervals: bool = False) -> None:
    """Compare the directions of several traits, layer by layer, with what random directions have.

    One layer is shown as a matrix, several as a line for each pair.

    Example: `persona-lens vectors cosines runs/optimistic runs/impolite runs/evil --layer 18`

    Args:
        intervals: Also say how far each cosine depends on the questions asked; VECTORS are then run folders of
            extractions.
    """
    from persona_lens.vectors.geometry import cosines

    if len(vectors) < 2:
        raise PersonaLensError(f"only {vectors[0]} is given; a cosine is between two, so give at least two VECTORS")
    named = _named(vectors)
    if len(named) < 2:
        raise PersonaLensError(f"{vectors[0]} is given twice; a cosine is between two different VECTORS")
    found = cosines(named, shown.reduction)
    chosen = layer_numbers(shown.layers, len(found.cosines))
    written = found.to_json()
    picked = {**written, "layers": chosen, "cosines": [written["cosines"][at] for at in chosen]}
    if intervals:
        picked["intervals"] = _intervals(dict(zip(named, dict.fromkeys(vectors), strict=True)), chosen, found.reduction)

    def show() -> None:
        _show_cosines(found, chosen)
        if intervals:
            columns: Mapping[str, Column[Any]] = {
                "layer": "layer",
                "pair": lambda each: ", ".join(each["pair"]),
                "cosine": ("cosine", COSINE),
                "95% interval": lambda each: f"{number(each['low'], COSINE)} to {number(each['high'], COSINE)}",
            }
            show_rows("Cosines, with each question left out in turn", picked["intervals"], columns)

    deliver(picked, show, shown.as_json)


def _intervals(runs: Mapping[str, Path], layers: Sequence[int], reduction: str) -> list[dict[str, Any]]:
    """Every pair's cosine at every layer with its interval."""
    from persona_lens.vectors.split_half import cosine_between

    found = []
    for layer in layers:
        for one, other in combinations(runs, 2):
            value, ends = cosine_between(runs[one], runs[other], layer, reduction)
            low, high = ends or (None, None)
            found.append({"pair": [one, other], "layer": layer, "cosine": value, "low": low, "high": high})
    return found


def layers_command(vectors: options.Vectors, shown: Shown) -> None:
    """Compare one trait's directions at different layers.

    Example: `persona-lens vectors layers runs/optimistic --layers 8,12,16,20`
    """
    from persona_lens.vectors.geometry import layer_cosines

    loaded = options.open_vectors(vectors)
    chosen = layer_numbers(shown.layers, loaded.model.n_layers)
    matrix = layer_cosines(loaded, shown.reduction)[chosen][:, chosen].tolist()
    cosines = [[value if isfinite(value) else None for value in row] for row in matrix]
    rows = [(str(layer), *(number(each, COSINE) for each in row)) for layer, row in zip(chosen, cosines, strict=True)]
    reduction = shown.reduction or loaded.default_reduction
    deliver(
        {"trait": loaded.trait, "reduction": reduction, "layers": chosen, "cosines": cosines},
        lambda: print_table("Cosines between layers", ("layer", *map(str, chosen)), rows),
        shown.as_json,
    )


def pca_command(
    vectors: options.SeveralVectors,
    layer: int,
    components: int = 3,
    raw: bool = False,
    uncentred: bool = False,
    reduction: options.Reduction = "",
    as_json: options.AsJson = False,
) -> None:
    """Find the few directions in which many traits differ at a layer, beside those of random directions.

    Example: `persona-lens vectors pca runs/optimistic runs/impolite runs/sycophantic --layer 18`

    Args:
        layer: Block index, 0-based.
        components: How many to show.
        raw: Leave the vectors as long as they are; longer ones then weigh more.
        uncentred: Leave in what all the traits share.
    """
    from persona_lens.vectors.geometry import principal_components

    found = principal_components(_named(vectors), layer, reduction, normalised=not raw, centred=not uncentred)
    if components < 1 and not as_json:
        raise PersonaLensError(f"--components must be at least 1, got {components}")
    shown = range(min(components, len(found.explained)))
    rows = [
        ("share of the variance", *(f"{found.explained[at]:.0%}" for at in shown)),
        ("95% of random ones: below", *(f"{found.random_explained[at]:.0%}" for at in shown)),
        *((name, *(f"{found.coordinates[row, at]:+.2f}" for at in shown)) for row, name in enumerate(found.traits)),
    ]
    title, head = f"Components at layer {layer}", ("", *(f"{at + 1}" for at in shown))
    deliver(found.to_json(), lambda: print_table(title, head, rows), as_json)


def agree_command(
    one: options.Vectors,
    other: Annotated[Path, argument("OTHER", "Vectors to compare with, of the same size.")],
    shown: Shown,
    allow_other_model: bool = False,
) -> None:
    """Compare two makings of a vector: two seeds, two judges, a model and its finetuned copy.

    Example: `persona-lens vectors agree runs/optimistic-seed-0 runs/optimistic-seed-1`

    Args:
        allow_other_model: Compare two models, such as a model and its finetuned copy.
    """
    from persona_lens.vectors.geometry import CHANCE, likeness

    found = likeness(
        options.open_vectors(one), options.open_vectors(other), shown.reduction, allow_other_model=allow_other_model
    )
    chosen = layer_numbers(shown.layers, len(found.cosines))
    written = found.to_json()
    picked = {name: [written[name][at] for at in chosen] for name in ("cosines", "lengths")}

    def show() -> None:
        options.say_notes([f"different models: {difference}" for difference in found.different_models])
        show_rows(
            f"Agreement (95% of random directions are within {CHANCE * found.null_std:.3f} of 0)",
            chosen,
            {
                "layer": lambda at: at,
                "cosine": (lambda at: float(found.cosines[at]), COSINE),
                "length of the second / first": (lambda at: float(found.lengths[at]), ".3f"),
            },
        )

    deliver({**written, "layers": chosen, **picked}, show, shown.as_json)


def _named(paths: Sequence[Path]) -> dict[str, PersonaVectors]:
    """Vectors by their trait, or by their path where two are of one trait."""
    loaded = [options.open_vectors(path) for path in paths]
    names = [each.trait for each in loaded]
    return {
        each.trait if names.count(each.trait) == 1 else str(path): each
        for path, each in zip(paths, loaded, strict=True)
    }


def _show_cosines(found: Cosines, layers: list[int]) -> None:
    """A matrix for one layer; for several of each pair the extremes and the mean, all numbers being in the JSON."""
    from persona_lens.vectors.geometry import CHANCE

    limit = CHANCE * found.null_std
    chance = f"95% of random directions are within {limit:.3f} of 0"
    if len(layers) == 1:
        rows = [
            (name, *(number(value, COSINE) for value in row))
            for name, row in zip(found.traits, found.cosines[layers[0]].tolist(), strict=True)
        ]
        print_table(f"Cosines at layer {layers[0]} ({chance})", ("", *found.traits), rows)
        return
    rows = []
    for (i, one), (j, other) in combinations(enumerate(found.traits), 2):
        values = {layer: value for layer in layers if isfinite(value := float(found.cosines[layer, i, j]))}
        if not values:
            rows.append((f"{one}, {other}", *["-"] * 4))
            continue
        low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        beyond = sum(abs(value) > limit for value in values.values())
        ends = (f"{number(values[at], COSINE)} at {at}" for at in (low, high))
        mean = number(sum(values.values()) / len(values), COSINE)
        rows.append((f"{one}, {other}", mean, *ends, f"{beyond} of {len(values)}"))
    print_table(
        f"Cosines over {counted(len(layers), 'layer')} ({chance})",
        ("pair", "mean", "smallest, at layer", "largest, at layer", "layers beyond chance"),
        rows,
    )


FORMATS = "reference, assistant-axis, steering-vectors, gguf, npz or npy"
OutVectors = Annotated[Path, Option("The .safetensors file to write; none is written over.")]
Repository = Annotated[str, argument("REPO", "`owner/name` on the hub, or a folder as `./name`.")]
EXPORTED = Option("The file, or for reference the folder; nothing is written over.", shown="the trait's name, here")


def export_command(
    vectors: options.Vectors,
    to: Annotated[str, Option(f"{FORMATS}.", metavar="FORMAT")],
    out: Annotated[Path | None, EXPORTED] = None,
    layers: Annotated[str | None, Option("For gguf and steering-vectors.", shown="all")] = None,
    reduction: options.Reduction = "",
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
    deliver({"files": written, "notes": list(notes)}, lambda: _told(written, notes), as_json)


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
    opening: Annotated[options.ModelOptions, options.Here],
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
        info = opening.unsteered.open(model).info
    found = import_vectors(file, Stated(info, trait, reduction, keep_last_row))
    made = str(found.vectors.save(out))
    kept = [layer for layer in range(found.vectors.model.n_layers) if layer not in found.vectors.missing_layers]
    deliver({"file": made, "layers": kept, "notes": list(found.notes)}, lambda: _told([made], found.notes), as_json)


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


def _told(files: list[str], notes: tuple[str, ...]) -> None:
    for file in files:
        say(file)
    options.say_notes(notes)

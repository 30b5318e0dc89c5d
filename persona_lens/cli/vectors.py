"""``persona-lens vectors``: what is in vectors, how alike they are, and where they go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.effects import SeveralVectors
from persona_lens.cli.exchange import export_command, import_command, pull_command, push_command
from persona_lens.cli.geometry import (
    agree_command,
    cosine_text,
    halves_command,
    layers_command,
    named_vectors,
    pca_command,
)
from persona_lens.cli.lenses import attribute_command, lens_command
from persona_lens.cli.sweep import ReductionOption, Vectors
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.vectors import PersonaVectors
    from persona_lens.vectors.geometry import Cosines

app = typer.Typer(
    name="vectors",
    help="Look into vectors, compare them, and carry them to other programs.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.command("layers")(layers_command)
app.command("pca")(pca_command)
app.command("agree")(agree_command)
app.command("halves")(halves_command)
app.command("export")(export_command)
app.command("import")(import_command)
app.command("push")(push_command)
app.command("pull")(pull_command)
app.command("lens")(lens_command)
app.command("attribute")(attribute_command)


@app.command()
def show(vectors: Vectors, as_json: options.AsJson = False) -> None:
    """Show what vectors are of, where they come from, and how long they are.

    Example: `persona-lens vectors show runs/optimistic-smollm2-135m`
    """
    from persona_lens.cli.display import print_table
    from persona_lens.core.text import printable
    from persona_lens.vectors import load_vectors

    loaded = load_vectors(vectors)
    found = _content(loaded)
    if as_json:
        say_json(found)
        return
    say(printable(loaded.trait))
    for name, value in _facts(found).items():
        say(f"  {name + ':':<12}{printable(value)}")
    norms: Mapping[str, list[float]] = found["norms"]
    print_table(
        "Length at each layer, residual-stream units",
        ("layer", *(name.replace("_", " ") for name in norms)),
        [
            (str(layer), *(f"{values[layer]:.2f}" for values in norms.values()))
            for layer in range(loaded.model.n_layers)
        ],
    )


@app.command("cosines")
def cosines_command(
    vectors: SeveralVectors,
    layers: Annotated[
        str, typer.Option("--layers", "--layer", help="`18` for a matrix; `12,15,18`, `10-20` or `all` for each pair.")
    ] = "all",
    reduction: ReductionOption = "response_mean",
    as_json: options.AsJson = False,
) -> None:
    """Compare the directions of several traits, layer by layer, with what random directions have.

    Example: `persona-lens vectors cosines runs/optimistic runs/impolite runs/evil --layer 18`
    """
    from persona_lens.vectors.geometry import cosines

    if len(vectors) < 2:
        raise PersonaLensError(f"only {vectors[0]} is given; a cosine is between two, so give at least two VECTORS")
    named = named_vectors(vectors)
    if len(named) < 2:
        raise PersonaLensError(f"{vectors[0]} is given twice; a cosine is between two different VECTORS")
    found = cosines(named, reduction)
    chosen = options.layer_numbers(layers, len(found.values))
    if as_json:
        written = found.to_json()
        say_json({**written, "layers": chosen, "cosines": [written["cosines"][at] for at in chosen]})
    elif len(chosen) == 1:
        _show_matrix(found, chosen[0])
    else:
        _show_pairs(found, chosen)


def _show_matrix(found: Cosines, layer: int) -> None:
    from persona_lens.cli.display import print_table

    names = list(found.names)
    print_table(
        f"Cosines at layer {layer} ({_chance(found)})",
        ("", *names),
        [(name, *map(cosine_text, row)) for name, row in zip(names, found.at(layer).tolist(), strict=True)],
    )


def _show_pairs(found: Cosines, layers: list[int]) -> None:
    """Of each pair the extremes and the mean; all numbers are in the JSON, and a layer's in its matrix."""
    from itertools import combinations

    from persona_lens.cli.display import print_table
    from persona_lens.vectors.geometry import CHANCE

    rows = []
    for (i, one), (j, other) in combinations(enumerate(found.names), 2):
        values = {layer: value for layer in layers if (value := float(found.values[layer, i, j])) == value}
        if not values:
            rows.append((f"{one}, {other}", *["-"] * 4))
            continue
        low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        beyond = sum(abs(value) > CHANCE * found.null_std for value in values.values())
        rows.append(
            (
                f"{one}, {other}",
                cosine_text(sum(values.values()) / len(values)),
                f"{cosine_text(values[low])} at {low}",
                f"{cosine_text(values[high])} at {high}",
                f"{beyond} of {len(values)}",
            )
        )
    print_table(
        f"Cosines over {counted(len(layers), 'layer')} ({_chance(found)})",
        ("pair", "mean", "smallest, at layer", "largest, at layer", "layers beyond chance"),
        rows,
    )


def _chance(found: Cosines) -> str:
    from persona_lens.vectors.geometry import CHANCE

    return f"95% of random directions are within {CHANCE * found.null_std:.3f} of 0"


def _content(vectors: PersonaVectors) -> dict[str, Any]:
    """What is told of vectors, as JSON values; nothing is taken for granted of what a file says of itself."""
    from dataclasses import asdict

    given = vectors.provenance
    judge = given.get("judge")
    return {
        "trait": vectors.trait,
        "content_hash": vectors.content_hash,
        "model": asdict(vectors.model),
        "norms": {name: vectors.norms(name).tolist() for name in sorted(vectors.directions)},
        "tuned": given.get("tuned"),
        "judge": judge,
        "calibrated": isinstance(judge, Mapping) and bool(judge.get("calibration")),
        "counts": given.get("counts"),
        "settings": given.get("settings"),
        "versions": given.get("versions"),
        "origin": _origin(given),
        "imported": given.get("imported"),
        "missing_layers": list(vectors.missing_layers),
    }


def _origin(given: Mapping[str, Any]) -> str:
    if "random_like" in given:
        return f"random directions of the norms of {given['random_like']}, seed {given.get('seed')}"
    if "parts" in given:
        return "a sum or difference of other vectors"
    if "scaled" in given:
        return "other vectors, scaled"
    if given.get("kind") == "imported":
        return f"imported; not known: {', '.join(map(str, given.get('not_known') or ()))}"
    return "extraction" if given.get("kind") == "extraction" else "not known"


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    model = found["model"]
    facts = {
        "model": f"{model['model']}, {counted(model['n_layers'], 'layer')} of {model['d_model']}, {model['dtype']}",
        "weights": model["weights"],
        "origin": found["origin"],
        "imported": _listed(found["imported"], ("format", "file", "file_sha256")),
        "no vector": ", ".join(map(str, found["missing_layers"])),
        "tuned": _listed(found["tuned"], ("layer", "coefficient", "reduction")) or "no layer was tuned",
        "judge": _listed(found["judge"], ("judge", "model", "server")),
        "kept": _kept(found["counts"]),
        "settings": _flat(found["settings"]),
        "versions": _flat(found["versions"]),
        "content": found["content_hash"],
    }
    if found["calibrated"]:
        facts["judge"] += ", with its calibration"
    return {name: str(value) for name, value in facts.items() if value}


def _kept(counts: Any) -> str:
    if not isinstance(counts, Mapping):
        return ""
    arms = {arm: each for arm, each in counts.items() if isinstance(each, Mapping)}
    return "; ".join(f"{arm} {each.get('kept')} of {sum(_numbers(each))}" for arm, each in sorted(arms.items()))


def _numbers(counts: Mapping[str, Any]) -> list[int]:
    return [value for value in counts.values() if isinstance(value, int)]


def _listed(given: Any, names: tuple[str, ...]) -> str:
    if not isinstance(given, Mapping):
        return ""
    values = [(name, given[name]) for name in names if isinstance(given.get(name), str | int | float)]
    return ", ".join(f"{name} {value}" if not isinstance(value, str) else value for name, value in values)


def _flat(given: Any) -> str:
    from persona_lens.reports.page import flat

    return ", ".join(f"{name} {value}" for name, value in flat(given)) if isinstance(given, Mapping) else ""

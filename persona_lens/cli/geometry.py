"""``persona-lens vectors layers``, ``pca``, ``agree`` and ``halves``: how directions stand to one another."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli import options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.effects import SeveralVectors
from persona_lens.cli.sweep import ReductionOption, Vectors
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.vectors import PersonaVectors

LayersOption = Annotated[str, typer.Option("--layers", "--layer", help="`18`, `12,15,18`, `10-20` or `all`.")]


def layers_command(
    vectors: Vectors,
    layers: LayersOption = "all",
    reduction: ReductionOption = "response_mean",
    as_json: options.AsJson = False,
) -> None:
    """Compare one trait's directions at different layers.

    Example: `persona-lens vectors layers runs/optimistic --layers 8,12,16,20`
    """
    from persona_lens.cli.display import print_table
    from persona_lens.vectors import load_vectors
    from persona_lens.vectors.geometry import layer_cosines

    loaded = load_vectors(vectors)
    chosen = options.layer_numbers(layers, loaded.model.n_layers)
    matrix = layer_cosines(loaded, reduction)[chosen][:, chosen].tolist()
    if as_json:
        cosines = [[_finite(value) for value in row] for row in matrix]
        say_json({"trait": loaded.trait, "reduction": reduction, "layers": chosen, "cosines": cosines})
        return
    rows = [(str(layer), *map(cosine_text, row)) for layer, row in zip(chosen, matrix, strict=True)]
    print_table("Cosines between layers", ("layer", *map(str, chosen)), rows)


def pca_command(
    vectors: SeveralVectors,
    layer: Annotated[int, typer.Option("--layer", help="Block index, 0-based.", show_default=False)],
    components: Annotated[int, typer.Option("--components", help="How many to show.")] = 3,
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave the vectors as long as they are; longer ones then weigh more.")
    ] = False,
    uncentred: Annotated[bool, typer.Option("--uncentred", help="Leave in what all the traits share.")] = False,
    reduction: ReductionOption = "response_mean",
    as_json: options.AsJson = False,
) -> None:
    """Find the few directions in which many traits differ at a layer, beside those of random directions.

    Example: `persona-lens vectors pca runs/optimistic runs/impolite runs/sycophantic --layer 18`
    """
    from persona_lens.cli.display import print_table
    from persona_lens.vectors.geometry import principal_components

    found = principal_components(named_vectors(vectors), layer, reduction, normalised=not raw, centred=not uncentred)
    if as_json:
        say_json(found.to_json())
        return
    if components < 1:
        raise PersonaLensError(f"--components must be at least 1, got {components}")
    shown = range(min(components, len(found.explained)))
    rows = [
        ("share of the variance", *(f"{found.explained[at]:.0%}" for at in shown)),
        ("95% of random ones: below", *(f"{found.random_explained[at]:.0%}" for at in shown)),
        *((name, *(f"{found.coordinates[row, at]:+.2f}" for at in shown)) for row, name in enumerate(found.names)),
    ]
    print_table(f"Components at layer {layer}", ("", *(f"{at + 1}" for at in shown)), rows)


def agree_command(
    one: Vectors,
    other: Annotated[
        Path, typer.Argument(metavar="OTHER", help="Vectors to compare with, of the same size.", show_default=False)
    ],
    layers: LayersOption = "all",
    reduction: ReductionOption = "response_mean",
    allow_other_model: Annotated[
        bool,
        typer.Option("--allow-other-model", help="Compare two models, such as a model and its finetuned copy."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare two makings of a vector: two seeds, two judges, a model and its finetuned copy.

    Example: `persona-lens vectors agree runs/optimistic-seed-0 runs/optimistic-seed-1`
    """
    from persona_lens.cli.display import print_table
    from persona_lens.vectors import load_vectors
    from persona_lens.vectors.geometry import CHANCE, likeness

    found = likeness(load_vectors(one), load_vectors(other), reduction, allow_other_model=allow_other_model)
    chosen = options.layer_numbers(layers, len(found.cosines))
    if as_json:
        written = found.to_json()
        picked = {name: [written[name][at] for at in chosen] for name in ("cosines", "lengths")}
        say_json({**written, "layers": chosen, **picked})
        return
    for difference in found.differences:
        say(f"note: different models: {difference}", err=True)
    print_table(
        f"Agreement (95% of random directions are within {CHANCE * found.null_std:.3f} of 0)",
        ("layer", "cosine", "length of the second / first"),
        [(str(at), cosine_text(float(found.cosines[at])), _ratio(float(found.lengths[at]))) for at in chosen],
    )


def halves_command(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run folder of an extraction; it is not changed.", show_default=False),
    ],
    layers: LayersOption = "all",
    splits: Annotated[int, typer.Option("--splits", help="Random splits of the questions that are averaged.")] = 200,
    seed: options.Seed = 0,
    reduction: ReductionOption = "response_mean",
    as_json: options.AsJson = False,
) -> None:
    """Say how reliable an extraction's vectors are: by vectors made from halves of its questions.

    Example: `persona-lens vectors halves runs/optimistic-smollm2-135m`
    """
    from persona_lens.cli.display import print_table
    from persona_lens.vectors.split_half import split_halves

    found = split_halves(run, reduction, splits=splits, seed=seed)
    chosen = options.layer_numbers(layers, len(found.layers))
    if as_json:
        written = found.to_json()
        say_json({**written, "layers": [written["layers"][at] for at in chosen]})
        return
    print_table(
        f"{counted(found.questions, 'question')}, {counted(found.splits, 'split')} into halves",
        ("layer", "halves", "95% of swapped arms: within", "the whole vector", "95% interval"),
        [
            (
                str(row.layer),
                cosine_text(row.halves),
                _ratio(row.null),
                cosine_text(row.whole.mean),
                f"{cosine_text(row.whole.low)} to {cosine_text(row.whole.high)}",
            )
            for row in (found.layers[at] for at in chosen)
        ],
    )


def named_vectors(paths: Sequence[Path]) -> dict[str, PersonaVectors]:
    """Vectors by their trait, or by their path where two are of one trait."""
    from persona_lens.vectors import load_vectors

    loaded = [(path, load_vectors(path)) for path in paths]
    names = [each.trait for _, each in loaded]
    return {each.trait if names.count(each.trait) == 1 else str(path): each for path, each in loaded}


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def cosine_text(value: float) -> str:
    """A cosine for a table."""
    return f"{round(value, 3) + 0.0:+.3f}" if isfinite(value) else "-"


def _ratio(value: float) -> str:
    return f"{value:.3f}" if isfinite(value) else "-"

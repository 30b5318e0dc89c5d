"""``persona-lens vectors forecast`` and ``halves``: what an extraction's responses say of its vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import Column, number, show_rows
from persona_lens.cli.runner import deliver
from persona_lens.cli.settings import Option, argument, layer_numbers
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.vectors.diagnostics import Diagnostics, LayerDiagnostics


COSINE = "+.3f"


@dataclass(frozen=True)
class Shown:
    """Which of the vectors are compared, and how that is said.

    Attributes:
        layers: Layers compared, where there are several to choose from.
    """

    layers: Annotated[str, Option()] = "all"
    reduction: options.Reduction = ""
    as_json: options.AsJson = False


def halves_command(
    run: Annotated[Path, argument("RUN", "Run folder of an extraction; it is not changed.")],
    shown: Shown,
    splits: int = 200,
    seed: options.Seed = 0,
) -> None:
    """Say how reliable an extraction's vectors are: by vectors made from halves of its questions.

    Example: `persona-lens vectors halves runs/optimistic-smollm2-135m`

    Args:
        splits: Random splits of the questions that are averaged.
    """
    from persona_lens.vectors.split_half import split_half_reliability

    found = split_half_reliability(run, shown.reduction, splits=splits, seed=seed)
    chosen = layer_numbers(shown.layers, len(found.layers))
    written = found.to_json()
    title = f"{counted(found.questions, 'question')}, {counted(found.splits, 'split')} into halves"
    columns: Mapping[str, Column[Any]] = {
        "layer": "layer",
        "halves": ("halves", COSINE),
        "95% of swapped arms: within": ("null", ".3f"),
        "the whole vector": ("whole.mean", COSINE),
        "95% interval": lambda row: f"{number(row.whole.low, COSINE)} to {number(row.whole.high, COSINE)}",
    }
    deliver(
        {**written, "layers": [written["layers"][at] for at in chosen]},
        lambda: show_rows(title, [found.layers[at] for at in chosen], columns),
        shown.as_json,
    )


def forecast_command(
    run: Annotated[Path, argument("RUN", "Run folder of an extraction, which is not changed; or its vectors.")],
    shown: Shown,
    model: str | None = None,
    *,
    opening: Annotated[options.ModelOptions, options.Here],
) -> None:
    """Say which layers of a trait's vectors are worth steering, before anything is generated.

    Examples:
    `persona-lens vectors forecast runs/optimistic-smollm2-135m`

    `persona-lens vectors forecast runs/optimistic-smollm2-135m --model smollm2-135m --layers 8-24`

    Args:
        model: Measure anew what the unembedding of this model reads; it is opened. Extractions on this machine have
            done so.
    """
    from persona_lens.vectors.diagnosis import diagnose

    vectors = options.open_vectors(run)
    chosen = layer_numbers(shown.layers, vectors.model.n_layers)
    found = diagnose(run, None if model is None else opening.unsteered.open(model), shown.reduction)
    written = found.to_json()
    deliver(
        {**written, "layers": [written["layers"][at] for at in chosen]},
        lambda: show_diagnostics(found, chosen),
        shown.as_json,
    )


def show_diagnostics(found: Diagnostics | None, layers: Sequence[int] | None = None) -> None:
    """A table of a row a layer, of all layers or some; nothing where nothing is known."""
    from persona_lens.reports.diagnostics import NAMES, known

    if found is None:
        return
    rows = [each for each in found.layers if layers is None or each.layer in layers]
    columns: dict[str, Column[LayerDiagnostics]] = {"layer": "layer"}
    columns |= {HEADS.get(name, NAMES[name]): _told(name) for name in known([row.to_json() for row in rows])}
    kept = f"{counted(found.responses, 'response')}, {counted(found.differences, 'pair')} of twins"
    title = f"What may foretell steering along {found.trait} ({kept}; in brackets: no more than chance)"
    show_rows(title, rows, columns)


HEADS = {"logit_rise": "rise", "accessibility": "access"}  # for a table of 80 columns


def _told(name: str) -> Column[LayerDiagnostics]:
    """A measure; in brackets where 95% of cases are not below it by chance alone."""

    def told(row: LayerDiagnostics) -> str:
        value, null = getattr(row, name), getattr(row, f"{name}_null", None)
        shown = number(value, ".2f")
        return f"({shown})" if value is not None and null is not None and value <= null else shown

    return told

"""``persona-lens steer effects``: steering along one trait, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli import judges, options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.sweep import AllowOtherModel
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.steering import Change, CrossCell, CrossEffects, Steering
    from persona_lens.vectors import PersonaVectors

REPORT = "effects.html"

SeveralVectors = Annotated[
    list[Path],
    typer.Argument(
        metavar="VECTORS...", help="A vectors.safetensors, or the run folder it is in; one a trait.", show_default=False
    ),
]


@grouped
def effects_command(
    model: options.Model,
    vectors: SeveralVectors,
    layer: Annotated[
        int | None,
        typer.Option(help="Layer at which every trait is steered, with --coefficient.", show_default="the tuned one"),
    ] = None,
    coefficient: Annotated[
        float | None,
        typer.Option(help="Multiple of the raw vector, for every trait.", show_default="the tuned one"),
    ] = None,
    edits: Annotated[
        list[str] | None,
        typer.Option(
            "--edits",
            metavar="EDITS",
            help="Steer so instead, such as `optimistic@18:+1.5`; each is a row of the matrix. Repeatable.",
            show_default=False,
        ),
    ] = None,
    read_layer: Annotated[
        int | None,
        typer.Option(
            "--read-layer", help="Layer at which projections are read.", show_default="where a trait is steered"
        ),
    ] = None,
    questions: Annotated[int, typer.Option(help="How many evaluation questions of each trait to ask.")] = 5,
    samples: Annotated[int, typer.Option(help="Responses for each question and steering.")] = 1,
    random_directions: Annotated[
        int, typer.Option(help="Random rotations of each steering that stand beside it; 0 leaves them out.")
    ] = 5,
    out: Annotated[
        Path | None,
        typer.Option("--out", help=f"Run folder, kept and resumed, with {REPORT} in it.", show_default=False),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 48,
    temperature: options.Temperature = 1.0,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    dry_run: options.DryRun = False,
    judge: judges.JudgeName = "likelihood",
    allow_other_model: AllowOtherModel = False,
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
    judging: judges.JudgeOptions,
) -> None:
    """Steer along each trait, and measure all of them: what else moves?

    Every steering answers the same held-out questions, beside random rotations of it. Each response is scored for every
    trait, and projected on every vector, both as the steered model wrote it and as the unsteered model reads it.

    Example: `persona-lens steer effects smollm2-135m runs/optimistic runs/impolite --layer 18 --coefficient 2 --out
    runs/effects`
    """
    from persona_lens import __version__
    from persona_lens.cli.display import showing_progress
    from persona_lens.reports.effects import render_effects
    from persona_lens.runs.rollouts import RolloutSettings
    from persona_lens.steering import CrossSettings, cross_effects, cross_work
    from persona_lens.vectors import load_vectors

    loaded = _by_trait([(path, load_vectors(path)) for path in vectors])
    steerings = _steerings(loaded, edits, layer, coefficient)
    settings = CrossSettings(
        questions=questions,
        samples=samples,
        random_directions=random_directions,
        layer=read_layer,
        seed=seed,
        rollouts=RolloutSettings(max_new_tokens, temperature, batch_size=batch_size),
    )
    definitions = {name: each.trait_definition for name, each in loaded.items()}
    opened = opening.open(model, offline=dry_run)
    chat = opening.chat(opened)
    scoring = judging.open_each(judge, definitions, opened, chat, opening.dtype, opening.device)
    work = partial(cross_work, opened, steerings, loaded, settings, judges=scoring, chat=chat)
    if options.planned(work, opening, dry_run, as_json):
        return
    with judges.saying_spending(next(iter(scoring.values())) if scoring else None), showing_progress() as progress:
        found = cross_effects(
            opened,
            steerings,
            loaded,
            settings,
            judges=scoring,
            chat=chat,
            folder=out,
            allow_other_model=allow_other_model,
            progress=progress,
        )
    options.say_traffic(opened)
    if out is not None:
        options.write_report(out / REPORT, render_effects(found.to_json(), __version__))
        say(f"report: {out / REPORT}", err=True)
    if as_json:
        say_json(found.to_json())
    else:
        _show(found)


def _by_trait(loaded: Sequence[tuple[Path, PersonaVectors]]) -> dict[str, PersonaVectors]:
    found: dict[str, Path] = {}
    for path, each in loaded:
        if each.trait in found:
            raise PersonaLensError(f"{found[each.trait]} and {path} are both of {each.trait!r}; give each trait once")
        found[each.trait] = path
    return {each.trait: each for _, each in loaded}


def _steerings(
    loaded: dict[str, PersonaVectors], edits: Sequence[str] | None, layer: int | None, coefficient: float | None
) -> dict[str, Steering]:
    from persona_lens.backend import Operation
    from persona_lens.steering import Steering
    from persona_lens.steering.notation import Layers, Term

    if edits:
        if layer is not None or coefficient is not None:
            raise PersonaLensError(
                "--edits says the layer and the coefficient itself; leave out --layer and --coefficient"
            )
        if again := [text for text in edits if edits.count(text) > 1]:
            raise PersonaLensError(f"--edits {again[0]!r} is given twice")
        return {text: Steering.parse(text, loaded) for text in edits}
    if layer is not None and coefficient is None:
        raise PersonaLensError(
            f"--layer {layer} needs a --coefficient too: the one that was tuned is for its own layer"
        )
    layers = None if layer is None else Layers(((layer, layer),))
    operation = None if coefficient is None else Operation.ADD
    return {
        name: Steering((Term(name, layers, operation, coefficient),), {name: each}) for name, each in loaded.items()
    }


def _show(found: CrossEffects) -> None:
    from persona_lens.cli.display import print_table

    changes: tuple[tuple[str, int, Callable[[CrossCell], Change | None]], ...] = (
        ("Change of the trait score, points", 1, lambda cell: cell.score),
        (
            "Change of the projection of the text, as the unsteered model reads it, in lengths of each vector",
            2,
            lambda cell: cell.text_projection,
        ),
        (
            "The same in the steered model while it wrote: from the edited layer on this holds the edit itself",
            2,
            lambda cell: cell.steered_projection,
        ),
    )
    names = [trait.name for trait in found.traits]
    for title, digits, change_in in changes:
        print_table(
            f"{title} [95% interval over {counted(len(found.questions), 'question')}]",
            ("steering", *(f"on {name}" for name in names)),
            [
                (steering, *(_cell(change_in(found.cell(steering, t.name)), digits) for t in found.traits))
                for steering in found.steerings
            ],
        )
    say("* clear: the change and its difference from that of random directions lie on the same side of 0")
    for title, digits, strain in (
        ("Change of surprise, nats a token: what it does to the text", 2, found.surprise),
        ("Change of coherence, points: what it does to the text", 1, found.coherence),
    ):
        strained = {name: strain(name) for name in found.steerings}
        if any(strained.values()):
            rows = [(name, _cell(change, digits)) for name, change in strained.items()]
            print_table(title, ("steering", "change"), rows)


def _cell(change: Change | None, digits: int) -> str:
    if change is None:
        return "-"

    from persona_lens.core.statistics import FEW, few

    def write(value: float) -> str:
        return f"{round(value, digits) + 0.0:+.{digits}f}"  # no negative zero

    vector, random = change.vector, change.random
    said = f" ({few(vector.n)})" if vector.n < FEW else ""
    first = f"{write(vector.mean)}{'*' if change.clear else ''} [{write(vector.low)}, {write(vector.high)}]{said}"
    return first if random is None else f"{first}\nrandom {write(random.mean)}"

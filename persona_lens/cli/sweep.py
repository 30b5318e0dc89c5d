"""``persona-lens steer sweep``: what a vector does to answers, by layer and by coefficient."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli import judges, options
from persona_lens.cli.display import say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.previews import PreviewOption, check_one_look_ahead, show_previews

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.core.statistics import Estimate
    from persona_lens.models import ChatFormat
    from persona_lens.steering import SweepRow, SweepSettings
    from persona_lens.steering.preview import Preview
    from persona_lens.vectors import PersonaVectors

Vectors = Annotated[
    Path,
    typer.Argument(metavar="VECTORS", help="A vectors.safetensors, or the run folder it is in.", show_default=False),
]
AllowOtherModel = Annotated[
    bool, typer.Option("--allow-other-model", help="Use the vectors on a model that they were not extracted from.")
]
PositionsOption = Annotated[str, typer.Option("--positions", help="`all`, `prompt`, `response` or `generating`.")]
ReductionOption = Annotated[str, typer.Option("--reduction", help="`response_mean`, `prompt_mean` or `prompt_last`.")]


@grouped
def sweep_command(
    model: options.Model,
    vectors: Vectors,
    layers: Annotated[str, typer.Option("--layers", help="`18`, `12,15,18`, `10-20` or `all`; each is steered alone.")],
    coefficients: Annotated[
        str, typer.Option("--coefficients", help="Multiples of the raw vector; 0 is always run too.")
    ] = "-2,-1,1,2",
    questions: Annotated[int, typer.Option(help="How many of the 20 evaluation questions to ask.")] = 20,
    samples: Annotated[int, typer.Option(help="Responses for each question and setting.")] = 1,
    random_directions: Annotated[
        int, typer.Option(help="Random directions of equal norm that stand beside the vector; 0 leaves them out.")
    ] = 5,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; kept and resumed.", show_default=False)] = None,
    positions: PositionsOption = "all",
    reduction: ReductionOption = "response_mean",
    max_new_tokens: options.MaxNewTokens = 48,
    temperature: options.Temperature = 1.0,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    dry_run: options.DryRun = False,
    preview: PreviewOption = False,
    judge: judges.JudgeName = "likelihood",
    allow_other_model: AllowOtherModel = False,
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
    judging: judges.JudgeOptions,
) -> None:
    """Steer along a vector on the trait's held-out questions, and score what comes out.

    Scores are the likelihood judge's, a proxy, unless another judge is named. Intervals are 95% intervals over
    questions.

    Example: `persona-lens steer sweep smollm2-135m runs/optimistic-smollm2-135m --layers 12,18`
    """
    from persona_lens.backend import Positions
    from persona_lens.cli.display import showing_progress
    from persona_lens.runs.rollouts import RolloutSettings
    from persona_lens.steering import SweepSettings, sweep, sweep_work
    from persona_lens.vectors import load_vectors

    check_one_look_ahead(preview, dry_run)
    loaded = load_vectors(vectors)
    settings = SweepSettings(
        layers=tuple(options.layer_numbers(layers, loaded.model.n_layers)),
        coefficients=tuple(options.numbers(coefficients, "--coefficients")),
        questions=questions,
        samples=samples,
        random_directions=random_directions,
        positions=options.choice(Positions, positions, "--positions"),
        reduction=reduction,
        seed=seed,
        rollouts=RolloutSettings(max_new_tokens, temperature, batch_size=batch_size),
    )
    opened = opening.open(model, offline=dry_run or preview)
    chat = opening.chat(opened)
    if preview:
        if not allow_other_model:
            loaded.check_model(opened)
        show_previews(_previews(opened, loaded, settings, chat), as_json)
        return
    scoring = judging.open(judge, loaded.trait_definition, opened, chat, opening.dtype, opening.device)
    work = partial(sweep_work, opened, loaded, settings, chat, judge=scoring)
    if options.planned(work, opening, dry_run, as_json):
        return
    with judges.saying_spending(scoring), showing_progress() as progress:
        rows = sweep(
            opened,
            loaded,
            settings,
            folder=out,
            judge=scoring,
            chat=chat,
            allow_other_model=allow_other_model,
            progress=progress,
        )
    options.say_traffic(opened)
    _show(rows, settings.layers, random_directions > 0, as_json)


def _previews(
    backend: Backend, vectors: PersonaVectors, settings: SweepSettings, chat: ChatFormat
) -> dict[str, Preview]:
    """The first question under each coefficient."""
    from persona_lens.steering.comparison import VECTOR
    from persona_lens.steering.preview import preview_tokens
    from persona_lens.steering.sweep import edits_of, plan_sweep

    requests = [
        request
        for request in plan_sweep(vectors.trait_definition, settings)
        if (request.labels["question_number"], request.labels["sample"]) == (0, 0)
        and request.labels["direction"] == VECTOR
    ]
    edits_for = edits_of(vectors, settings)
    edits = [edit for request in requests for edit in edits_for([request])]
    first = requests[0]
    title = f"question 0: {first.question} (each layer and coefficient in a response of its own)"
    ids = chat.encode(first.system, first.question)
    return {title: preview_tokens(backend, ids, settings.rollouts.max_new_tokens, edits=edits)}


def _show(rows: list[SweepRow], layers: tuple[int, ...], with_null: bool, as_json: bool) -> None:
    from persona_lens.cli.display import interval_text, print_table
    from persona_lens.core.statistics import verdict_of
    from persona_lens.steering import curve, effect

    directions = ["vector", "random"] if with_null else ["vector"]
    curves = {(layer, kind): curve(rows, layer, kind) for layer in layers for kind in directions}
    effects = [effect(rows, layer) for layer in layers]
    if as_json:
        listed = [
            {"layer": layer, "direction": kind, "points": [point.to_json() for point in points]}
            for (layer, kind), points in curves.items()
        ]
        say_json({"curves": listed, "effects": [e.to_json() for e in effects]})
        return
    measured = "surprise" if curves[layers[0], "vector"][0].surprise else "coherence"
    meaning = {"surprise": "surprise under the unsteered model (nats a token)", "coherence": "coherence (0 to 100)"}
    for layer in layers:
        print_table(
            f"Layer {layer}: trait score [95% interval], and {meaning[measured]}",
            ("coefficient", *(f"{kind} {what}" for kind in directions for what in ("score", measured))),
            [
                (
                    f"{points[0].coefficient:+g}",
                    *(
                        cell
                        for p in points
                        for cell in (interval_text(p.score, sign=False), _mean(getattr(p, measured)))
                    ),
                )
                for points in zip(*(curves[layer, kind] for kind in directions), strict=True)
            ],
        )
    print_table(
        "Effect: score at the largest coefficient minus score at the smallest",
        ("layer", "vector", "random", "vector - random", "verdict"),
        [
            (
                str(e.layer),
                *(interval_text(x, sign=False) if x else "" for x in (e.vector, e.random, e.difference)),
                verdict_of(e.vector, e.difference),
            )
            for e in effects
        ],
    )


def _mean(estimate: Estimate | None) -> str:
    return f"{estimate.mean:.2f}" if estimate else "-"

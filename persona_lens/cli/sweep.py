"""``persona-lens steer sweep``: what a vector does to answers, by layer and by coefficient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import cell, interval_text, print_table, show_rows
from persona_lens.cli.runner import Experiment, Run, Session
from persona_lens.cli.settings import Fields, Given

if TYPE_CHECKING:
    from persona_lens.steering import SweepRow, SweepSettings
    from persona_lens.steering.preview import Preview
    from persona_lens.vectors import PersonaVectors


def sweep_command(
    run: Run,
    vectors: options.Vectors,
    given: Annotated[Given, Fields("persona_lens.steering:SweepSettings", without=("question_set",))],
    preview: options.Preview = False,
    allow_other_model: options.AllowOtherModel = False,
) -> None:
    """Steer along a vector on the trait's held-out questions, and score what comes out.

    Scores are the likelihood judge's, a proxy, unless another judge is named. Intervals are 95% intervals over
    questions.

    Example: `persona-lens steer sweep smollm2-135m runs/optimistic-smollm2-135m --layers 12,18`
    """
    from persona_lens.steering import sweep, sweep_work
    from persona_lens.vectors import load_vectors

    loaded = load_vectors(vectors)
    settings: SweepSettings = given.make(loaded.model.n_layers)

    def previews(at: Session) -> dict[str, Preview]:
        if not allow_other_model:
            loaded.check_model(at.backend)
        return _previews(at, loaded, settings)

    experiment = Experiment(
        lambda at: sweep(
            at.backend,
            loaded,
            settings,
            folder=at.folder,
            judge=at.judge,
            chat=at.chat,
            allow_other_model=allow_other_model,
            progress=at.shown,
        ),
        lambda rows, _: _show(rows, settings),
        lambda at: sweep_work(at.backend, loaded, settings, at.chat, judge=at.judge),
        summary=lambda rows: _summary(rows, settings),
        traits=loaded.trait_definition,
        previews=previews,
    )
    run.carry_out(experiment, preview=preview)


def _previews(at: Session, vectors: PersonaVectors, settings: SweepSettings) -> dict[str, Preview]:
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
    ids = at.chat.encode(first.system, first.question)
    return {title: preview_tokens(at.backend, ids, settings.rollouts.max_new_tokens, edits=edits)}


def _curves(rows: list[SweepRow], settings: SweepSettings) -> dict[tuple[int, str], Any]:
    from persona_lens.steering import curve

    directions = ["vector", "random"] if settings.random_directions > 0 else ["vector"]
    return {(layer, kind): curve(rows, layer, kind) for layer in settings.layers for kind in directions}


def _summary(rows: list[SweepRow], settings: SweepSettings) -> dict[str, Any]:
    from persona_lens.steering import effect

    listed = [
        {"layer": layer, "direction": kind, "points": [point.to_json() for point in points]}
        for (layer, kind), points in _curves(rows, settings).items()
    ]
    return {"curves": listed, "effects": [effect(rows, layer).to_json() for layer in settings.layers]}


def _show(rows: list[SweepRow], settings: SweepSettings) -> None:
    from persona_lens.core.statistics import verdict_of
    from persona_lens.steering import effect

    curves = _curves(rows, settings)
    directions = list(dict.fromkeys(kind for _, kind in curves))
    measured = "surprise" if curves[settings.layers[0], "vector"][0].surprise else "coherence"
    meaning = {"surprise": "surprise under the unsteered model (nats a token)", "coherence": "coherence (0 to 100)"}
    for layer in settings.layers:
        print_table(
            f"Layer {layer}: trait score [95% interval], and {meaning[measured]}",
            ("coefficient", *(f"{kind} {what}" for kind in directions for what in ("score", measured))),
            [
                (f"{points[0].coefficient:+g}", *(text for point in points for text in _cells(point, measured)))
                for points in zip(*(curves[layer, kind] for kind in directions), strict=True)
            ],
        )
    show_rows(
        "Effect: score at the largest coefficient minus score at the smallest",
        [effect(rows, layer) for layer in settings.layers],
        {
            "layer": lambda e: e.layer,
            "vector": (lambda e: e.vector, ".1f"),
            "random": (lambda e: e.random or "", ".1f"),
            "vector - random": (lambda e: e.difference or "", ".1f"),
            "verdict": lambda e: verdict_of(e.vector, e.difference),
        },
    )


def _cells(point: Any, measured: str) -> tuple[str, str]:
    strain = getattr(point, measured)
    return interval_text(point.score, ".1f"), cell(strain and strain.mean, ".2f")

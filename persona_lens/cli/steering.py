"""``persona-lens steer sweep``, ``tune``, ``compare`` and ``effects``: what steering does to answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import options
from persona_lens.cli.display import Column, interval_text, print_table, say, show_rows
from persona_lens.cli.options.steerings import SteeringOptions
from persona_lens.cli.runner import REPORT, Job, Run, Session
from persona_lens.cli.settings import Fields, Given, Option, choice
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.core.statistics import Estimate
    from persona_lens.runs.cost import Work
    from persona_lens.steering import Change, CrossEffects, Steering, SweepRow, SweepSettings, TuneSettings, Tuning
    from persona_lens.steering.arms import Prompted
    from persona_lens.steering.comparison import Comparison
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
    from persona_lens.steering import sweep, sweep_experiment
    from persona_lens.steering.arms import VECTOR
    from persona_lens.steering.preview import preview_tokens
    from persona_lens.steering.sweep import edits_of, plan_sweep

    loaded = options.open_vectors(vectors)
    settings = given.make(loaded.model.n_layers)

    def previews(at: Session) -> dict[str, Preview]:
        """The first question under each coefficient."""
        if not allow_other_model:
            loaded.check_model(at.backend)
        shown = {"question_number": 0, "sample": 0, "direction": VECTOR}
        planned = plan_sweep(loaded.trait_definition, settings)
        requests = [request for request in planned if shown.items() <= request.labels.items()]
        edits_for = edits_of(loaded, settings)
        edits = [edit for request in requests for edit in edits_for([request])]
        title = f"question 0: {requests[0].question} (each layer and coefficient in a response of its own)"
        ids = at.chat.encode(requests[0].system, requests[0].question)
        return {title: preview_tokens(at.backend, ids, settings.rollouts.max_new_tokens, edits=edits)}

    job = Job(
        lambda at: sweep(at.backend, loaded, settings, allow_other_model=allow_other_model, **at.given),
        lambda found, _: _show_sweep(found.answers, settings),
        lambda at: sweep_experiment(at.planned(loaded), settings).work(),
        traits=loaded.trait_definition,
        previews=previews,
    )
    run.carry_out(job, preview=preview)


def _curves(rows: Sequence[SweepRow], settings: SweepSettings) -> dict[tuple[int, str], Any]:
    from persona_lens.steering import curve

    directions = ["vector", "random"] if settings.random_directions > 0 else ["vector"]
    return {(layer, kind): curve(rows, layer, kind) for layer in settings.layers for kind in directions}


SHOWN = {"nll": "surprise", "coherence": "coherence"}


def _show_sweep(rows: Sequence[SweepRow], settings: SweepSettings) -> None:
    from persona_lens.core.statistics import verdict_of
    from persona_lens.steering import effect

    curves = _curves(rows, settings)
    directions = list(dict.fromkeys(kind for _, kind in curves))
    measured = "nll" if curves[settings.layers[0], "vector"][0].nll else "coherence"
    meaning = {"nll": "surprise under the unsteered model (nats a token)", "coherence": "coherence (0 to 100)"}
    for layer in settings.layers:
        columns: dict[str, Column[Any]] = {"coefficient": lambda row: f"{row['vector'].coefficient:+g}"}
        for kind in directions:
            columns[f"{kind} score"] = (f"{kind}.score", ".1f")
            columns[f"{kind} {SHOWN[measured]}"] = (f"{kind}.{measured}.mean", ".2f")
        points = zip(*(curves[layer, kind] for kind in directions), strict=True)
        title = f"Layer {layer}: trait score [95% interval], and {meaning[measured]}"
        show_rows(title, [dict(zip(directions, each, strict=True)) for each in points], columns)
    effects = [effect(rows, layer) for layer in settings.layers]
    show_rows(
        "Effect: score at the largest coefficient minus score at the smallest",
        effects,
        {
            "layer": "layer",
            "vector": ("vector", ".1f"),
            "random": (lambda e: e.random or "", ".1f"),
            "vector - random": (lambda e: e.difference or "", ".1f"),
            "verdict": lambda e: verdict_of(e.vector, e.difference),
        },
    )
    if both := [each for each in effects if each.promotion and each.suppression]:
        show_rows(
            "Of which: score at each end minus that of the unsteered model",
            both,
            {
                "layer": "layer",
                "promotion": ("promotion.vector", "+.1f"),
                "random": ("promotion.random", "+.1f"),
                "suppression": ("suppression.vector", "+.1f"),
                "random ": ("suppression.random", "+.1f"),
            },
        )


def tune_command(
    context: typer.Context,
    run: Annotated[Run, Fields(out=Option(shown="runs/tuned-TRAIT-MODEL"))],
    vectors: options.Vectors,
    given: Annotated[Given, Fields("persona_lens.steering:TuneSettings")],
    capability: Annotated[str | None, Option(metavar="TASK")] = None,
) -> None:
    """Find the layer and strength with the strongest effect while the text holds together.

    Searches on some of the held-out questions, and asks on only where the choice is still open; confirms the choice on
    the others, beside random directions. The folder gets the report, and `vectors.safetensors` with the choice stored
    in it, for `generate` and others to use.

    Example: `persona-lens steer tune smollm2-135m runs/optimistic-smollm2-135m`

    Args:
        capability: Also measure the accuracy in this task of lm-evaluation-harness at every strength of the chosen
            layer; `persona_lens_basics` needs no hub.
    """
    from persona_lens.steering import tune, tune_work

    loaded = options.open_vectors(vectors)
    settings = given.make(loaded.model.n_layers)

    def tuned(at: Session) -> Tuning:
        measure = _accuracy_in(at, capability, settings.seed) if capability else None
        return tune(at.backend, loaded, settings, command=options.repeated(context), capability=measure, **at.given)

    job = Job(
        tuned,
        _show_tuning,
        lambda at: (*tune_work(at.planned(loaded), settings), *_accuracy_work(at, capability, loaded, settings)),
        traits=loaded.trait_definition,
        name=f"tuned-{loaded.trait}",
        model=loaded.model.model,
    )
    run.carry_out(job)


def _show_tuning(found: Tuning, at: Session) -> None:
    race = found.summary["race"]
    show_rows(
        "Change of the trait score [95% interval] on the questions searched",
        found.points,
        {
            "layer": "place.layer",
            "coefficient": lambda point: f"{point.place.coefficient:+g}",
            "strength": ("place.strength", ".2f"),
            "change": "effect.change",
            **({} if race else {"random": "effect.random"}),
            "text holds": "coherent",
            **({"questions": "questions", "dropped": lambda point: point.dropped or ""} if race else {}),
        },
    )
    if race:
        steered, places = counted(race["steered"], "steered response"), counted(len(found.points), "place")
        say(f"the race took {steered} at {places}, in {counted(race['rounds'], 'round')}")
    options.say_notes(found.summary["warnings"], "warning")
    say(f"chosen: {found.steering}")
    if found.confirmed is not None:
        random = found.confirmed.random
        beside = f", random directions {interval_text(random)}" if random else ""
        others = counted(found.summary["confirm_questions"], "question")
        left = found.summary["left_questions"]
        say(f"on {others} of {left} that the search left: {interval_text(found.confirmed.change)}{beside}")
    say(f"vectors with the choice stored: {at.kept / 'vectors.safetensors'}")


def _accuracy_in(at: Session, task: str, seed: int) -> Callable[[Steering | None], Estimate]:
    """What measures the accuracy in a task under a steering, which is refused here already if it cannot be run."""
    from persona_lens.analysis.capability import accuracy, check_task

    check_task(task)
    backend = at.backend
    return lambda steering: accuracy(backend, task, steering.edits() if steering else (), seed=seed)


def _accuracy_work(at: Session, task: str | None, vectors: PersonaVectors, settings: TuneSettings) -> tuple[Work, ...]:
    """What that asks: unsteered, and at every strength that confirms the choice."""
    if task is None:
        return ()
    from persona_lens.analysis.capability import capability_work
    from persona_lens.runs.cost import together
    from persona_lens.steering import Steering
    from persona_lens.steering.tuning.search import confirmed_strengths

    times, steered = confirmed_strengths(settings), Steering.parse(f"{vectors.trait}@0:+1", vectors).edits()
    edited = [replace(work * times, at_most=True) for work in capability_work(at.backend, (task,), edits=steered)]
    return together([*capability_work(at.backend, (task,)), *edited])


QUESTIONS = Option("How many of the held-out questions to ask.")
PROMPTED = "prompted"


def compare_command(
    run: Run,
    vectors: options.Vectors,
    written: SteeringOptions,
    given: Annotated[
        Given, Fields("persona_lens.steering:ArmSettings", without=("question_set",), questions=QUESTIONS)
    ],
    prompted: Annotated[str | None, Option(metavar="TOWARDS", values="`more` or `less`")] = None,
) -> None:
    """Let the unsteered model and several steerings answer the same questions, and score what comes.

    The questions and the score are those of VECTORS' trait. Beside each steering stands the same one in random
    directions, with norms and angles kept.

    Example: `persona-lens steer compare smollm2-135m runs/optimistic-smollm2-135m --edits optimistic@18:+1.5
    --edits "optimistic@all:increments(+1.5)" --prompted more`

    Args:
        prompted: Beside them nothing is steered, and a system prompt asks for more of the trait, or for less.
    """
    from persona_lens.steering.arms import Prompted, arms_experiment
    from persona_lens.steering.comparison import compare
    from persona_lens.steering.tuning.settings import Towards

    loaded = options.open_vectors(vectors)
    arms: dict[str, Steering | Prompted] = {**written.open(loaded)}
    if not arms:
        raise PersonaLensError(f"name what to compare, such as --edits {loaded.trait}@18:+1.5; repeat it for more")
    if prompted is not None:
        asked = choice(Towards, prompted, "--prompted").arm
        arms[PROMPTED] = Prompted(loaded.trait_definition.middle_prompt(asked))
    settings = given.make()

    def show(found: Comparison, _: Session) -> None:
        effects = {name: effect.to_json() for name, effect in found.effects.items() if effect is not None}
        measured = "nll" if any(effect["nll"] for effect in effects.values()) else "coherence"
        changes = ("change", "random", "difference", "clear")
        effects |= {name: {**each, "clear": ""} for name, each in effects.items() if isinstance(arms[name], Prompted)}
        plain = {**found.summary["unsteered"], **dict.fromkeys(changes, "")}
        show_rows(
            f"Trait score of {loaded.trait}, its change [95% interval], and {SHOWN[measured]}",
            [{"steering": name, **row} for name, row in {"unsteered": plain, **effects}.items()],
            {
                "steering": "steering",
                "score": ("score.mean", ".1f"),
                **{name: name for name in changes},
                SHOWN[measured]: (f"{measured}.mean", ".2f"),
            },
        )
        for name in found.effects:
            if name not in effects:
                say(f"warning: no response under {name} has a score", err=True)

    job = Job(
        lambda at: compare(at.backend, arms, loaded, settings, **at.given),
        show,
        lambda at: arms_experiment(at.planned(loaded), arms, settings).work(),
        traits=loaded.trait_definition,
    )
    run.carry_out(job)


def effects_command(
    run: Annotated[Run, Fields(out=Option(f"Run folder, kept and resumed, with {REPORT} in it."))],
    vectors: options.SeveralVectors,
    given: Annotated[Given, Fields("persona_lens.steering:CrossSettings", without=("layer",))],
    layer: int | None = None,
    coefficient: float | None = None,
    edits: Annotated[list[str] | None, Option(metavar="EDITS")] = None,
    read_layer: int | None = None,
    allow_other_model: options.AllowOtherModel = False,
) -> None:
    """Steer along each trait, and measure all of them: what else moves?

    Every steering answers the same held-out questions, beside random rotations of it. Each response is scored for every
    trait, and projected on every vector, both as the steered model wrote it and as the unsteered model reads it.

    Example: `persona-lens steer effects smollm2-135m runs/optimistic runs/impolite --layer 18 --coefficient 2 --out
    runs/effects`

    Args:
        layer: Layer at which every trait is steered, with --coefficient; None for the tuned one.
        coefficient: Multiple of the raw vector, for every trait; None for the tuned one.
        edits: Steer so instead, such as `optimistic@18:+1.5`; each is a row of the matrix. Repeatable.
        read_layer: Layer at which projections are read; None is where a trait is steered.
    """
    from persona_lens.steering import Crossing
    from persona_lens.steering.crossing import effects

    loaded = options.open_by_trait(vectors)
    steerings = _steerings(loaded, edits, layer, coefficient)
    settings = given.make(layer=read_layer)
    job = Job(
        lambda at: effects(at.backend, steerings, loaded, settings, allow_other_model=allow_other_model, **at.given),
        _show_effects,
        lambda at: Crossing(at.backend, steerings, loaded, settings, **at.judging, own_chat=at.chat).work(),
        traits={name: each.trait_definition for name, each in loaded.items()},
    )
    run.carry_out(job)


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


CHANGES = {
    "score": ("Change of the trait score, points", "+.1f"),
    "text_projection": (
        "Change of the projection of the text, as the unsteered model reads it, in lengths of each vector",
        "+.2f",
    ),
    "steered_projection": (
        "The same in the steered model while it wrote: from the edited layer on this holds the edit itself",
        "+.2f",
    ),
}


def _show_effects(found: CrossEffects, _: Session) -> None:
    over = f"[95% interval over {counted(len(found.questions), 'question')}]"
    for change, (title, form) in CHANGES.items():
        heads = ("steering", *(f"on {trait.name}" for trait in found.traits))
        rows = [
            (name, *(_cell(getattr(found.cell(name, trait.name), change), form) for trait in found.traits))
            for name in found.steerings
        ]
        print_table(f"{title} {over}", heads, rows)
    say("* clear: the change and its difference from that of random directions lie on the same side of 0")
    for title, form, strain in (
        ("Change of surprise, nats a token: what it does to the text", "+.2f", found.nll),
        ("Change of coherence, points: what it does to the text", "+.1f", found.coherence),
    ):
        strained = {name: strain(name) for name in found.steerings}
        if any(strained.values()):
            print_table(title, ("steering", "change"), [(name, _cell(each, form)) for name, each in strained.items()])


def _cell(change: Change | None, form: str) -> str:
    if change is None:
        return "-"
    mean, _, interval = interval_text(change.vector, form).partition(" ")
    first = f"{mean}{'*' if change.clear else ''} {interval}".rstrip()
    return first if change.random is None else f"{first}\nrandom {interval_text(change.random, form).partition(' ')[0]}"

"""``persona-lens steer effects``: steering along one trait, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from persona_lens.cli import options
from persona_lens.cli.display import interval_text, print_table, say
from persona_lens.cli.runner import Job, Run, Session
from persona_lens.cli.settings import Fields, Given, Option
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.steering import Change, CrossEffects, CrossSettings, Steering
    from persona_lens.vectors import PersonaVectors

REPORT = "effects.html"


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
    from persona_lens.reports.effects import render_effects
    from persona_lens.steering import cross_effects, cross_work

    loaded = _by_trait(vectors)
    steerings = _steerings(loaded, edits, layer, coefficient)
    settings: CrossSettings = given.make(layer=read_layer)
    job = Job(
        lambda at: cross_effects(
            at.backend, steerings, loaded, settings, allow_other_model=allow_other_model, **at.given_each
        ),
        _show,
        lambda at: cross_work(at.backend, steerings, loaded, settings, judges=at.judges, chat=at.chat),
        summary=lambda found: found.to_json(),
        traits={name: each.trait_definition for name, each in loaded.items()},
        page=render_effects,
        report=REPORT,
    )
    run.carry_out(job)


def _by_trait(paths: Sequence[Path]) -> dict[str, PersonaVectors]:
    found: dict[str, tuple[Path, PersonaVectors]] = {}
    for path, each in zip(paths, options.open_vectors(paths), strict=True):
        if each.trait in found:
            first = found[each.trait][0]
            raise PersonaLensError(f"{first} and {path} are both of {each.trait!r}; give each trait once")
        found[each.trait] = path, each
    return {name: each for name, (_, each) in found.items()}


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


CHANGES = (
    ("Change of the trait score, points", "+.1f", "score"),
    (
        "Change of the projection of the text, as the unsteered model reads it, in lengths of each vector",
        "+.2f",
        "text_projection",
    ),
    (
        "The same in the steered model while it wrote: from the edited layer on this holds the edit itself",
        "+.2f",
        "steered_projection",
    ),
)


def _show(found: CrossEffects, _: Session) -> None:
    names = [trait.name for trait in found.traits]
    for title, form, change in CHANGES:
        print_table(
            f"{title} [95% interval over {counted(len(found.questions), 'question')}]",
            ("steering", *(f"on {name}" for name in names)),
            [
                (steering, *(_cell(getattr(found.cell(steering, name), change), form) for name in names))
                for steering in found.steerings
            ],
        )
    say("* clear: the change and its difference from that of random directions lie on the same side of 0")
    for title, form, strain in (
        ("Change of surprise, nats a token: what it does to the text", "+.2f", found.surprise),
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

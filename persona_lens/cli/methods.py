"""``persona-lens steer methods``: directions made by several methods, compared by what steering along them does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import interval_text, print_table, say, showing_progress
from persona_lens.cli.runner import Job, Run, Session
from persona_lens.cli.settings import Fields, Given, Option, argument
from persona_lens.cli.steering import QUESTIONS
from persona_lens.cli.steerings import RENAMED
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.analysis.method_effects import MethodEffects
    from persona_lens.vectors import PersonaVectors


def methods_command(
    run: Annotated[Run, Fields(out=Option(shown="runs/methods-TRAIT-MODEL"))],
    extraction: Annotated[Path, argument("RUN", "Run folder of an extraction, whose responses are used.")],
    given: Annotated[
        Given,
        Fields("persona_lens.analysis.method_effects:MethodSettings", without=("question_set",), questions=QUESTIONS),
    ],
    method: Annotated[list[str] | None, Option(metavar="NAME", shown="all that come with the package")] = None,
    vectors: Annotated[list[str] | None, Option(metavar="NAME=FILE")] = None,
) -> None:
    """Make directions of a trait by several methods, and compare what steering along each of them does.

    All answer the same held-out questions, by steps of equal length at one layer. Beside them stand the unsteered
    model, random directions of that length, and a system prompt that asks for the trait. Compared are the trait score,
    how much the text surprises the unsteered model, and the probability of right answers to known questions.

    Examples:
    `persona-lens steer methods smollm2-135m runs/optimistic-smollm2-135m --layer 18`

    `persona-lens steer methods smollm2-135m runs/optimistic-smollm2-135m --method difference --method lda
    --vectors mine=mine.safetensors`

    Args:
        method: How a direction is made; `vectors methods` lists all. Repeatable.
        vectors: Further vectors of the trait, however they were made, and what to call them. Repeatable.
    """
    from persona_lens.analysis.method_effects import compare_methods, compare_methods_work

    own, more = options.open_vectors(extraction), dict(map(_named, vectors or ()))
    if len(more) < len(vectors or ()):
        raise PersonaLensError("two --vectors have one name; give each a name of its own")
    settings = given.make()
    made = _planned(own, method) if run.dry_run else _fitted(extraction, method)
    if taken := [name for name in more if name in made]:
        raise PersonaLensError(f"--vectors {taken[0]}=… has the name of a method; give it another")
    compared = {**made, **more}
    job = Job(
        lambda at: compare_methods(at.backend, compared, settings, **at.given),
        _show,
        lambda at: compare_methods_work(at.backend, compared, settings, **at.asked),
        traits=own.trait_definition,
        name=f"methods-{own.trait}",
        model=own.model.model,
    )
    run.carry_out(job)


def _named(given: str) -> tuple[str, PersonaVectors]:
    found = RENAMED.fullmatch(given)
    if found is None:
        raise PersonaLensError(f"--vectors takes NAME=FILE, such as mine=mine.safetensors; got {given!r}")
    return found[1], options.open_vectors(Path(found[2]))


def _planned(own: PersonaVectors, names: Sequence[str] | None) -> dict[str, PersonaVectors]:
    """What stands for the vectors of each method where nothing is made: their number is what counts."""
    from persona_lens.vectors.methods import METHODS

    return {name: own for name in names or METHODS.built_in if METHODS.find(name)}


def _fitted(extraction: Path, names: Sequence[str] | None) -> dict[str, PersonaVectors]:
    """The vectors of each method; of those that nobody named, the ones that can be made."""
    from persona_lens.vectors.fit import fit_vectors
    from persona_lens.vectors.methods import METHODS, FitError
    from persona_lens.vectors.samples import read_samples

    samples, found = read_samples(extraction), {}
    with showing_progress() as progress:
        for name in dict.fromkeys(names or METHODS.built_in):
            try:
                found[name] = fit_vectors(samples, name, progress=progress)
            except FitError as error:
                if names:
                    raise
                options.say_notes([f"{name} is left out: {error}"])
    return found


SHOWN = {"nll": ("surprise", ".2f"), "coherence": ("coherence", ".1f"), "capability": ("right answers", ".2f")}


def _show(found: MethodEffects, _: Session) -> None:
    from persona_lens.reports.methods import rows_of

    rows = list(rows_of(found.summary))
    measured = [name for name in SHOWN if any(row["means"][name] for row in rows)]
    heads = ("way", "strength", "score", "change", "minus random", *(SHOWN[name][0] for name in measured), "text holds")
    shown = [_row(row, measured) for row in rows]
    title = f"Steering towards {found.summary['towards']} of {found.summary['trait']} at layer {found.summary['layer']}"
    print_table(f"{title} [95% interval]", heads, shown)
    say("* clear: the change and its difference from that of random directions lie on the same side of 0")


def _row(row: dict[str, Any], measured: Sequence[str]) -> tuple[str, ...]:
    change = row["changes"] and row["changes"]["score"]
    strength = "" if row["strength"] is None else f"{row['strength']:g}"
    moved, apart = (interval_text(change[name]) if change and change[name] else "" for name in ("vector", "difference"))
    means = (interval_text(row["means"][name], SHOWN[name][1]) for name in measured)
    clear = "*" if change and change["clear"] else ""
    held = {None: "", True: "yes", False: "no"}[row.get("coherent")]
    return (row["name"], strength, interval_text(row["means"]["score"], ".1f"), moved + clear, apart, *means, held)

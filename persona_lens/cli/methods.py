"""``persona-lens bench-steer``: directions by several methods, compared by what they detect, do, and move besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import interval_text, print_table, say, showing_progress
from persona_lens.cli.options.steerings import RENAMED
from persona_lens.cli.runner import Job, Run, Session
from persona_lens.cli.settings import Fields, Given, Option, argument
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.analysis.method_effects import MethodEffects
    from persona_lens.vectors import PersonaVectors

QUESTIONS = Option("How many of each trait's held-out questions to ask; all are asked under every way to steer.")
Made = dict[str, list["PersonaVectors"]]


def methods_command(
    run: Annotated[Run, Fields(out=Option(shown="runs/methods-TRAITS-MODEL"))],
    extractions: Annotated[
        list[Path], argument("RUN...", "Run folder of an extraction, whose responses are used; one a trait.")
    ],
    given: Annotated[
        Given,
        Fields("persona_lens.analysis.method_effects:MethodSettings", without=("question_set",), questions=QUESTIONS),
    ],
    method: Annotated[list[str] | None, Option(metavar="NAME", shown="all that come with the package")] = None,
    vectors: Annotated[list[str] | None, Option(metavar="NAME=FILE")] = None,
) -> None:
    """Compare methods of making a direction, and prompting: what each detects, what it does, and what else it moves.

    Of each trait a direction is made by every method. Under steps of equal length along all of them, at one layer, the
    model answers the same held-out questions, beside the unsteered model, random directions of that length, and a
    system prompt that asks for the trait. Compared are the trait score, surprise, right answers to known questions, and
    the harmonic mean of the three; how well each direction tells the run's responses apart on questions it was not made
    from; and of several traits, what steering along one does to the scores of the others. `bench-steer` and `steer
    methods` are one command.

    Examples:
    `persona-lens bench-steer smollm2-135m runs/optimistic runs/impolite runs/sycophantic --layer 18 --questions 8`

    `persona-lens bench-steer smollm2-135m runs/optimistic --method difference --vectors mine=mine.safetensors`

    Args:
        method: How a direction is made; `vectors methods` lists all. Repeatable.
        vectors: Further vectors of one of the traits, however they were made, and what to call their method.
            Repeatable, for other traits under the same name.
    """
    from persona_lens.analysis.method_effects import compare_methods, compare_methods_work

    own, settings = options.open_by_trait(extractions), given.make()
    planned = _planned(own, method)
    more = _more(planned, own, vectors or ())  # what is wrong is said before anything is made
    if settings.layer is not None:
        for each in own.values():
            each.check_layer(settings.layer)
    compared = {**(planned if run.dry_run else _fitted(extractions, method)), **more}
    job = Job(
        lambda at: compare_methods(at.backend, compared, settings, runs=extractions, **at.given),
        _show,
        lambda at: compare_methods_work(at.backend, compared, settings, **at.asked),
        traits={trait: each.trait_definition for trait, each in own.items()},
        name=f"methods-{'-'.join(own)}",
        model=next(iter(own.values())).model.model,
    )
    run.carry_out(job)


def _more(planned: Made, own: Mapping[str, PersonaVectors], given: Sequence[str]) -> Made:
    """The methods of the vectors that were named beside those that are planned."""
    more: Made = {}
    for text in given:
        found = RENAMED.fullmatch(text)
        if found is None:
            raise PersonaLensError(f"--vectors takes NAME=FILE, such as mine=mine.safetensors; got {text!r}")
        name, each = found[1], options.open_vectors(Path(found[2]))
        if name in planned:
            raise PersonaLensError(f"--vectors {name}=… has the name of a method; give it another")
        if each.trait not in own:
            raise PersonaLensError(
                f"--vectors {text} is of {each.trait!r}, and the runs are of {', '.join(own)}; give its run too"
            )
        more.setdefault(name, []).append(each)
    return more


def _planned(own: Mapping[str, PersonaVectors], names: Sequence[str] | None) -> Made:
    """What stands for the vectors of each method where nothing is made: their number is what counts."""
    from persona_lens.vectors.methods import METHODS

    return {name: list(own.values()) for name in names or METHODS.built_in if METHODS.find(name)}


def _fitted(extractions: Sequence[Path], names: Sequence[str] | None) -> Made:
    """The vectors of each method; of those that nobody named, the ones that can be made."""
    from persona_lens.vectors.fit import fit_vectors
    from persona_lens.vectors.methods import METHODS, FitError
    from persona_lens.vectors.samples import read_samples

    found: Made = {}
    with showing_progress() as progress:
        for samples in map(read_samples, extractions):
            for name in dict.fromkeys(names or METHODS.built_in):
                try:
                    found.setdefault(name, []).append(fit_vectors(samples, name, progress=progress))
                except FitError as error:
                    if names:
                        raise
                    options.say_notes([f"{name} of {samples.vectors.trait} is left out: {error}"])
    return {name: made for name, made in found.items() if made}


SHOWN = {"nll": ("surprise", ".2f"), "coherence": ("coherence", ".1f"), "capability": ("right answers", ".2f")}


def _show(found: MethodEffects, _: Session) -> None:
    from persona_lens.reports.methods import rows_of, traits_of

    for trait in traits_of(found.summary):
        rows = list(rows_of(trait))
        measured = [name for name in SHOWN if any(row["means"][name] for row in rows)]
        heads = ("way", "strength", "score", "change", "minus random", *(SHOWN[name][0] for name in measured))
        title = f"Steering towards {trait['towards']} of {trait['trait']} at layer {trait['layer']} [95% interval]"
        print_table(title, (*heads, "harmonic, 0-2", "text holds"), [_row(row, measured) for row in rows])
    say("* clear: the change and its difference from that of random directions lie on the same side of 0")
    _show_detection(found.summary)
    if len(found.summary["traits"]) > 1:
        _show_entanglement(found.summary)


def _row(row: dict[str, Any], measured: Sequence[str]) -> tuple[str, ...]:
    change = row["changes"] and row["changes"]["score"]
    moved, apart = (interval_text(change[name]) if change and change[name] else "" for name in ("vector", "difference"))
    means = (interval_text(row["means"][name], SHOWN[name][1]) for name in measured)
    clear = "*" if change and change["clear"] else ""
    held = {None: "", True: "yes", False: "no"}[row.get("coherent")]
    score, mark = interval_text(row["means"]["score"], ".1f"), interval_text(row["harmonic"], ".2f")
    return (row["name"], _strength(row), score, moved + clear, apart, *means, mark, held)


def _strength(row: Mapping[str, Any]) -> str:
    return "" if row["strength"] is None else f"{row['strength']:g}"


def _show_detection(summary: Mapping[str, Any]) -> None:
    from persona_lens.reports.entanglement import detections

    columns, rows = detections(summary)
    if rows:
        shown = [(name, *(_auc(each) for each in found)) for name, found in rows]
        print_table("Detection: AUC on questions that the direction was not made from [95%]", ("way", *columns), shown)


def _auc(found: Mapping[str, Any] | None) -> str:
    if found is None or found["auc"] is None:
        return "-"
    ends = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['auc']:.2f}{ends}"


def _show_entanglement(summary: Mapping[str, Any]) -> None:
    from persona_lens.reports.entanglement import overall

    traits = list(summary["traits"])
    rows = []
    for way in overall(summary):
        on, off = (way[name] or dict.fromkeys(("vector", "difference")) for name in ("on", "off"))
        told = (on["vector"], off["vector"], off["difference"])
        ratios = (interval_text(way[name], ".2f") for name in ("entanglement", "random_entanglement"))
        rows.append(
            (way["name"], _strength(way), interval_text(way["harmonic"], ".2f"), *map(interval_text, told), *ratios)
        )
    heads = ("way", "strength", "harmonic, 0-2", "on target", "off target", "beyond random")
    title = f"Over {len(traits)} traits: change on target, root mean square change of the others, and their ratio [95%]"
    print_table(title, (*heads, "entanglement", "of random directions"), rows)
    cells = [
        (way["name"], _strength(way), trait, *(_cell(way["changes"][trait][judged]) for judged in traits))
        for way in summary["ways"]
        for trait in way["traits"]
    ]
    print_table("What steering along a trait changes of each score", ("way", "strength", "along", *traits), cells)


def _cell(change: Mapping[str, Any] | None) -> str:
    return "-" if change is None else f"{change['vector']['mean']:+.1f}{'*' if change['clear'] else ''}"

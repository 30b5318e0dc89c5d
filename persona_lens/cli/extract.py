"""``persona-lens extract``: a model and a trait become persona vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import options
from persona_lens.cli.display import print_table, say, show_rows
from persona_lens.cli.runner import Experiment, Run, Session
from persona_lens.cli.settings import Fields, Given, Option
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.extraction import ExtractionSettings
    from persona_lens.extraction.external import GivenRollouts
    from persona_lens.steering.preview import Preview
    from persona_lens.traits import Trait

SAMPLING = ("samples", "max_new_tokens", "temperature", "top_p")
SETTINGS = Fields(
    "persona_lens.extraction:ExtractionSettings",
    paired=Option(names=("--paired/--unpaired",)),
    sinks=Option(names=("--with-sinks",)),
)


def extract(
    context: typer.Context,
    run: Annotated[Run, Fields(out=Option(shown="runs/TRAIT-MODEL"))],
    trait: options.TraitName,
    given: Annotated[Given, SETTINGS],
    responses: Annotated[list[Path] | None, Option(metavar="FILE")] = None,
    allow_missing: bool = False,
    preview: options.Preview = False,
    traits_dir: options.TraitsDirs = None,
) -> None:
    """Extract a trait's persona vectors from a model.

    Stopped at any moment and started again with the same command, it goes on where it was.

    Examples:
    `persona-lens extract smollm2-135m optimistic`

    `persona-lens extract Qwen/Qwen2.5-7B-Instruct evil --samples 10 --max-new-tokens 1000 --out runs/evil
    --judge openai:gpt-4.1-mini --prices 0.4,1.6 --max-spend 5`

    `persona-lens extract Qwen/Qwen2.5-7B-Instruct evil --responses evil.parquet`

    Args:
        responses: Read these responses (JSONL, CSV or Parquet) instead of generating any. Repeatable.
        allow_missing: Go on if the responses lack some that the trait asks for.
    """
    from persona_lens.extraction import extraction_work, run_extraction

    _check_given(context)
    loaded = options.open_trait(trait, traits_dir or ())
    settings: ExtractionSettings = given.make()
    experiment = Experiment(
        lambda at: run_extraction(
            at.backend,
            loaded,
            at.kept,
            settings=settings,
            judge=at.judge,
            chat=at.chat,
            responses=at.read,
            progress=at.shown,
        ),
        lambda found, at: _show(found.summary, at.kept),
        lambda at: extraction_work(at.backend, loaded, settings, at.chat, at.judge, at.read),
        traits=loaded,
        name=loaded.name,
        previews=lambda at: _previews(at, loaded, settings),
        read=lambda at: _read_responses(at, loaded, responses, settings.questions, allow_missing),
    )
    run.carry_out(experiment, preview=preview)


def _check_given(context: typer.Context) -> None:
    """Refuse options that mean nothing beside the others."""
    given = [name for name in context.params if options.was_given(context, name)]
    if "responses" not in given:
        if "allow_missing" in given:
            raise PersonaLensError("--allow-missing says how to read responses from a file; name it with --responses")
        return
    wrong = [f"--{name.replace('_', '-')}" for name in SAMPLING if name in given]
    if wrong:
        raise PersonaLensError(
            f"{', '.join(wrong)}: with --responses nothing is generated, so this would do nothing; leave it out"
        )


def _read_responses(
    at: Session, trait: Trait, files: list[Path] | None, questions: int, allow_missing: bool
) -> GivenRollouts | None:
    """The responses that are given, with what is to be said of them on standard error."""
    if not files:
        return None
    from persona_lens.extraction.external import given_rollouts

    given = given_rollouts(at.backend, at.chat, trait, files, questions=questions, allow_missing=allow_missing)
    options.say_notes([*given.notes, *(["scores are those of the file; no judge runs"] if given.scores else [])])
    return given


def _previews(at: Session, trait: Trait, settings: ExtractionSettings) -> dict[str, Preview]:
    """What is read of the first prompt of each arm, with its response where it is there already."""
    from persona_lens.backend import Read
    from persona_lens.extraction.means import plan_requests
    from persona_lens.steering.preview import preview_tokens

    given: GivenRollouts | None = at.read
    requests = given.requests if given else plan_requests(trait, settings)
    first = {request.labels["arm"]: number for number, request in reversed(list(enumerate(requests)))}
    previews = {}
    for arm, number in sorted(first.items(), reverse=True):
        request = requests[number]
        prompt = given.prompts[number] if given else at.chat.encode(request.system, request.question)
        response = given.rollouts[number].response_ids if given else settings.rollouts.max_new_tokens
        title = f"{arm}, question {request.labels['question_number']}: {request.question}"
        previews[title] = preview_tokens(at.backend, prompt, response, reads=Read.means(sinks=settings.sinks))
    return previews


def _show(summary: dict[str, Any], folder: Path) -> None:
    scores, counts = summary["mean_score"], summary["counts"]
    kinds = sorted(next(iter(counts.values())), key=lambda name: name != "kept")
    print_table(
        f"{summary['trait']} in {summary['model']['model']}",
        ("arm", "responses kept", *(name.replace("_", " ") for name in kinds[1:]), "mean score"),
        [(arm, *(str(counts[arm][name]) for name in kinds), f"{scores[arm]:.1f}") for arm in counts],
    )
    best = sorted(summary["separation"], key=lambda row: -row["d_prime"])[:5]
    if best:
        show_rows(
            "Layers whose vector separates held-out questions best",
            best,
            {
                "layer": lambda row: row["layer"],
                "norm": (lambda row: summary["norms"]["response_mean"][row["layer"]], ".1f"),
                "d'": (lambda row: row["d_prime"], ".2f"),
                "AUC": (lambda row: row["auc"], ".3f"),
                "d' and AUC that 19 of 20 random directions stay below": (
                    lambda row: f"{row['random_d_prime']:.2f}, {row['random_auc']:.3f}"
                ),
                "better": lambda row: row["better"],
            },
        )
    else:
        say("too few responses were kept to hold questions out, so the separation by layer is not shown", err=True)
    say(f"vectors: {folder / 'vectors.safetensors'}")

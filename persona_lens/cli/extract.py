"""``persona-lens extract``: a model and a trait become persona vectors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import judges, options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.previews import PreviewOption, check_one_look_ahead, show_previews
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.extraction import ExtractionSettings
    from persona_lens.extraction.external import GivenRollouts
    from persona_lens.models import ChatFormat
    from persona_lens.steering.preview import Preview
    from persona_lens.traits import Trait

SAMPLING = ("samples", "max_new_tokens", "temperature", "top_p")


@grouped
def extract(
    context: typer.Context,
    model: options.Model,
    trait: Annotated[str, typer.Argument(metavar="TRAIT", help="A trait's name, or the path of its YAML file.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder; runs/TRAIT-MODEL by default.", show_default=False)
    ] = None,
    responses: Annotated[
        list[Path] | None,
        typer.Option(
            "--responses",
            metavar="FILE",
            help="Read these responses (JSONL, CSV or Parquet) instead of generating any. Repeatable.",
            show_default=False,
        ),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Go on if the responses lack some that the trait asks for.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Responses for each question and instruction; the paper takes 10.")] = 1,
    questions: Annotated[int, typer.Option(help="How many of the trait's 20 extraction questions to use.")] = 20,
    max_new_tokens: options.MaxNewTokens = 48,
    temperature: options.Temperature = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.")] = 1.0,
    threshold: Annotated[
        float, typer.Option(help="Positive responses score at least this, negative ones less.")
    ] = 50.0,
    coherence: Annotated[
        float, typer.Option(help="A response's coherence at least, where the judge or the file gives one.")
    ] = 50.0,
    unpaired: Annotated[bool, typer.Option("--unpaired", help="Filter each arm on its own.")] = False,
    with_sinks: Annotated[
        bool, typer.Option("--with-sinks", help="Take attention sinks, as the first token, into the prompt mean.")
    ] = False,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    dry_run: options.DryRun = False,
    preview: PreviewOption = False,
    judge: judges.JudgeName = "likelihood",
    traits_dir: options.TraitsDirs = None,
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
    judging: judges.JudgeOptions,
) -> None:
    """Extract a trait's persona vectors from a model.

    Stopped at any moment and started again with the same command, it goes on where it was.

    Examples:
    `persona-lens extract smollm2-135m optimistic`

    `persona-lens extract Qwen/Qwen2.5-7B-Instruct evil --samples 10 --max-new-tokens 1000 --out runs/evil
    --judge openai:gpt-4.1-mini --prices 0.4,1.6 --max-spend 5`

    `persona-lens extract Qwen/Qwen2.5-7B-Instruct evil --responses evil.parquet`
    """
    from persona_lens.cli.display import showing_progress
    from persona_lens.extraction import ExtractionSettings, extraction_work, run_extraction
    from persona_lens.runs.rollouts import RolloutSettings

    _check_given(context)
    check_one_look_ahead(preview, dry_run)
    loaded = options.open_trait(trait, traits_dir or ())
    settings = ExtractionSettings(
        samples=samples,
        questions=questions,
        seed=seed,
        threshold=threshold,
        coherence=coherence,
        paired=not unpaired,
        sinks=with_sinks,
        rollouts=RolloutSettings(max_new_tokens, temperature, top_p, batch_size),
    )
    opened = opening.open(model, offline=dry_run or preview)
    folder = out or options.run_folder(loaded.name, opened.info.model)
    chat = opening.chat(opened)
    given = _read_responses(opened, chat, loaded, responses, questions, allow_missing)
    if preview:
        show_previews(_previews(opened, loaded, settings, chat, given), as_json)
        return
    scoring = judging.open(judge, loaded, opened, chat, opening.dtype, opening.device)
    work = partial(extraction_work, opened, loaded, settings, chat, scoring, given)
    if options.planned(work, opening, dry_run, as_json):
        return
    with judges.saying_spending(scoring), showing_progress() as progress:
        found = run_extraction(
            opened, loaded, folder, settings=settings, judge=scoring, chat=chat, responses=given, progress=progress
        )
    summary = found.summary
    options.say_traffic(opened)
    if as_json:
        say_json({"folder": str(folder), **summary})
    else:
        _show(summary, folder)


def _check_given(context: typer.Context) -> None:
    """Refuse options that mean nothing beside the others."""
    given = [name for name in context.params if _is_given(context, name)]
    if "responses" not in given:
        if "allow_missing" in given:
            raise PersonaLensError("--allow-missing says how to read responses from a file; name it with --responses")
        return
    wrong = [f"--{name.replace('_', '-')}" for name in SAMPLING if name in given]
    if wrong:
        raise PersonaLensError(
            f"{', '.join(wrong)}: with --responses nothing is generated, so this would do nothing; leave it out"
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _read_responses(
    backend: Backend, chat: ChatFormat, trait: Trait, files: list[Path] | None, questions: int, allow_missing: bool
) -> GivenRollouts | None:
    """The responses that are given, with what is to be said of them on standard error."""
    if not files:
        return None
    from persona_lens.extraction.external import given_rollouts

    given = given_rollouts(backend, chat, trait, files, questions=questions, allow_missing=allow_missing)
    for note in given.notes:
        say(f"note: {note}", err=True)
    if given.scores:
        say("note: scores are those of the file; no judge runs", err=True)
    return given


def _previews(
    backend: Backend, trait: Trait, settings: ExtractionSettings, chat: ChatFormat, given: GivenRollouts | None
) -> dict[str, Preview]:
    """What is read of the first prompt of each arm, with its response where it is there already."""
    from persona_lens.backend import Read
    from persona_lens.extraction.means import plan_requests
    from persona_lens.steering.preview import preview_tokens

    requests = given.requests if given else plan_requests(trait, settings)
    first = {request.labels["arm"]: number for number, request in reversed(list(enumerate(requests)))}
    previews = {}
    for arm, number in sorted(first.items(), reverse=True):
        request = requests[number]
        prompt = given.prompts[number] if given else chat.encode(request.system, request.question)
        response = given.rollouts[number].response_ids if given else settings.rollouts.max_new_tokens
        title = f"{arm}, question {request.labels['question_number']}: {request.question}"
        previews[title] = preview_tokens(backend, prompt, response, reads=Read.means(sinks=settings.sinks))
    return previews


def _show(summary: dict[str, Any], folder: Path) -> None:
    from persona_lens.cli.display import print_table

    scores, counts = summary["mean_score"], summary["counts"]
    lost = [name for name in next(iter(counts.values())) if name != "kept"]
    print_table(
        f"{summary['trait']} in {summary['model']['model']}",
        ("arm", "responses kept", *(name.replace("_", " ") for name in lost), "mean score"),
        [
            (
                arm,
                *(str(counts[arm][name]) for name in ("kept", *lost)),
                f"{scores[arm]:.1f}",
            )
            for arm in counts
        ],
    )
    best = sorted(summary["separation"], key=lambda row: -row["d_prime"])[:5]
    if best:
        print_table(
            "Layers whose vector separates held-out questions best",
            ("layer", "norm", "d'", "AUC", "d' and AUC that 19 of 20 random directions stay below", "better"),
            [
                (
                    str(row["layer"]),
                    f"{summary['norms']['response_mean'][row['layer']]:.1f}",
                    f"{row['d_prime']:.2f}",
                    f"{row['auc']:.3f}",
                    f"{row['random_d_prime']:.2f}, {row['random_auc']:.3f}",
                    "yes" if row["better"] else "no",
                )
                for row in best
            ],
        )
    else:
        say("too few responses were kept to hold questions out, so the separation by layer is not shown", err=True)
    say(f"vectors: {folder / 'vectors.safetensors'}")

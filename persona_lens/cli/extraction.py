"""``persona-lens extract``, ``responses`` and ``demo``: a model and a trait become persona vectors."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import options
from persona_lens.cli.display import (
    Column,
    interval_text,
    print_table,
    quiet_libraries,
    say,
    say_json,
    show_rows,
    showing_progress,
)
from persona_lens.cli.options import judges
from persona_lens.cli.runner import Job, Run, Session, deliver, show_work
from persona_lens.cli.settings import Fields, Given, Option
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.extraction import ExtractionSettings
    from persona_lens.extraction.external import ExternalRollouts
    from persona_lens.extraction.responses import Generated
    from persona_lens.models.server import CompletionServer
    from persona_lens.runs.cost import Work
    from persona_lens.runs.rollouts import Request
    from persona_lens.runs.settings import RolloutSettings
    from persona_lens.steering.preview import Preview
    from persona_lens.traits import Trait


SAMPLING = ("samples", "max_new_tokens", "temperature", "top_p", "thinking_budget")
EXTRACT_SETTINGS = Fields(
    "persona_lens.extraction:ExtractionSettings",
    paired=Option(names=("--paired/--unpaired",)),
    sinks=Option(names=("--with-sinks",)),
)


def extract(
    context: typer.Context,
    run: Annotated[Run, Fields(out=Option(shown="runs/TRAIT-MODEL"))],
    trait: options.TraitName,
    given: Annotated[Given, EXTRACT_SETTINGS],
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
    from persona_lens.extraction import extract, extraction_work
    from persona_lens.extraction.external import external_rollouts

    _check_given(context)
    loaded = options.open_trait(trait, traits_dir)
    settings = given.make()

    def read(at: Session) -> ExternalRollouts | None:
        if not responses:
            return None
        asked = {"questions": settings.questions, "allow_missing": allow_missing}
        found = external_rollouts(at.backend, at.chat, loaded, responses, **asked)
        options.say_notes([*found.notes, *(["scores are those of the file; no judge runs"] if found.scores else [])])
        return found

    job = Job(
        lambda at: extract(at.backend, loaded, settings=settings, responses=at.read, **at.given),
        lambda found, at: _show(found.summary, at.kept),
        lambda at: extraction_work(at.backend, loaded, settings, given=at.read, **at.asked),
        traits=loaded,
        name=loaded.name,
        previews=lambda at: _previews(at, loaded, settings),
        read=read,
    )
    run.carry_out(job, preview=preview)


def _previews(at: Session, trait: Trait, settings: ExtractionSettings) -> dict[str, Preview]:
    """What is read of the first prompt of each arm, with its response where it is there already."""
    from persona_lens.extraction import plan_requests
    from persona_lens.extraction.run import means_read
    from persona_lens.steering.preview import preview_tokens

    found: ExternalRollouts | None = at.read
    requests = found.requests if found else plan_requests(trait, settings)
    first = {request.labels["arm"]: number for number, request in reversed(list(enumerate(requests)))}
    previewed = {}
    for arm, number in sorted(first.items(), reverse=True):
        request = requests[number]
        prompt = found.prompts[number] if found else at.chat.encode(request.system, request.question)
        response = found.rollouts[number].response_ids if found else settings.rollouts.max_new_tokens
        title = f"{arm}, question {request.labels['question_number']}: {request.question}"
        previewed[title] = preview_tokens(at.backend, prompt, response, reads=means_read(at.chat, settings))
    return previewed


def _check_given(context: typer.Context) -> None:
    """Refuse options that mean nothing beside the others."""
    given = [name for name in context.params if options.was_given(context, name)]
    if "judge_pairs" in given and (judge := context.params["judge"]) != judges.LIKELIHOOD:
        raise PersonaLensError(f"--judge-pairs is for the likelihood judge, and this is {judge!r}; leave it out")
    if "responses" not in given:
        if "allow_missing" in given:
            raise PersonaLensError("--allow-missing says how to read responses from a file; name it with --responses")
        return
    wrong = [f"--{name.replace('_', '-')}" for name in SAMPLING if name in given]
    if wrong:
        raise PersonaLensError(
            f"{', '.join(wrong)}: with --responses nothing is generated, so this would do nothing; leave it out"
        )


def _show(summary: dict[str, Any], folder: Path) -> None:
    scores, counts, norms = (summary[name] for name in ("mean_score", "counts", "norms"))
    kinds = sorted(next(iter(counts.values())), key=lambda name: name != "kept")
    print_table(
        f"{summary['trait']} in {summary['model']['model']}",
        ("arm", "responses kept", *(name.replace("_", " ") for name in kinds[1:]), "mean score"),
        [(arm, *(str(counts[arm][name]) for name in kinds), f"{scores[arm]:.1f}") for arm in counts],
    )
    say_thinking(summary, "unless another --reduction is named, the vectors are those of its answers")
    show_separation(summary["separation"], norms.get("answer_mean", norms["response_mean"]))
    say(f"vectors: {folder / 'vectors.safetensors'}")


def say_thinking(summary: dict[str, Any], what: str) -> None:
    """Say of vectors that they are of the answers of a model that thinks before it answers, if they are."""
    if (thinking := summary.get("thinking")) is not None:
        left = thinking["responses_without_answer"]
        unanswered = f"; {counted(left, 'response')} came to no answer and {'is' if left == 1 else 'are'} left out"
        say(f"the model thinks before it answers: {what} ({thinking['default_reduction']}){unanswered if left else ''}")


def show_separation(
    rows: Sequence[dict[str, Any]], norms: Sequence[float], more: Mapping[str, Column[dict[str, Any]]] | None = None
) -> None:
    """The layers whose vector separates held-out questions best, with more columns if wanted."""
    best = sorted(rows, key=lambda row: -row["d_prime"])[:5]
    if not best:
        say("too few responses were kept to hold questions out, so the separation by layer is not shown", err=True)
        return
    columns: Mapping[str, Column[dict[str, Any]]] = {
        "layer": "layer",
        "norm": (lambda row: norms[row["layer"]], ".1f"),
        "d'": ("d_prime", ".2f"),
        "AUC": ("auc", ".3f"),
        "d' and AUC that 19 of 20 random directions stay below": (
            lambda row: f"{row['random_d_prime']:.2f}, {row['random_auc']:.3f}"
        ),
        "better": "better",
        **(more or {}),
    }
    show_rows("Layers whose vector separates held-out questions best", best, columns)


ALL_QUESTIONS = 20  # what `extract` takes by itself
RESPONSES_SETTINGS = Fields(
    "persona_lens.extraction:ExtractionSettings",
    without=("threshold", "coherence", "paired", "sinks", "batch_size", "batch_tokens"),
)


def responses(
    trait: options.TraitName,
    server_model: Annotated[str, Option(metavar="NAME")],
    out: Annotated[Path, Option("Where to write; never overwritten.", metavar="FILE.jsonl")],
    given: Annotated[Given, RESPONSES_SETTINGS],
    server_url: Annotated[str | None, Option(judges.SERVER_URL)] = None,
    server_key: judges.ServerKey = None,
    at_once: Annotated[int | None, Option("Requests under way at the same time.", shown="16")] = None,
    rate: judges.Rate = None,
    timeout: float = 300.0,
    prices: judges.Prices = None,
    max_spend: float | None = None,
    dry_run: options.DryRun = False,
    traits_dir: options.TraitsDirs = None,
    as_json: options.AsJson = False,
) -> None:
    """Have an OpenAI-compatible server generate a trait's responses, for `extract --responses`.

    Take the same weights there as in the extraction. Stopped at any moment and started again with the same command, it
    goes on where it was, and asks for nothing twice.

    Example: `persona-lens responses evil --server-model Qwen/Qwen2.5-7B-Instruct --server-url http://127.0.0.1:8000/v1
    --samples 10 --max-new-tokens 1000 --at-once 256 --out evil.jsonl`

    Args:
        server_model: The model, as the server names it.
        timeout: Seconds that one response may take.
        max_spend: Stop before the responses cost more dollars.
    """
    from persona_lens.extraction import plan_requests
    from persona_lens.extraction.responses import generate_responses

    settings = given.make()
    loaded = options.open_trait(trait, traits_dir)
    requests = plan_requests(loaded, settings)
    server = judges.open_server(
        server_model,
        server_url,
        server_key,
        at_once,
        rate,
        prices,
        max_spend,
        rate_option="--rate",
        timeout=timeout,
    )
    if dry_run:
        show_work([_planned(server, requests, settings.rollouts)], as_json, asked="requests")
        return
    try:
        with showing_progress() as progress:
            made = generate_responses(server, requests, settings.rollouts, out, progress=progress)
    finally:
        judges.say_usage(server, "server")
    _say_gaps(made)

    told = (
        f"{counted(made.rows, 'response')}: {out}\n"
        f"read them:  {_reading(trait, out, settings.questions, traits_dir or ())}\n"
        f"MODEL is the model that the server calls {server_model}: its hub id, or a folder with its weights"
    )
    deliver({"file": str(out), **asdict(made), "cost": server.spending.cost}, lambda: say(told), as_json)


def _planned(server: CompletionServer, requests: Sequence[Request], settings: RolloutSettings) -> Work:
    """What a server would be asked at most."""
    from persona_lens.extraction.responses import planned_usage
    from persona_lens.runs.cost import Work

    usage, charged = planned_usage(requests, settings), server.spending.prices
    cost = charged.cost(usage) if charged else None
    return Work("generating", usage.requests, len(requests), usage.tokens, cost=cost)


def _say_gaps(made: Generated) -> None:
    """Say on standard error which responses have no text, and why."""
    refused = (
        f"the server refused {made.refused:,} of {counted(made.rows, 'request')}, which count as responses without a "
        f"score; the first: {made.reason}"
    )
    empty = (
        f"{made.empty:,} of {made.rows:,} responses are empty; a model that reasons first needs more --max-new-tokens"
    )
    options.say_notes([*([refused] if made.refused else []), *([empty] if made.empty else [])])


def _reading(trait: str, out: Path, questions: int, traits_dirs: Sequence[Path]) -> str:
    """The command that reads the file."""
    words = ["persona-lens", "extract", "MODEL", trait, "--responses", str(out)]
    words += ["--questions", str(questions)] if questions != ALL_QUESTIONS else []
    words += [word for folder in traits_dirs for word in ("--traits-dir", str(folder))]
    return shlex.join(words)


def demo(
    out: Annotated[Path | None, Option("Folder for all results; kept and resumed.", shown="demo-run")] = None,
    seed: options.Seed = 0,
    quick: Annotated[bool, Option("A smaller one, of one or two minutes; folder demo-quick.")] = False,
    open_report: Annotated[bool, Option("Open the report in the browser.", names=("--open",))] = False,
    backend: Annotated[str, Option("Library to run the model through; see backends list.")] = "transformers",
    as_json: options.AsJson = False,
) -> None:
    """Show a persona vector at work: extract "optimistic" from the embedded model, steer with it, write a report.

    Takes some minutes on two cores. Stopped and started again, it goes on where it was.

    Examples:
    `persona-lens demo --out demo-run`

    `persona-lens demo --quick --open`
    """
    with showing_progress() as progress:
        progress(0, 1, "loading libraries")
        from persona_lens.analysis.demo import QUICK, DemoSettings, run_demo
        from persona_lens.models import resolve

        quiet_libraries()
        progress(1, 1, "loading libraries")
    settings = replace(QUICK if quick else DemoSettings(), seed=seed, backend=backend)
    with showing_progress(of_bytes=True) as progress:
        resolve(settings.model, progress=progress)
    out = out or Path("demo-quick" if quick else "demo-run")
    with showing_progress() as progress:
        result = run_demo(out, settings, progress)
    summary = result.summary
    if as_json:
        say_json(summary)
    else:
        found = summary["steering"]["effect"]
        moved, null = (interval_text(found[which], ".1f") for which in ("vector", "random"))
        say(
            f"Steering along {summary['trait']['name']!r} at layer {found['layer']} of {summary['model']['model']}, "
            f"from {found['low']:+g} to {found['high']:+g}, moves the score by {moved}; random directions of the same "
            f"norm: {null}."
        )
        say(result.verdict)
        if summary["quick"]:
            say(f"This was the quick demonstration: {summary['quick']}. Without --quick the whole one runs.")
        say(f"report: {out / 'report.html'}")
    if open_report:
        _open(out / "report.html")


def _open(page: Path) -> None:
    """Show a page in the browser, if there is one."""
    import webbrowser

    try:
        shown = webbrowser.open(page.resolve().as_uri())
    except webbrowser.Error:
        shown = False
    if not shown:
        say("there is no browser here to open the report in", err=True)

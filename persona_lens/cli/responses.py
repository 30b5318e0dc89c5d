"""``persona-lens responses``: a server generates what ``extract --responses`` reads."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli import judges, options
from persona_lens.cli.display import say, say_json
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.extraction.external import Generated
    from persona_lens.models.server import CompletionServer
    from persona_lens.runs.rollouts import Request, RolloutSettings

ALL_QUESTIONS = 20  # what `extract` takes by itself


def responses(
    trait: Annotated[str, typer.Argument(metavar="TRAIT", help="A trait's name, or the path of its YAML file.")],
    server_model: Annotated[
        str, typer.Option("--server-model", metavar="NAME", help="The model, as the server names it.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.jsonl", help="Where to write; never overwritten.", show_default=False)
    ],
    server_url: Annotated[
        str | None,
        typer.Option(
            "--server-url", help="The server's address up to `/v1`; or set OPENAI_BASE_URL.", show_default=False
        ),
    ] = None,
    server_key: Annotated[
        str | None,
        typer.Option(
            "--server-key",
            metavar="VARIABLE",
            help="Environment variable with the key.",
            show_default="OPENAI_API_KEY",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Responses for each question and instruction; the paper takes 10.")] = 1,
    questions: Annotated[
        int, typer.Option(help="How many of the trait's 20 extraction questions to use.")
    ] = ALL_QUESTIONS,
    max_new_tokens: options.MaxNewTokens = 48,
    temperature: options.Temperature = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.")] = 1.0,
    seed: options.Seed = 0,
    at_once: Annotated[
        int | None, typer.Option("--at-once", help="Requests under way at the same time.", show_default="16")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", metavar="REQUESTS[,TOKENS]", help="At most so many a minute.", show_default=False),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that one response may take.")] = 300.0,
    prices: judges.PricesOption = None,
    max_spend: Annotated[
        float | None,
        typer.Option("--max-spend", help="Stop before the responses cost more dollars.", show_default=False),
    ] = None,
    dry_run: options.DryRun = False,
    traits_dir: options.TraitsDirs = None,
    as_json: options.AsJson = False,
) -> None:
    """Have an OpenAI-compatible server generate a trait's responses, for `extract --responses`.

    Take the same weights there as in the extraction. Stopped at any moment and started again with the same command, it
    goes on where it was, and asks for nothing twice.

    Example: `persona-lens responses evil --server-model Qwen/Qwen2.5-7B-Instruct --server-url http://127.0.0.1:8000/v1
    --samples 10 --max-new-tokens 1000 --at-once 256 --out evil.jsonl`
    """
    from persona_lens.cli.display import showing_progress
    from persona_lens.extraction import ExtractionSettings, plan_requests
    from persona_lens.extraction.external import generate_responses
    from persona_lens.runs.rollouts import RolloutSettings

    loaded = options.open_trait(trait, traits_dir or ())
    sampling = RolloutSettings(max_new_tokens, temperature, top_p)
    requests = plan_requests(
        loaded, ExtractionSettings(samples=samples, questions=questions, seed=seed, rollouts=sampling)
    )
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
        _show_plan(server, requests, sampling, as_json)
        return
    try:
        with showing_progress() as progress:
            made = generate_responses(server, requests, sampling, out, progress=progress)
    finally:
        judges.say_usage(server, "server")
    _say_gaps(made)
    if as_json:
        say_json({"file": str(out), **asdict(made), "cost": server.spending.cost})
    else:
        say(
            f"{counted(made.rows, 'response')}: {out}\n"
            f"read them:  {_reading(trait, out, questions, traits_dir or ())}\n"
            f"MODEL is the model that the server calls {server_model}: its hub id, or a folder with its weights"
        )


def _show_plan(server: CompletionServer, requests: Sequence[Request], settings: RolloutSettings, as_json: bool) -> None:
    from persona_lens.extraction.external import planned_usage
    from persona_lens.runs.cost import Work

    usage, prices = planned_usage(requests, settings), server.spending.prices
    work = Work("generating", usage.requests, len(requests), usage.tokens, cost=prices.cost(usage) if prices else None)
    options.show_work([work], as_json, asked="requests")


def _say_gaps(made: Generated) -> None:
    """Say on standard error which responses have no text, and why."""
    if made.refused:
        say(
            f"note: the server refused {made.refused:,} of {counted(made.rows, 'request')}, which count as responses "
            f"without a score; the first: {made.reason}",
            err=True,
        )
    if made.empty:
        say(
            f"note: {made.empty:,} of {made.rows:,} responses are empty; a model that reasons first needs more "
            "--max-new-tokens",
            err=True,
        )


def _reading(trait: str, out: Path, questions: int, traits_dirs: Sequence[Path]) -> str:
    """The command that reads the file."""
    words = ["persona-lens", "extract", "MODEL", trait, "--responses", str(out)]
    words += ["--questions", str(questions)] if questions != ALL_QUESTIONS else []
    words += [word for folder in traits_dirs for word in ("--traits-dir", str(folder))]
    return shlex.join(words)

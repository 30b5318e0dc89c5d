"""``persona-lens responses``: a server generates what ``extract --responses`` reads."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from persona_lens.cli import judges, options
from persona_lens.cli.display import say, showing_progress
from persona_lens.cli.runner import deliver, show_work
from persona_lens.cli.settings import Fields, Given, Option
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.extraction import ExtractionSettings
    from persona_lens.extraction.external import Generated
    from persona_lens.models.server import CompletionServer
    from persona_lens.runs.rollouts import Request, RolloutSettings

ALL_QUESTIONS = 20  # what `extract` takes by itself
SETTINGS = Fields(
    "persona_lens.extraction:ExtractionSettings",
    without=("threshold", "coherence", "paired", "sinks", "batch_size", "batch_tokens"),
)


def responses(
    trait: options.TraitName,
    server_model: Annotated[str, Option(metavar="NAME")],
    out: Annotated[Path, Option("Where to write; never overwritten.", metavar="FILE.jsonl")],
    given: Annotated[Given, SETTINGS],
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
    from persona_lens.extraction.external import generate_responses

    settings: ExtractionSettings = given.make()
    sampling = settings.rollouts
    loaded = options.open_trait(trait, traits_dir or ())
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
        _show_plan(server, requests, sampling, as_json)
        return
    try:
        with showing_progress() as progress:
            made = generate_responses(server, requests, sampling, out, progress=progress)
    finally:
        judges.say_usage(server, "server")
    _say_gaps(made)

    def show() -> None:
        say(
            f"{counted(made.rows, 'response')}: {out}\n"
            f"read them:  {_reading(trait, out, settings.questions, traits_dir or ())}\n"
            f"MODEL is the model that the server calls {server_model}: its hub id, or a folder with its weights"
        )

    deliver({"file": str(out), **asdict(made), "cost": server.spending.cost}, show, as_json)


def _show_plan(server: CompletionServer, requests: Sequence[Request], settings: RolloutSettings, as_json: bool) -> None:
    from persona_lens.extraction.external import planned_usage
    from persona_lens.runs.cost import Work

    usage, prices = planned_usage(requests, settings), server.spending.prices
    work = Work("generating", usage.requests, len(requests), usage.tokens, cost=prices.cost(usage) if prices else None)
    show_work([work], as_json, asked="requests")


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

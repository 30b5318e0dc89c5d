"""`generate_responses`: planned requests, answered by an OpenAI-compatible server, as a file of responses."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from persona_lens.core.documents import json_lines
from persona_lens.core.files import make_folder, named, write_bytes
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.means import ExtractionError
from persona_lens.models.server import Completion, CompletionRequest, CompletionServer, Refused, Usage
from persona_lens.runs.rollouts import Request, RolloutSettings

SUFFIXES = (".jsonl", ".ndjson")
SEEDS = 2**31  # servers keep a seed as a signed number of 32 or 64 bits


@dataclass(frozen=True)
class Generated:
    """What a server generated.

    Attributes:
        rows: Rows of the file, one for each request.
        refused: How many of them the server would not answer.
        empty: How many of its answers have no text.
        reason: Why it would not answer, of the first that it refused; None where it refused none.
        usage: Tokens of all answers, those from the cache included.
    """

    rows: int
    refused: int
    empty: int
    reason: str | None
    usage: Usage


def generate_responses(
    server: CompletionServer,
    requests: Sequence[Request],
    settings: RolloutSettings,
    out: Path | str,
    *,
    progress: Progress = shown_progress,
) -> Generated:
    """Have a server answer an extraction's requests, and write the answers as a file that the extraction reads.

    The file appears whole, at the end. Work that was stopped goes on from the server's cache. Where the file is there
    already, nothing is asked: either it holds these responses, or it is left alone with an error.

    A response is the ``content`` of the server's message. Reasoning that the server sets apart is no part of it;
    reasoning that stands there as ``<think>…</think>`` stays. A request that the server refuses becomes a row with an
    empty response and the column ``reason``; an extraction counts it as a response without a score.

    Args:
        server: Who answers, with its cache and its spending limit.
        requests: What to ask, as `persona_lens.extraction.plan_requests` plans it.
        settings: Length limit, temperature and nucleus are used.
        out: A JSONL file with one row for each request, in their order: the request's labels, ``system``, ``question``,
            ``response``, and ``ended`` (null where the server does not say).
        progress: Told how many requests are answered.

    Raises:
        ExtractionError: If the file cannot be written or holds something else, or the server refuses every request.
        ServerError: If the server cannot be reached or used, or fails again and again.
        SpendingLimitError: If the limit is reached.
    """
    out = Path(out)
    if out.suffix.lower() not in SUFFIXES:
        raise ExtractionError(f"responses are written as JSONL, so the file's name must end in .jsonl; got {out}")
    if not requests:
        raise ExtractionError("there is nothing to generate: no requests are given")
    asked = [_asked(request, settings) for request in requests]
    with named(out, ExtractionError, "used"):
        earlier = out.read_bytes() if out.exists() else None
    if earlier is not None:
        answers = _known(server, asked, earlier, out)
    else:
        _check_place(out)
        done = count(1)
        answers = server.complete(asked, lambda index, answer: progress(next(done), len(asked), "generating"))
    rows = list(map(_row, requests, answers))
    reasons = [row["reason"] for row in rows if "reason" in row]
    if len(reasons) == len(rows):
        raise ExtractionError(f"the server answered none of {len(rows):,} requests: {reasons[0]}")
    content = json_lines(rows)
    if content != earlier:
        if out.exists():  # it was there with something else, or has come meanwhile
            raise _other(out)
        write_bytes(out, content, new=True, failed=ExtractionError)
    completed = [answer for answer in answers if isinstance(answer, Completion)]
    empty = sum(not each.text.strip() for each in completed)
    used = sum((each.usage for each in completed), Usage())
    return Generated(len(rows), len(reasons), empty, reasons[0] if reasons else None, used)


def planned_usage(requests: Sequence[Request], settings: RolloutSettings) -> Usage:
    """About what `generate_responses` would use at most, if nothing were in the cache; nothing is asked."""
    return sum((_asked(request, settings).tokens() for request in requests), Usage())


def _asked(request: Request, settings: RolloutSettings) -> CompletionRequest:
    system = (("system", request.system),) if request.system is not None else ()
    return CompletionRequest(
        (*system, ("user", request.question)),
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        request.seed % SEEDS,
        firm=True,
    )


def _row(request: Request, answer: Completion | Refused) -> dict[str, Any]:
    row = {**request.labels, "system": request.system, "question": request.question}
    if isinstance(answer, Refused):
        reason = answer.reason.encode("utf-8", "replace").decode()  # half a character fits into no file
        return {**row, "response": "", "ended": None, "reason": reason}
    return {**row, "response": answer.text, "ended": answer.finished}


def _other(out: Path) -> ExtractionError:
    return ExtractionError(
        f"{out} is there already and does not hold these responses, or they are no longer in the cache; it stays as it "
        "is. Choose another file, or remove it"
    )


def _check_place(out: Path) -> None:
    """Find out that the file cannot be written before anything is paid for."""
    make_folder(out.parent, ExtractionError)
    with named(out, ExtractionError), tempfile.TemporaryFile(dir=out.parent):
        pass


class _RefusedRow(BaseModel):
    reason: str


def _known(
    server: CompletionServer, asked: Sequence[CompletionRequest], content: bytes, out: Path
) -> list[Completion | Refused]:
    """The answers that are paid for, and the refusals that the file tells of.

    Raises:
        ExtractionError: If there are others, so that the file cannot hold them.
    """
    lines = content.split(b"\n")[:-1]
    if len(lines) != len(asked):
        raise _other(out)
    answers: list[Completion | Refused] = []
    for request, line in zip(asked, lines, strict=True):
        found: Completion | Refused | None = server.cache.get(request.key(server.settings.model, server.settings.shown))
        if found is None:
            try:
                found = Refused(_RefusedRow.model_validate_json(line).reason)
            except ValidationError:
                raise _other(out) from None
        answers.append(found)
    completed = [request for request, answer in zip(asked, answers, strict=True) if isinstance(answer, Completion)]
    server.complete(completed)  # all from the cache, and counted as such
    return answers

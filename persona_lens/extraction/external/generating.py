"""`generate_responses`: planned requests, answered by an OpenAI-compatible server, as a file of responses."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lens.core.documents import json_lines
from persona_lens.core.files import write_bytes
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
    earlier = _content(out)
    if earlier is None:
        _check_folder(out)
        answers = _answers(server, asked, progress)
    else:
        answers = _known(server, asked, earlier, out)
    rows = [_row(request, answer) for request, answer in zip(requests, answers, strict=True)]
    reasons = [row["reason"] for row in rows if "reason" in row]
    if len(reasons) == len(rows):
        raise ExtractionError(f"the server answered none of {len(rows):,} requests: {reasons[0]}")
    content = json_lines(rows)
    if earlier is None:
        _write(out, content)
    elif content != earlier:
        raise _other(out)
    completions = [answer for answer in answers if isinstance(answer, Completion)]
    return Generated(
        rows=len(rows),
        refused=len(reasons),
        empty=sum(not completion.text.strip() for completion in completions),
        reason=reasons[0] if reasons else None,
        usage=sum((completion.usage for completion in completions), Usage()),
    )


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


def _answers(
    server: CompletionServer, asked: Sequence[CompletionRequest], progress: Progress
) -> list[Completion | Refused]:
    answered = 0

    def count(index: int, answer: Completion | Refused) -> None:
        nonlocal answered
        answered += 1
        progress(answered, len(asked), "generating")

    return server.complete(asked, count)


def _row(request: Request, answer: Completion | Refused) -> dict[str, Any]:
    row = {**request.labels, "system": request.system, "question": request.question}
    if isinstance(answer, Refused):
        reason = answer.reason.encode("utf-8", "replace").decode()  # half a character fits into no file
        return {**row, "response": "", "ended": None, "reason": reason}
    return {**row, "response": answer.text, "ended": answer.finished}


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
        found = server.cache.get(request.key(server.settings.model, server.settings.shown))
        answers.append(found or _refusal(line, out))
    completed = [request for request, answer in zip(asked, answers, strict=True) if isinstance(answer, Completion)]
    server.complete(completed)  # all from the cache, and counted as such
    return answers


def _refusal(line: bytes, out: Path) -> Refused:
    try:
        reason = json.loads(line)["reason"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _other(out) from None
    if not isinstance(reason, str):
        raise _other(out)
    return Refused(reason)


def _other(out: Path) -> ExtractionError:
    return ExtractionError(
        f"{out} is there already and does not hold these responses, or they are no longer in the cache; it stays as it "
        "is. Choose another file, or remove it"
    )


def _content(out: Path) -> bytes | None:
    try:
        return out.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ExtractionError(f"{out} cannot be used: {error.strerror or error}; choose another file") from error


def _check_folder(out: Path) -> None:
    """Find out that the file cannot be written before anything is paid for."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise _unwritable(out, error) from error


def _write(out: Path, content: bytes) -> None:
    if out.exists():  # which it was not when the work began
        raise _other(out)
    write_bytes(out, content, new=True, failed=ExtractionError)


def _unwritable(out: Path, error: OSError) -> ExtractionError:
    return ExtractionError(f"{out} cannot be written: {error.strerror or error}; choose another place")

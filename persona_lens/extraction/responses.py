"""Responses that come from elsewhere: rows of JSONL, CSV or Parquet, and files of them that a server is asked for."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from math import isnan
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from persona_lens.backend.tokens import ID_LIMIT
from persona_lens.core.documents import json_lines
from persona_lens.core.files import make_folder, named, sha256_of, write_bytes
from persona_lens.core.progress import Progress, note, shown_progress
from persona_lens.core.text import printable, shown
from persona_lens.data.tables import own_columns, read_rows
from persona_lens.extraction.means import ExtractionError
from persona_lens.judging import Judgement, Score
from persona_lens.models.server import Completion, CompletionRequest, CompletionServer, Refused, Usage
from persona_lens.runs.rollouts import Request
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import Arm

SUFFIXES = (".jsonl", ".ndjson")
SEEDS = 2**31  # servers keep a seed as a signed number of 32 or 64 bits
_LISTS = ("response_ids", "prompt_ids")
_REFERENCE = {"question", "prompt", "answer", "question_id"}
_REFERENCE_ID = re.compile(r"(?P<trait>.+)_\d+_(?P<arm>pos|neg)_(?P<pair>\d+)")
_NEEDED = {
    "arm (positive or negative)": ("arm",),
    "question (its text) or question_number": ("question", "question_number"),
    "pair (the instruction's number) or system (the system prompt)": ("pair", "system"),
    "response (text) or response_ids (token ids)": ("response", "response_ids"),
}
"""What a row has to say, and the columns of which one says it."""

Ids = tuple[Annotated[int, Strict(), Field(ge=0, lt=ID_LIMIT)], ...]
Number = Annotated[int, Field(ge=0, lt=2**31)]
Percent = Annotated[float, Field(ge=0, le=100)]


class ExternalResponse(BaseModel):
    """A response that another program generated: a row of a file, None where it says nothing.

    Attributes:
        place: File and line, for messages.
        arm: Of the extraction.
        question: Its text.
        question_number: Its number among the trait's extraction questions.
        pair: Number of the instruction pair.
        system: The system prompt.
        sample: Number of the sample.
        response: The response as text.
        response_ids: Its token ids, as generated; at least one of the two is there.
        prompt: The whole prompt as text.
        prompt_ids: The whole prompt as token ids.
        score: The trait's score that came with it.
        coherence: Its coherence.
        ended: Whether the model ended its turn.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    place: str
    arm: Arm | None = None
    question: str | None = None
    question_number: Number | None = None
    pair: Number | None = None
    system: str | None = None
    sample: Number | None = None
    response: str | None = None
    response_ids: Ids | None = None
    prompt: str | None = None
    prompt_ids: Ids | None = None
    score: Percent | None = None
    coherence: Percent | None = None
    ended: bool | None = None

    @property
    def judgement(self) -> Judgement | None:
        """The scores that came with it, as far as the row has their columns; None where it has no score column."""
        score, coherence = (_score(name, getattr(self, name)) for name in ("score", "coherence"))
        if "score" not in self.model_fields_set:
            return None
        return Judgement(score, coherence if "coherence" in self.model_fields_set else None)


def _score(name: str, value: float | None) -> Score:
    return Score(value, f"no {name} was given" if value is None else None)


def _response(row: Mapping[str, Any], place: str) -> ExternalResponse:
    """A row as a response; the reference implementation's are recognised by their columns."""
    if _is_reference(row):
        row = _from_reference(row, place)
    values = {name: _value(name, value) for name, value in row.items()}
    try:
        found = ExternalResponse.model_validate({**values, "place": place})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ExtractionError(f"{place}: {where}: {first['msg']}; got {shown(first['input'])}") from error
    for needed, names in _NEEDED.items():
        if all(getattr(found, name) is None for name in names):
            columns = ", ".join(map(str, row)) or "none"
            raise ExtractionError(f"{place}: the row has no {needed}; its columns are: {columns}")
    return found


def _ignored(row: Mapping[str, Any]) -> list[str]:
    """Columns with text that are no part of a response; those of the reference implementation's files all are."""
    if _is_reference(row):
        return []
    known = {*ExternalResponse.model_fields, *own_columns(row)} - {"place"}
    return [name for name, value in row.items() if name not in known and isinstance(value, str) and value]


def _value(name: str, value: Any) -> Any:
    """A value as the schema takes it: a cell of a CSV file is text, and other kinds write "nothing" in several ways."""
    if isinstance(value, float) and isnan(value):
        return None
    if isinstance(value, str) and not value and name != "response":  # which alone may be empty
        return None
    if isinstance(value, str) and name in _LISTS:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _is_reference(row: Mapping[str, Any]) -> bool:
    return row.keys() >= _REFERENCE and "arm" not in row


def _from_reference(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A row of ``{trait}_pos_instruct.csv`` or ``{trait}_neg_instruct.csv`` in our columns.

    Its question number counts the reference's own list of questions, so that only the text is taken.
    """
    match = _REFERENCE_ID.fullmatch(str(row["question_id"]))
    if match is None:
        raise ExtractionError(
            f"{place}: question_id {row['question_id']!r} names no instruction, as TRAIT_3_pos_1 does; "
            "take the files that were made with --persona_instruction_type pos and neg"
        )
    given = {
        "arm": {"pos": Arm.POSITIVE, "neg": Arm.NEGATIVE}[match["arm"]],
        "question": row["question"],
        "pair": match["pair"],
        "prompt": row["prompt"],
        "response": row["answer"],
    }
    scores = {"score": match["trait"], "coherence": "coherence"}
    return given | {name: row[column] for name, column in scores.items() if column in row}


def read_responses(path: Path | str) -> list[ExternalResponse]:
    """Read a file of responses.

    Args:
        path: JSONL, CSV or Parquet. Columns: ``arm`` (positive or negative); ``question`` (text) or
            ``question_number``; ``pair`` (number of the instruction pair) or ``system`` (the system prompt);
            ``response`` (text), ``response_ids`` (token ids) or both. They may be joined by ``sample`` (otherwise
            counted), ``prompt`` or ``prompt_ids`` (the whole prompt, to be checked), ``ended``, ``score`` and
            ``coherence``; other columns are ignored, and named once. Numbers count from 0. The reference
            implementation's per-response CSV files are read too.

    Returns:
        The responses, in the order of the file.

    Raises:
        DataError: If the file cannot be read.
        ExtractionError: If a row is none.
    """
    found, ignored = [], dict[str, None]()
    for line, row in read_rows(path):
        found.append(_response(row, f"{path}:{line}"))
        ignored |= dict.fromkeys(_ignored(row))
    if ignored:
        note(f"{path}: columns that are not read: {', '.join(printable(str(name)) for name in islice(ignored, 8))}")
    return found


def read_files(paths: Sequence[Path]) -> tuple[list[ExternalResponse], tuple[str, ...]]:
    """Read several files as one.

    Returns:
        The responses, and the SHA-256 of each file.

    Raises:
        DataError: If a file cannot be read.
        ExtractionError: If a row is none, there are no files, or two have the same content.
    """
    if not paths:
        raise ExtractionError("no file of responses is given")
    responses = [response for path in paths for response in read_responses(path)]
    digests = tuple(map(sha256_of, paths))
    for number, found in enumerate(digests):
        first = digests.index(found)
        if first < number:
            raise ExtractionError(f"{paths[first]} and {paths[number]} have the same content; give each file once")
    return responses, digests


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
        TokenError: If thinking is to be limited.
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
    settings = settings.for_server()
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

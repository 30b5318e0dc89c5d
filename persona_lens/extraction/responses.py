"""Files of responses: rows of JSONL, CSV or Parquet, and the fingerprint of what was read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from math import isnan
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from persona_lens.backend.tokens import ID_LIMIT
from persona_lens.core.files import sha256_of
from persona_lens.core.progress import note
from persona_lens.core.text import printable, shown
from persona_lens.data.tables import own_columns, read_rows
from persona_lens.extraction.means import ExtractionError
from persona_lens.judging import Judgement, Score
from persona_lens.traits import Arm

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

"""Files of responses: rows of JSONL, CSV or Parquet, and the fingerprint of what was read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from persona_lens.characters import printable
from persona_lens.notes import note
from persona_lens.responses.errors import ResponsesError
from persona_lens.responses.row import GivenResponse, ignored_columns, response_of
from persona_lens.tables import read_rows


def read_responses(path: Path | str) -> list[GivenResponse]:
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
        TableError: If the file cannot be read.
        ResponsesError: If a row is none.
    """
    found, ignored = [], dict[str, None]()
    for line, row in read_rows(path):
        found.append(response_of(row, str(path), line))
        ignored |= dict.fromkeys(ignored_columns(row))
    if ignored:
        note(f"{path}: columns that are not read: {', '.join(printable(str(name)) for name in islice(ignored, 8))}")
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_files(paths: Sequence[Path]) -> tuple[list[GivenResponse], tuple[str, ...]]:
    """Read several files as one.

    Returns:
        The responses, and the SHA-256 of each file.

    Raises:
        TableError: If a file cannot be read.
        ResponsesError: If a row is none, there are no files, or two have the same content.
    """
    if not paths:
        raise ResponsesError("no file of responses is given")
    responses = [response for path in paths for response in read_responses(path)]
    digests = tuple(map(digest, paths))
    for number, found in enumerate(digests):
        first = digests.index(found)
        if first < number:
            raise ResponsesError(f"{paths[first]} and {paths[number]} have the same content; give each file once")
    return responses, digests

"""Tables that other programs wrote: rows of JSONL, CSV and Parquet files, one at a time, each with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from persona_lens.characters import in_short
from persona_lens.documents import MAX_DEPTH, DocumentError, checked_depth
from persona_lens.errors import PersonaLensError

SEPARATORS = (",", ";", "\t")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
LONGEST_LINE = 2**27  # bytes, decompressed: a small file can hold a line without end
LARGEST_JSON = 2**30  # bytes: it is read at once
PARQUET_ROWS = 1024  # that are in memory at once

# Files that this project writes: what tells their rows, and what these hold besides what everybody reads of them.
_OWN = (
    ({"row", "check"}, {"row", "check", "arm", "pair", "sample", "direction", "layer", "coefficient", "condition",
                        "question_number", "seed", "prompt_tokens", "response_ids", "ended"}),
    ({"arm", "question_number", "pair", "sample", "system", "question", "response", "ended"},
     {"arm", "question_number", "pair", "sample", "ended", "reason"}),
    ({"question", "response", "score", "reason", "method", "coherence"}, {"score", "reason", "method", "coherence"}),
    ({"id", "trait", "level", "messages"}, {"trait", "level"}),
)  # fmt: skip

NumberedRows = Iterator[tuple[int, dict[str, Any]]]
BadRow = Callable[[int, "TableError"], None]
"""Told of a row that cannot be read: its line, and why."""


class TableError(PersonaLensError):
    """A file that is not the table it should be; the message begins with the file and the line."""


def own_columns(row: Mapping[str, Any]) -> set[str]:
    """Columns that this project wrote itself into a row of its own, which nobody has to be told of.

    These are rows of a run, what a server answered, what a judge said, and demonstrations.
    """
    return {name for marks, names in _OWN if row.keys() >= marks for name in names}


def read_rows(path: Path | str, bad_row: BadRow | None = None) -> NumberedRows:
    """Read a table row by row; memory does not grow with its length.

    Lines that are empty are skipped. A CSV file names its columns in its first line; its cells are text, separated by
    commas, semicolons or tabs, whichever cut the first line into most columns.

    Args:
        path: A file whose name ends in ``.jsonl``, ``.ndjson``, ``.json`` (a list of rows), ``.csv``, ``.tsv`` or
            ``.parquet``; text is UTF-8. The first two may be compressed: ``.jsonl.gz``, ``.jsonl.zst``.
        bad_row: Told of every row that cannot be read by itself; reading goes on behind it. Without it the first such
            row is an error.

    Yields:
        The number of the line on which a row begins, counted from 1 (in a Parquet file the number of the row), and the
        row's values by column.

    Raises:
        TableError: At once if there is no such file or its name does not say what it is; on the way, with the file and
            the line, if a row cannot be read; at the end if there was none.
    """
    path = Path(path)
    if path.is_dir():
        raise TableError(f"{path} is a folder; give one file of it")
    if not path.exists():
        raise TableError(f"there is no file {path}")
    kind = "".join(path.suffixes[-2:]).lower()
    reader = _READERS.get(kind) or _READERS.get(path.suffix.lower())
    if reader is None:
        accepted = ", ".join(_READERS)
        raise TableError(f"{path}: the kind of file is told by its name, which must end in one of {accepted}")
    return _checked(path, reader, bad_row)


def _checked(path: Path, reader: _Reader, bad_row: BadRow | None) -> NumberedRows:
    empty = True

    def report(number: int, error: TableError) -> None:
        nonlocal empty
        empty = False
        if bad_row is None:
            raise error
        bad_row(number, error)

    try:
        for numbered in reader(path, report):
            empty = False
            yield numbered
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error}") from error
    if empty:
        raise TableError(f"{path} holds no rows")


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their ends, undecoded. Only a line feed ends one: others may stand inside a text."""
    with _opened(path) as stream:
        for number, raw in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), start=1):
            if len(raw) > LONGEST_LINE:
                raise TableError(f"{path}:{number}: the line has more than {LONGEST_LINE:,} bytes")
            if number == 1 and raw.startswith(UTF_16_MARKS):
                raise TableError(f"{path} is encoded as UTF-16; save it as UTF-8")
            yield number, raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed as they are read."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                yield cast(BinaryIO, packed)
        elif suffix == ".zst":
            try:
                import zstandard
            except ImportError as error:
                raise TableError(f"{path}: reading .zst needs zstandard: `pip install zstandard`") from error
            try:
                with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as reader:
                    yield cast(BinaryIO, io.BufferedReader(cast(Any, reader)))
            except zstandard.ZstdError as error:
                raise TableError(f"{path} is damaged, or not compressed by zstd: {error}") from error
        else:
            with path.open("rb") as stream:
                yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TableError(f"{path} is damaged, or not compressed by gzip: {error}") from error


def _decoded(path: Path, number: int, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise TableError(
            f"{path}:{number}: byte {error.start + 1} of the line (0x{byte:02x}) is not UTF-8; save the file as UTF-8"
        ) from error


def _read_jsonl(path: Path, bad_row: BadRow) -> NumberedRows:
    for number, raw in _raw_lines(path):
        if not raw.strip():
            continue
        try:
            row = _json_row(path, number, _decoded(path, number, raw))
        except TableError as error:
            bad_row(number, error)
            continue
        yield number, row


def _read_json(path: Path, bad_row: BadRow) -> NumberedRows:
    """A list of rows; where it stands in the file is not known, so that rows count from 1."""
    if path.stat().st_size > LARGEST_JSON:
        raise TableError(f"{path} has more than {LARGEST_JSON:,} bytes; write it as JSONL, a row a line")
    content = _decoded(path, 1, path.read_bytes().removeprefix(BYTE_ORDER_MARK))
    try:
        found = json.loads(content)
    except json.JSONDecodeError as error:
        raise TableError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path}: JSON that cannot be read: {error}") from error
    if not isinstance(found, list):
        raise TableError(f"{path}: a .json file must be one list of rows; for a row a line name it .jsonl")
    for number, row in enumerate(found, start=1):
        try:
            yield number, _json_row(path, number, json.dumps(row))
        except TableError as error:
            bad_row(number, error)


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if line.count("[") + line.count("{") > MAX_DEPTH:
            checked_depth(row)
        if "\\u" in line:  # an escape may be half of a character, which no file could hold later
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise TableError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise TableError(f"{path}:{number}: an escape stands for half of a character: {error}") from error
    except (ValueError, RecursionError, DocumentError) as error:
        raise TableError(f"{path}:{number}: JSON that cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise TableError(
            f'{path}:{number}: each line must be one JSON object, such as {{"question": …}}, '
            f"but this is {_in_short(line.strip())}"
        )
    return row


def _in_short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _read_csv(path: Path, bad_row: BadRow) -> NumberedRows:
    records = _records(path, bad_row)
    first, header = next(records, (0, []))
    header = [name.strip() for name in header]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise TableError(
            f"{path}:{first}: several columns are named {', '.join(map(repr, repeated))}; rename all but one"
        )
    for number, cells in records:
        if len(cells) != len(header):
            error = TableError(
                f"{path}:{number}: {len(cells)} cells, but the header names {len(header)} columns "
                f"({_in_short(', '.join(header))}); put cells that hold separators into double quotes"
            )
            bad_row(number, error)
            continue
        yield number, dict(zip(header, cells, strict=True))


def _records(path: Path, bad_row: BadRow) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line on which it begins: a cell in quotes may go over several.

    The bad row is told of lines that are not UTF-8 and of records that are not CSV.
    """
    # A limit of the whole process, and by default smaller than a long response.
    csv.field_size_limit(2**31 - 1)
    faults: list[TableError] = []
    header = True
    lines = _csv_lines(path, faults)
    head: list[str] = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    number = 1
    try:
        separator = _separator(head, path.suffix)
    except csv.Error as error:
        raise TableError(f"{path}:{number}: not CSV: {error}") from error
    reader = csv.reader(chain(head, lines), delimiter=separator, strict=True)
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader begins anew on the next line
            faults.insert(0, TableError(f"{path}:{number}: not CSV: {error}"))
            record = []
        if faults and header:
            raise faults[0]
        if faults:
            bad_row(number, faults[0])
            faults.clear()
        elif record:
            header = False
            yield number, record
        number = reader.line_num + 1


def _csv_lines(path: Path, faults: list[TableError]) -> Iterator[str]:
    """The lines of a CSV file; one that is not UTF-8 is noted, and still read, so that cells end rightly."""
    for number, raw in _raw_lines(path):
        try:
            yield _decoded(path, number, raw)
        except TableError as error:
            faults.append(error)
            yield raw.decode(errors="replace")


def _separator(head: list[str], suffix: str) -> str:
    """The separator that makes most columns of the header; the usual one of the file's kind where none does."""
    usual = "\t" if suffix.lower() == ".tsv" else ","

    def columns(separator: str) -> int:
        return len(next(csv.reader(head[-1:], delimiter=separator), []))

    return max((usual, *SEPARATORS), key=columns)


def _read_parquet(path: Path, _: BadRow) -> NumberedRows:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise TableError(f"{path}: reading Parquet needs pyarrow: `pip install 'persona-lens[parquet]'`") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise TableError(f"{path}: several columns are named {', '.join(map(repr, repeated))}")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowException, ValueError, ArithmeticError, LookupError, TypeError, MemoryError) as error:
        place = f"{path}: after row {number}" if number else str(path)
        raise TableError(f"{place}: not a Parquet file that can be read: {in_short(str(error), 200)}") from error


_Reader = Callable[[Path, BadRow], NumberedRows]
_READERS: dict[str, _Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".jsonl.gz": _read_jsonl,
    ".ndjson.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".ndjson.zst": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}

"""Tables that other programs wrote: rows of JSONL, CSV and Parquet files, one at a time, each with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from persona_lens.core.documents import MAX_DEPTH, DocumentError, checked
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.plugins import install_command
from persona_lens.core.text import in_short

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


class DataError(PersonaLensError):
    """A dataset, a conversation or a table that cannot be read; the message says where and what to do."""


def own_columns(row: Mapping[str, Any]) -> set[str]:
    """Columns that this project wrote itself into a row of its own, which nobody has to be told of.

    These are rows of a run, what a server answered, what a judge said, and demonstrations.
    """
    return {name for marks, names in _OWN if row.keys() >= marks for name in names}


def row_key(
    file: Path, line: int, row: Mapping[str, Any], names: Sequence[str], failed: type[PersonaLensError]
) -> tuple[Any, ...]:
    """What a row is for: its values of these names.

    Raises:
        PersonaLensError: Of the class ``failed``, if one is missing, or none that rows can be told apart by.
    """
    try:
        key = tuple(row[name] for name in names)
        hash(key)
    except (KeyError, TypeError) as error:
        raise failed(f"{file}:{line}: the row does not say what it answers: {error}") from error
    return key


@dataclass(frozen=True)
class RawRow:
    """A row as its source has it.

    Attributes:
        number: Which row it is, from 0; bad ones count.
        line: Line on which it begins, from 1; where there are no lines, ``number + 1``.
        values: Its values by column; None if it cannot be read.
        problem: Why it cannot be read, in a sentence that begins with file and line.
    """

    number: int
    line: int
    values: dict[str, Any] | None
    problem: str = ""


def read_rows(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a table row by row as `all_rows` does; the first row that cannot be read is an error.

    Yields:
        The line on which a row begins, and the row's values by column.

    Raises:
        DataError: As `all_rows`, and with the file and the line if a row cannot be read.
    """
    rows = all_rows(path)  # which checks at once that there is such a file
    return (_readable(row) for row in rows)


def _readable(row: RawRow) -> tuple[int, dict[str, Any]]:
    if row.values is None:
        raise DataError(row.problem)
    return row.line, row.values


def all_rows(path: Path | str) -> Iterator[RawRow]:
    """Read a table row by row, the bad rows too; memory does not grow with its length.

    Lines that are empty are skipped. A CSV file names its columns in its first line; its cells are text, separated by
    commas, semicolons or tabs, whichever cut the first line into most columns.

    Args:
        path: A file whose name ends in ``.jsonl``, ``.ndjson``, ``.json`` (a list of rows), ``.csv``, ``.tsv`` or
            ``.parquet``; text is UTF-8. The first two may be compressed: ``.jsonl.gz``, ``.jsonl.zst``.

    Yields:
        Every row; in a ``.json`` and a Parquet file its number, from 1, stands for its line.

    Raises:
        DataError: At once if there is no such file or its name does not say what it is; on the way if the rest of it
            cannot be read; at the end if there was no row.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; give one file of it")
    if not path.exists():
        raise DataError(f"there is no file {path}")
    kind = "".join(path.suffixes[-2:]).lower()
    reader = _READERS.get(kind) or _READERS.get(path.suffix.lower())
    if reader is None:
        accepted = ", ".join(_READERS)
        raise DataError(f"{path}: the kind of file is told by its name, which must end in one of {accepted}")
    return _numbered(path, reader(path))


def _numbered(path: Path, found: _Found) -> Iterator[RawRow]:
    number = -1
    try:
        for number, (line, row) in enumerate(found):
            if isinstance(row, DataError):
                yield RawRow(number, line, None, str(row))
            else:
                yield RawRow(number, line, row)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if number < 0:
        raise DataError(f"{path} holds no rows")


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their ends, undecoded. Only a line feed ends one: others may stand inside a text."""
    with _opened(path) as stream:
        for number, raw in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), start=1):
            if len(raw) > LONGEST_LINE:
                raise DataError(f"{path}:{number}: the line has more than {LONGEST_LINE:,} bytes")
            if number == 1 and raw.startswith(UTF_16_MARKS):
                raise DataError(f"{path} is encoded as UTF-16; save it as UTF-8")
            yield number, raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed as they are read."""
    opening: Callable[[], Any] = partial(path.open, "rb")
    damaged: tuple[type[Exception], ...] = ()
    suffix = path.suffix.lower()
    if suffix == ".gz":
        opening, damaged = partial(gzip.open, path), (gzip.BadGzipFile, EOFError, zlib.error)
    elif suffix == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise DataError(f"{path}: reading .zst needs pyarrow: {install_command('parquet')}") from error
        # Unlike the package zstandard, this says where a file is cut short.
        opening, damaged = lambda: io.BufferedReader(pyarrow.input_stream(path, compression="zstd")), (OSError,)
    try:
        with opening() as stream:
            yield stream
    except damaged as error:
        if getattr(error, "errno", None):  # what the system says, not what the bytes are
            raise
        program = {".gz": "gzip", ".zst": "zstd"}[suffix]
        raise DataError(f"{path} is damaged, or not compressed by {program}: {error}") from error


def _read_jsonl(path: Path) -> _Found:
    for number, raw in raw_lines(path):
        if raw.strip():
            yield number, _json_row(path, number, raw)


def _read_json(path: Path) -> _Found:
    """A list of rows; where it stands in the file is not known, so that rows count from 1."""
    if path.stat().st_size > LARGEST_JSON:
        raise DataError(f"{path} has more than {LARGEST_JSON:,} bytes; write it as JSONL, a row a line")
    try:
        found = json.loads(path.read_bytes().removeprefix(BYTE_ORDER_MARK).decode())
    except (ValueError, RecursionError) as error:
        raise _fault(path, getattr(error, "lineno", 1), error) from error
    if not isinstance(found, list):
        raise DataError(f"{path}: a .json file must be one list of rows; for a row a line name it .jsonl")
    for number, row in enumerate(found, start=1):
        yield number, _json_row(path, number, json.dumps(row).encode())


def _json_row(path: Path, number: int, raw: bytes) -> dict[str, Any] | DataError:
    try:
        line = raw.decode()
        row = json.loads(line)
        if line.count("[") + line.count("{") > MAX_DEPTH:
            checked(row, finite=False, bounded=False)
        if "\\u" in line:  # an escape may be half of a character, which no file could hold later
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError, DocumentError) as error:
        return _fault(path, number, error)
    if isinstance(row, dict):
        return row
    return DataError(
        f'{path}:{number}: each line must be one JSON object, such as {{"question": …}}, '
        f"but this is {in_short(line.strip())}"
    )


def _fault(path: Path, number: int, error: Exception) -> DataError:
    """What is wrong with a line, by what its decoder or parser says."""
    match error:
        case UnicodeDecodeError():
            byte = f"byte {error.start + 1} of the line (0x{error.object[error.start]:02x})"
            said = f"{byte} is not UTF-8; save the file as UTF-8"
        case UnicodeEncodeError():
            said = f"an escape stands for half of a character: {error}"
        case json.JSONDecodeError():
            said = f"not JSON: {error.msg} at column {error.colno}"
        case csv.Error():
            said = f"not CSV: {error}"
        case _:
            said = f"JSON that cannot be read: {error}"
    return DataError(f"{path}:{number}: {said}")


def _read_csv(path: Path) -> _Found:
    """Each record with the line on which it begins: a cell in quotes may go over several."""
    # A limit of the whole process, and by default smaller than a long response.
    csv.field_size_limit(2**31 - 1)
    faults: list[DataError] = []
    lines = _csv_lines(path, faults)
    above = []
    for line in lines:
        above.append(line)
        if line.strip():
            break
    separator = separator_of("".join(above[-1:]), "\t" if path.suffix.lower() == ".tsv" else ",")
    reader = csv.reader(chain(above, lines), delimiter=separator, strict=True)
    header: list[str] = []
    number = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader begins anew on the next line
            faults.insert(0, _fault(path, number, error))
            cells = []
        if faults:
            if not header:
                raise faults[0]
            yield number, faults[0]
            faults.clear()
        elif cells and not header:
            header = [name.strip() for name in cells]
            if repeated := _repeated(header):
                raise DataError(f"{path}:{number}: several columns are named {repeated}; rename all but one")
        elif cells and len(cells) != len(header):
            named = f"{len(header)} columns ({in_short(', '.join(header))})"
            advice = "put cells that hold separators into double quotes"
            yield number, DataError(f"{path}:{number}: {len(cells)} cells, but the header names {named}; {advice}")
        elif cells:
            yield number, dict(zip(header, cells, strict=True))
        number = reader.line_num + 1


def _csv_lines(path: Path, faults: list[DataError]) -> Iterator[str]:
    """The lines of a CSV file; one that is not UTF-8 is noted, and still read, so that cells end rightly."""
    for number, raw in raw_lines(path):
        try:
            yield raw.decode()
        except UnicodeDecodeError as error:
            faults.append(_fault(path, number, error))
            yield raw.decode(errors="replace")


def separator_of(header: str, usual: str = ",") -> str:
    """The separator that makes most columns of a CSV file's first line; the usual one where none makes more."""

    def columns(separator: str) -> int:
        with suppress(csv.Error):
            return len(next(csv.reader([header], delimiter=separator), []))
        return 0

    return max((usual, *SEPARATORS), key=columns)


def _repeated(names: Sequence[str]) -> str:
    return ", ".join(sorted({repr(name) for name in names if names.count(name) > 1}))


def _read_parquet(path: Path) -> _Found:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: {install_command('parquet')}") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if repeated := _repeated(names):
                raise DataError(f"{path}: several columns are named {repeated}")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowException, ValueError, ArithmeticError, LookupError, TypeError, MemoryError) as error:
        place = f"{path}: after row {number}" if number else str(path)
        raise DataError(f"{place}: not a Parquet file that can be read: {in_short(str(error), 200)}") from error


@contextmanager
def writing_parquet(stream: BinaryIO, schema: Any = None) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """Write rows as a Parquet file, some at a time; without a schema with that of the first of them."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    waiting: list[Mapping[str, Any]] = []
    writer: Any = None

    def flush() -> None:
        nonlocal writer
        if waiting or (schema is not None and writer is None):
            table = pa.Table.from_pylist(list(waiting), schema=schema if writer is None else writer.schema)
            writer = ParquetWriter(stream, table.schema) if writer is None else writer
            writer.write_table(table)
            waiting.clear()

    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        waiting.extend(rows)
        if len(waiting) >= PARQUET_ROWS:
            flush()

    yield write
    flush()
    if writer is not None:
        writer.close()


_Found = Iterator[tuple[int, dict[str, Any] | DataError]]
_READERS: dict[str, Callable[[Path], _Found]] = {
    **dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl),
    ".json": _read_json,
    **dict.fromkeys((".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst"), _read_jsonl),
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    ".parquet": _read_parquet,
}

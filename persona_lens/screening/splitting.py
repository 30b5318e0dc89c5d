"""Splitting: kept, flagged and undecided rows of a dataset, in its own format and order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from persona_lens.runs import RunFolder
from persona_lens.screening.datasets import Dataset
from persona_lens.screening.sources import FileSource, LibrarySource, RawRow
from persona_lens.screening.thresholds import Decision
from persona_lens.tables import PARQUET_ROWS

FOLDER = "split"
Placed = tuple[RawRow, Decision | None]
"""A row, and what becomes of it; None for one that is in none of the files."""


def split(dataset: Dataset, decisions: Iterable[Decision | None], folder: RunFolder, stem: str) -> list[str]:
    """Write a dataset's rows into three files, or three folders for one that ``save_to_disk`` wrote.

    Lines of JSONL and records of CSV are copied byte for byte. Rows of the hub and of folders become Parquet.

    Args:
        dataset: The dataset.
        decisions: For each of its rows in order; None for one that could not be read, which is in none of the files.
        folder: The run; the files come into its ``split``.
        stem: What their names begin with.

    Returns:
        Names of the files, kept, flagged, undecided.
    """
    source = dataset.source
    made = iter(decisions)
    placed = ((row, next(made, None)) for row in source.rows())
    if isinstance(source, LibrarySource):
        return (_split_saved if source.saved else _split_streamed)(source, placed, folder, stem)
    assert isinstance(source, FileSource)
    if source.path.suffix.lower() == ".parquet":
        return _split_parquet(source.path, placed, folder, stem)
    return _split_text(source.path, placed, folder, stem)


def _split_text(path: Path, placed: Iterable[Placed], folder: RunFolder, stem: str) -> list[str]:
    with path.open("rb") as stream, _streams(folder, stem, path.suffix) as (names, outputs):
        record: list[bytes] = []  # its lines so far; at first, what stands above all records
        targets: Sequence[BinaryIO] = list(outputs.values())
        ended = 0
        for row, decision in placed:
            record += islice(stream, row.line - 1 - ended)
            _copy(record, targets)
            targets = [outputs[decision]] if decision else []
            record, ended = list(islice(stream, 1)), row.line
        _copy([*record, *stream], targets)
    return names


def _copy(record: list[bytes], targets: Sequence[BinaryIO]) -> None:
    while record and not record[-1].strip():
        record.pop()
    for target in targets:
        target.write(b"".join(record) + (b"\n" if record and not record[-1].endswith(b"\n") else b""))


def _split_parquet(path: Path, placed: Iterable[Placed], folder: RunFolder, stem: str) -> list[str]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile, ParquetWriter

    made = iter(placed)
    with ParquetFile(path) as file, _streams(folder, stem, ".parquet") as (names, outputs), ExitStack() as stack:
        writers = {
            decision: stack.enter_context(ParquetWriter(stream, file.schema_arrow))
            for decision, stream in outputs.items()
        }
        for batch in file.iter_batches(batch_size=PARQUET_ROWS):
            own = [decision for _, decision in islice(made, len(batch))]
            for decision, writer in writers.items():
                chosen = batch.filter(pa.array([each is decision for each in own]))
                if len(chosen):
                    writer.write_batch(chosen)
    return names


def _split_saved(source: LibrarySource, placed: Iterable[Placed], folder: RunFolder, stem: str) -> list[str]:
    rows: dict[Decision, list[int]] = {decision: [] for decision in Decision}
    for row, decision in placed:
        if decision is not None:
            rows[decision].append(row.number)
    names = [f"{FOLDER}/{stem}-{decision}" for decision in Decision]
    for name, chosen in zip(names, rows.values(), strict=True):
        if not folder.keeps(name):
            with folder.writing_folder(name) as part:
                source.loaded.select(chosen).save_to_disk(str(part))
    return names


def _split_streamed(source: LibrarySource, placed: Iterable[Placed], folder: RunFolder, stem: str) -> list[str]:
    features = source.loaded.features
    schema = features.arrow_schema if features is not None else None
    with _streams(folder, stem, ".parquet") as (names, outputs), ExitStack() as stack:
        writers = {decision: stack.enter_context(_row_writer(stream, schema)) for decision, stream in outputs.items()}
        for row, decision in placed:
            if decision is not None and row.values is not None:
                writers[decision](row.values)
    return names


@contextmanager
def _row_writer(stream: BinaryIO, schema: Any) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    waiting: list[Mapping[str, Any]] = []
    opened: list[Any] = []

    def flush() -> None:
        if waiting or (schema is not None and not opened):
            table = pa.Table.from_pylist(list(waiting), schema=opened[0].schema if opened else schema)
            if not opened:
                opened.append(ParquetWriter(stream, table.schema))
            opened[0].write_table(table)
            waiting.clear()

    def write(row: Mapping[str, Any]) -> None:
        waiting.append(row)
        if len(waiting) == PARQUET_ROWS:
            flush()

    yield write
    flush()
    for writer in opened:
        writer.close()


@contextmanager
def _streams(folder: RunFolder, stem: str, suffix: str) -> Iterator[tuple[list[str], dict[Decision, BinaryIO]]]:
    names = [f"{FOLDER}/{stem}-{decision}{suffix}" for decision in Decision]
    with ExitStack() as stack:
        streams = [stack.enter_context(folder.writing(name)) for name in names]
        yield names, dict(zip(Decision, streams, strict=True))

"""`ScoredRow`: a row with its values, read back; what is written of it; and a dataset split by `Decision`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from persona_lens.core.documents import json_lines
from persona_lens.data.datasets import Dataset
from persona_lens.data.sources import FileSource, LibrarySource
from persona_lens.data.tables import PARQUET_ROWS, RawRow, all_rows, writing_parquet
from persona_lens.runs import RunFolder
from persona_lens.screening.scoring import Unit
from persona_lens.vectors.provenance import Quantity

SCORES = "scores.jsonl"
RESULTS, RESULTS_WITHOUT_PYARROW = "results.parquet", "results.jsonl"
REJECTS, BASE = "rejects.jsonl", "base"
QUANTITIES = tuple(Quantity)


@dataclass(frozen=True, eq=False)
class ScoredRow:
    """A row of a dataset.

    Attributes:
        dataset: Which dataset, from 0.
        number: Which row of it, from 0; bad ones count.
        line: Line on which it begins, from 1.
        id: Its own id, or its line.
        label: Its label.
        group: Its group.
        problem: Why it has no values.
        tokens: Tokens of the answers that count.
        values: float64 [quantities, gauges], in the order of `Quantity`; NaN where there is none.
        prompt: float64 [gauges]: projection of the last prompt token.
        base: float64 [gauges]: projection of the base model's response; NaN where there is none.
        responses: The base model's responses that were generated: for each answer, the samples.
    """

    dataset: int
    number: int
    line: int
    id: str
    label: str | None
    group: str | None
    problem: str | None
    tokens: int
    values: NDArray[np.float64]
    prompt: NDArray[np.float64]
    base: NDArray[np.float64]
    responses: tuple[tuple[str, ...], ...] = ()


def scored_windows(folder: RunFolder, gauges: int) -> Iterator[list[ScoredRow]]:
    """The rows that a run has saved, window by window, in the order of the datasets.

    Args:
        folder: The run.
        gauges: How many gauges its panel has.
    """
    units = folder.rows(SCORES)
    for (dataset, _), (heads, *others) in groupby(units, key=lambda unit: (unit["dataset"], unit["window"])):
        found: defaultdict[tuple[str, int], list[Unit]] = defaultdict(list)
        for unit in others:
            for entry in unit["rows"]:
                found[unit["kind"], entry["row"]].append(entry)
        yield [
            _row(dataset, head, {kind: found[kind, head["number"]] for kind in ("own", "base", "supplied")}, gauges)
            for head in heads["rows"]
        ]


def _row(dataset: int, head: Unit, found: Mapping[str, Sequence[Unit]], gauges: int) -> ScoredRow:
    own, base, supplied = found["own"], found["base"], found["supplied"]
    raw = _mean(own, "values", "tokens", gauges)
    prompt = _mean(own, "prompt", "answers", gauges)
    if supplied:  # responses to one prompt: each counts alike
        beside = _mean(supplied, "values", "answers", gauges)
    else:
        beside = _mean([entry for entry in base if entry["values"] is not None], "values", "tokens", gauges)
    return ScoredRow(
        dataset=dataset,
        problem=head.get("problem"),
        tokens=sum(entry["tokens"] for entry in own),
        values=np.stack([raw, raw - beside, raw - prompt]),
        prompt=prompt,
        base=beside,
        responses=tuple(tuple(entry["texts"]) for entry in base),
        **{name: head[name] for name in ("number", "line", "id", "label", "group")},
    )


def _mean(entries: Sequence[Unit], what: str, weight: str, gauges: int) -> NDArray[np.float64]:
    if not entries:
        return np.full(gauges, np.nan)
    weights = np.array([entry[weight] for entry in entries], dtype=np.float64)
    return np.asarray(weights @ np.array([entry[what] for entry in entries]) / weights.sum())


Key = tuple[int, int]
"""Dataset and row."""


@dataclass(frozen=True)
class Excerpt:
    """What a row says.

    Attributes:
        id: The row's id.
        prompt: The last message before the answer.
        response: The last answer.
    """

    id: str
    prompt: str
    response: str


def excerpts_of(datasets: Sequence[Dataset], wanted: Collection[Key]) -> dict[Key, Excerpt]:
    """Read some rows again; each dataset is read no further than its last one."""
    found: dict[Key, Excerpt] = {}
    for number, dataset in enumerate(datasets):
        own = {row for each, row in wanted if each == number}
        for row in dataset if own else ():
            if row.number in own and row.messages is not None:
                *_, asked, said = row.messages
                found[number, row.number] = Excerpt(row.id, asked["content"], said["content"])
            own.discard(row.number)
            if not own:
                break
    return found


# The columns of the table that come before the values, by their kinds in Parquet.
_HEAD = {
    "dataset": "string", "row": "int64", "line": "int64", "id": "string", "label": "string", "group": "string",
    "reference": "bool_", "tokens": "int64", "decision": "string",
}  # fmt: skip


def has_pyarrow() -> bool:
    """Whether Parquet can be written here."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return False
    return True


def result_of(
    row: ScoredRow, name: str, reference: bool, decision: str | None, gauges: Sequence[str]
) -> dict[str, Any]:
    """A row of the table; numbers that are not there are None.

    Args:
        row: The row.
        name: What its dataset is called.
        reference: Whether that is a clean reference.
        decision: What becomes of the row.
        gauges: Traits with their layers, such as ``optimistic@18``: each has a column for every value.
    """
    about = (name, row.number, row.line, row.id, row.label, row.group, reference, row.tokens, decision)
    found: dict[str, Any] = dict(zip(_HEAD, about, strict=True))
    for number, gauge in enumerate(gauges):
        values = (*row.values[:, number], row.prompt[number], row.base[number])
        for column, value in zip(_columns_of(gauge), values, strict=True):
            found[column] = float(value) if math.isfinite(value) else None
    return found


def _columns_of(gauge: str) -> list[str]:
    return [f"{gauge}.{name}" for name in (*QUANTITIES, "prompt", "base")]


Write = Callable[[Sequence[Mapping[str, Any]]], None]
"""Takes some more rows of a file."""


@contextmanager
def writing_results(folder: RunFolder, gauges: Sequence[str], judged: Sequence[str]) -> Iterator[Write]:
    """Write the table piece by piece: Parquet, or JSONL where pyarrow is not installed.

    Args:
        folder: The run.
        gauges: As for `result_of`.
        judged: The traits that a judge was asked about, each with a column ``judge.TRAIT``.
    """
    if not has_pyarrow():
        with writing_lines(folder, RESULTS_WITHOUT_PYARROW) as append:
            yield append
        return
    import pyarrow as pa

    numbers = [*(name for gauge in gauges for name in _columns_of(gauge)), *(f"judge.{trait}" for trait in judged)]
    kinds = {**_HEAD, **dict.fromkeys(numbers, "float64")}
    schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in kinds.items()])
    with folder.writing(RESULTS) as stream, writing_parquet(stream, schema) as write:
        yield write


@contextmanager
def writing_lines(folder: RunFolder, name: str) -> Iterator[Write]:
    """Write a JSONL file piece by piece."""
    with folder.writing(name) as stream:

        def append(rows: Iterable[Mapping[str, Any]]) -> None:
            stream.write(json_lines(rows))

        yield append


def write_subsets(datasets: Sequence[Dataset], subsets: Mapping[str, Collection[Key]], folder: RunFolder) -> None:
    """Write some rows, by the name of a file in ``subsets``, as chat messages that can be trained on."""
    with ExitStack() as stack:
        files = {name: stack.enter_context(writing_lines(folder, f"subsets/{name}.jsonl")) for name in subsets}
        for number, dataset in enumerate(datasets):
            for row in dataset:
                for name, keys in subsets.items():
                    if (number, row.number) in keys and row.messages is not None:
                        files[name]([{"id": row.id, "messages": list(map(dict, row.messages))}])


def reject_of(row: ScoredRow, name: str) -> dict[str, Any]:
    """A line of the rejects."""
    return {"dataset": name, "row": row.number, "line": row.line, "id": row.id, "problem": row.problem}


def base_of(row: ScoredRow) -> dict[str, Any]:
    """A line of a dataset's base responses, which another screening can be given."""
    samples = ["\n\n".join(answers) for answers in zip(*row.responses, strict=True)]
    said = {"responses": samples} if len(samples) > 1 else {"response": "".join(samples)}
    return {"row": row.number, "id": row.id, **said}


class Decision(StrEnum):
    """What becomes of a row."""

    KEPT = "kept"
    FLAGGED = "flagged"
    UNDECIDED = "undecided"


DECISIONS = tuple(Decision)


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
    if isinstance(source, LibrarySource):
        placed = ((row, next(made, None)) for row in source.rows())
        return (_split_saved if source.saved else _split_streamed)(source, placed, folder, stem)
    assert isinstance(source, FileSource)
    # Of one level, too, every row of the file is passed, so that what is copied begins and ends where it does there.
    placed = ((row, next(made, None) if source.takes(row) else None) for row in all_rows(source.path))
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
        writers = {
            decision: stack.enter_context(writing_parquet(stream, schema)) for decision, stream in outputs.items()
        }
        for row, decision in placed:
            if decision is not None and row.values is not None:
                writers[decision]([row.values])
    return names


@contextmanager
def _streams(folder: RunFolder, stem: str, suffix: str) -> Iterator[tuple[list[str], dict[Decision, BinaryIO]]]:
    names = [f"{FOLDER}/{stem}-{decision}{suffix}" for decision in Decision]
    with ExitStack() as stack:
        streams = [stack.enter_context(folder.writing(name)) for name in names]
        yield names, dict(zip(Decision, streams, strict=True))

"""`Flagging`: how rows are ranked and flagged; and a dataset split by it, in its own format and order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from persona_lens.data.datasets import Dataset
from persona_lens.data.sources import FileSource, LibrarySource
from persona_lens.data.tables import PARQUET_ROWS, RawRow, writing_parquet
from persona_lens.runs import RunFolder
from persona_lens.screening.rows import Band, Decision, RowThreshold, ScoredRow, check_rates, decide
from persona_lens.screening.samples import BaseResponses, ScreeningError, ScreeningSettings
from persona_lens.screening.survey import Extreme, Survey, keep_largest
from persona_lens.vectors.provenance import Quantity

BINS = 40


@dataclass(frozen=True)
class Flagging:
    """How rows are ranked and flagged; part of a run's configuration.

    Attributes:
        score: By which value; None takes the difference to the base responses where every row has one, else the raw
            projection.
        false_positive_rate: Share of the reference rows that may be flagged, by each trait.
        undecided: See `persona_lens.screening.threshold_of`.
        clean: Label of clean rows; None finds one that is usual.
        random_directions: How many of them stand beside the traits where rows are labelled.
        top_k: How many rows are shown at either end.
        judged: Flagged rows of a trait that a judge is asked about at most, the largest first.

    Raises:
        ScreeningError: If a value is out of range.
    """

    score: Quantity | None = None
    false_positive_rate: float = 0.05
    undecided: Band | float = Band.INTERVAL
    clean: str | None = None
    random_directions: int = 20
    top_k: int = 10
    judged: int = 100

    def __post_init__(self) -> None:
        check_rates(self.false_positive_rate, self.undecided)
        for name in ("random_directions", "top_k", "judged"):
            if getattr(self, name) < 0:
                raise ScreeningError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def resolved_score(self, settings: ScreeningSettings) -> Quantity:
        """By which value rows are flagged in a run with these settings.

        Raises:
            ScreeningError: If not every row has it.
        """
        whole = settings.base is not BaseResponses.NONE and settings.base_share == 1
        if self.score is Quantity.DIFFERENCE and not whole:
            raise ScreeningError(
                "rows are ranked by the difference to base responses, but not every row gets one; generate or supply "
                "them for all, or rank by raw or prompt_difference"
            )
        return self.score or (Quantity.DIFFERENCE if whole else Quantity.RAW)

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {name: v.value if isinstance(v, StrEnum) else v for name, v in vars(self).items()}


@dataclass
class Flags:
    """What became of the rows.

    Attributes:
        score: By which value.
        thresholds: One for each trait's gauge; none without a reference.
        edges: Of the bins, float64 [traits, bins + 1].
        judged: How many flagged rows of each trait are kept, for a judge.
    """

    score: Quantity
    thresholds: Sequence[RowThreshold]
    edges: NDArray[np.float64]
    judged: int
    decisions: dict[int, dict[Decision, int]] = field(default_factory=dict)
    over: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    counts: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    flagged: list[list[Extreme]] = field(init=False)

    def __post_init__(self) -> None:
        self.flagged = [[] for _ in self.edges]

    @staticmethod
    def of(survey: Survey, thresholds: Sequence[RowThreshold], judged: int) -> Flags:
        """Flags with bins over what a survey has seen."""
        low, high = (np.where(np.isfinite(end), end, 0.0) for end in (survey.lowest, survey.highest))
        edges = np.linspace(low, np.where(high > low, high, low + 1), BINS + 1, axis=1)
        return Flags(survey.score, thresholds, edges, judged)

    def decide(self, row: ScoredRow) -> Decision | None:
        """What becomes of a row; None where nothing is flagged, or the row has no values."""
        if not self.thresholds or row.problem is not None:
            return None
        return decide(self.thresholds, [row.value(self.score, gauge) for gauge in range(len(self.thresholds))])

    def add(self, rows: Sequence[ScoredRow], *, reference: bool) -> None:
        """Take in rows of one dataset."""
        number, traits = rows[0].dataset, len(self.edges)
        counts = self.counts.setdefault(number, np.zeros((traits, BINS), dtype=np.int64))
        over = self.over.setdefault(number, np.zeros(traits, dtype=np.int64))
        decisions = self.decisions.setdefault(number, dict.fromkeys(Decision, 0))
        scores = np.array([[row.value(self.score, gauge) for gauge in range(traits)] for row in rows])
        for gauge in range(traits):
            there = scores[np.isfinite(scores[:, gauge]), gauge]
            counts[gauge] += np.histogram(there, self.edges[gauge])[0]
        for row, own in zip(rows, scores, strict=True):
            decision = self.decide(row)
            if decision is None:
                continue
            decisions[decision] += 1
            for gauge, threshold in enumerate(self.thresholds):
                if threshold.decide(own[gauge]) is Decision.FLAGGED:
                    over[gauge] += 1
                    if not reference:
                        keep_largest(self.flagged[gauge], (float(own[gauge]), -row.dataset, -row.number), self.judged)


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

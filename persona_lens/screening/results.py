"""What a screening writes of each row: a Parquet table that joins back by row, the rejects, the base responses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from persona_lens.runs import RunFolder
from persona_lens.screening.rows import QUANTITIES, Decision, ScoredRow

RESULTS, RESULTS_WITHOUT_PYARROW = "results.parquet", "results.jsonl"
REJECTS, BASE = "rejects.jsonl", "base"
_GROUP = 4096  # rows

Result = dict[str, Any]
_KINDS = {"row": "int64", "line": "int64", "tokens": "int64", "reference": "bool_"}
_TEXTS = ("dataset", "id", "label", "group", "decision")


def has_pyarrow() -> bool:
    """Whether Parquet can be written here."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return False
    return True


def columns_of(gauges: Sequence[str], judged: Sequence[str]) -> tuple[str, ...]:
    """The table's columns.

    Args:
        gauges: Traits with their layers, such as ``optimistic@18``: each has a column for every value.
        judged: The traits that a judge was asked about.
    """
    values = [f"{gauge}.{name}" for gauge in gauges for name in (*QUANTITIES, "prompt", "base")]
    head = ("dataset", "row", "line", "id", "label", "group", "reference", "tokens", "decision")
    return (*head, *values, *(f"judge.{trait}" for trait in judged))


def result_of(row: ScoredRow, name: str, reference: bool, decision: Decision | None, gauges: Sequence[str]) -> Result:
    """A row of the table; numbers that are not there are None."""
    found: Result = {
        "dataset": name,
        "row": row.number,
        "line": row.line,
        "id": row.id,
        "label": row.label,
        "group": row.group,
        "reference": reference,
        "tokens": row.tokens,
        "decision": decision.value if decision else None,
    }
    for number, gauge in enumerate(gauges):
        for place, quantity in enumerate(QUANTITIES):
            found[f"{gauge}.{quantity}"] = _number(row.values[place, number])
        found[f"{gauge}.prompt"] = _number(row.prompt[number])
        found[f"{gauge}.base"] = _number(row.base[number])
    return found


@contextmanager
def writing_results(folder: RunFolder, columns: Sequence[str]) -> Iterator[Callable[[Sequence[Result]], None]]:
    """Write the table piece by piece: Parquet, or JSONL where pyarrow is not installed."""
    if not has_pyarrow():
        with folder.writing(RESULTS_WITHOUT_PYARROW) as stream:
            yield _appending(stream)
        return
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    def kind(name: str) -> Any:
        return getattr(pa, _KINDS[name])() if name in _KINDS else pa.string() if name in _TEXTS else pa.float64()

    schema = pa.schema([(name, kind(name)) for name in columns])
    waiting: list[Result] = []
    with folder.writing(RESULTS) as stream, ParquetWriter(stream, schema) as writer:

        def write(rows: Sequence[Result], least: int = _GROUP) -> None:
            waiting.extend(rows)
            if len(waiting) >= least:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting.clear()

        yield write
        write((), least=1)


@contextmanager
def writing_lines(folder: RunFolder, name: str) -> Iterator[Callable[[Iterable[Mapping[str, Any]]], None]]:
    """Write a JSONL file piece by piece."""
    with folder.writing(name) as stream:
        yield _appending(stream)


def reject_of(row: ScoredRow, name: str) -> dict[str, Any]:
    """A line of the rejects."""
    return {"dataset": name, "row": row.number, "line": row.line, "id": row.id, "problem": row.problem}


def base_of(row: ScoredRow) -> dict[str, Any]:
    """A line of a dataset's base responses, which another screening can be given."""
    samples = ["\n\n".join(answers) for answers in zip(*row.responses, strict=True)]
    said = {"responses": samples} if len(samples) > 1 else {"response": "".join(samples)}
    return {"row": row.number, "id": row.id, **said}


def _appending(stream: BinaryIO) -> Callable[[Iterable[Mapping[str, Any]]], None]:
    def append(rows: Iterable[Mapping[str, Any]]) -> None:
        stream.write(_lines(rows))

    return append


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

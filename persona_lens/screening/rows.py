"""`ScoredRow`: a row with its values, read back; from which value on it is flagged; and what is written of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from persona_lens.core.documents import Record, json_lines
from persona_lens.data.datasets import Dataset
from persona_lens.data.tables import writing_parquet
from persona_lens.runs import RunFolder
from persona_lens.screening.samples import ScreeningError
from persona_lens.screening.scoring import Unit
from persona_lens.vectors.provenance import Quantity

SCORES = "scores.jsonl"


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

    def value(self, quantity: Quantity, gauge: int) -> float:
        """One number; NaN where there is none."""
        return float(self.values[QUANTITIES.index(quantity), gauge])


def scored_windows(folder: RunFolder, gauges: int, dataset: int | None = None) -> Iterator[list[ScoredRow]]:
    """The rows that a run has saved, window by window, in the order of the datasets.

    Args:
        folder: The run.
        gauges: How many gauges its panel has.
        dataset: Only rows of this one.
    """
    units = folder.rows(SCORES)
    for (number, _), found in groupby(units, key=lambda unit: (unit["dataset"], unit["window"])):
        if dataset is None or number == dataset:
            yield _merged(number, list(found), gauges)


def _merged(dataset: int, units: Sequence[Unit], gauges: int) -> list[ScoredRow]:
    found: dict[str, dict[int, list[dict[str, Any]]]] = {"own": {}, "base": {}, "supplied": {}}
    for unit in units:
        for entry in unit["rows"] if unit["kind"] != "rows" else ():
            found[unit["kind"]].setdefault(entry["row"], []).append(entry)
    heads = next(unit["rows"] for unit in units if unit["kind"] == "rows")
    return [
        _row(dataset, head, {kind: rows.get(head["number"], []) for kind, rows in found.items()}, gauges)
        for head in heads
    ]


def _row(dataset: int, head: dict[str, Any], found: Mapping[str, Sequence[dict[str, Any]]], gauges: int) -> ScoredRow:
    raw = _mean(found["own"], "values", "tokens", gauges)
    prompt = _mean(found["own"], "prompt", "answers", gauges)
    if found["supplied"]:  # responses to one prompt: each counts alike
        beside = _mean(found["supplied"], "values", "answers", gauges)
    else:
        beside = _mean([entry for entry in found["base"] if entry["values"] is not None], "values", "tokens", gauges)
    return ScoredRow(
        dataset=dataset,
        problem=head.get("problem"),
        tokens=sum(entry["tokens"] for entry in found["own"]),
        values=np.stack([raw, raw - beside, raw - prompt]),
        prompt=prompt,
        base=beside,
        responses=tuple(tuple(entry["texts"]) for entry in found["base"]),
        **{name: head[name] for name in ("number", "line", "id", "label", "group")},
    )


def _mean(entries: Sequence[dict[str, Any]], what: str, weight: str, gauges: int) -> NDArray[np.float64]:
    if not entries:
        return np.full(gauges, np.nan)
    weights = np.array([entry[weight] for entry in entries], dtype=np.float64)
    return np.asarray(weights @ np.array([entry[what] for entry in entries]) / weights.sum())


class Decision(StrEnum):
    """What becomes of a row."""

    KEPT = "kept"
    FLAGGED = "flagged"
    UNDECIDED = "undecided"


class Band(StrEnum):
    """Where rows are undecided."""

    INTERVAL = "interval"  # within the 95% interval of the threshold
    NONE = "none"  # nowhere: above the threshold is flagged


@dataclass(frozen=True)
class RowThreshold(Record):
    """Rows above ``high`` are flagged, rows above ``low`` undecided (method, section 7).

    Attributes:
        gauge: Trait and layer.
        false_positive_rate: Share of the reference rows that may be above ``value``.
        value: The percentile of the reference, in residual-stream units.
        low: Lower end of the band of undecided rows.
        high: Its upper end.
        rows: How many reference rows there are.
    """

    gauge: str
    false_positive_rate: float
    value: float
    low: float
    high: float
    rows: int

    def decide(self, score: float) -> Decision:
        """What becomes of a row with this value; without one it is undecided."""
        if score <= self.low:
            return Decision.KEPT
        return Decision.FLAGGED if score > self.high else Decision.UNDECIDED


def threshold_of(
    gauge: str, reference: NDArray[np.float64], rate: float, undecided: Band | float = Band.INTERVAL
) -> RowThreshold:
    """The lowest threshold above which no more than a share of the reference lies.

    Args:
        gauge: Trait and layer.
        reference: Values of clean rows; NaN is left out.
        rate: The share: 0.05 is the 95th percentile.
        undecided: A larger share: rows between both percentiles are undecided. ``interval``: those within the
            percentile's 95% interval, which rests on ranks alone; it ends at the largest reference row, however few
            there are. ``none``: no row.

    Raises:
        ScreeningError: If a share is none, or there are no reference rows.
    """
    check_rates(rate, undecided)
    known = np.sort(reference[np.isfinite(reference)])
    if not len(known):
        raise ScreeningError("no row of the reference set has a value, so that there is no threshold")
    value = _at(known, rate)
    if undecided is Band.NONE:
        return RowThreshold(gauge, rate, value, value, value, len(known))
    if undecided is Band.INTERVAL:
        ranks = stats.binom.ppf([0.025, 0.975], len(known), 1 - rate)
        low, high = (float(known[int(np.clip(rank, 0, len(known) - 1))]) for rank in ranks)
        return RowThreshold(gauge, rate, value, min(low, value), max(high, value), len(known))
    return RowThreshold(gauge, rate, value, _at(known, float(undecided)), value, len(known))


def check_rates(rate: float, undecided: Band | float) -> None:
    """Raise `ScreeningError` unless ``rate`` is a share and ``undecided`` a band or a larger share."""
    if not 0 < rate < 1:
        raise ScreeningError(f"a false-positive rate is above 0 and below 1, such as 0.05; got {rate:g}")
    if not isinstance(undecided, Band) and not rate < undecided < 1:
        raise ScreeningError(
            f"rows are undecided up to a rate above the false-positive rate {rate:g} and below 1; got {undecided:g}"
        )


def decide(thresholds: Sequence[RowThreshold], scores: Sequence[float]) -> Decision:
    """Flagged if any trait flags the row, else undecided if any is, else kept."""
    decisions = {each.decide(score) for each, score in zip(thresholds, scores, strict=True)}
    return next(each for each in (Decision.FLAGGED, Decision.UNDECIDED, Decision.KEPT) if each in decisions)


def _at(ordered: NDArray[np.float64], rate: float) -> float:
    return float(np.quantile(ordered, 1 - rate, method="inverted_cdf"))


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


RESULTS, RESULTS_WITHOUT_PYARROW = "results.parquet", "results.jsonl"
REJECTS, BASE = "rejects.jsonl", "base"

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
        with writing_lines(folder, RESULTS_WITHOUT_PYARROW) as append:
            yield append
        return
    import pyarrow as pa

    def kind(name: str) -> Any:
        return getattr(pa, _KINDS[name])() if name in _KINDS else pa.string() if name in _TEXTS else pa.float64()

    schema = pa.schema([(name, kind(name)) for name in columns])
    with folder.writing(RESULTS) as stream, writing_parquet(stream, schema) as write:
        yield write


@contextmanager
def writing_lines(folder: RunFolder, name: str) -> Iterator[Callable[[Iterable[Mapping[str, Any]]], None]]:
    """Write a JSONL file piece by piece."""
    with folder.writing(name) as stream:

        def append(rows: Iterable[Mapping[str, Any]]) -> None:
            stream.write(json_lines(rows))

        yield append


def reject_of(row: ScoredRow, name: str) -> dict[str, Any]:
    """A line of the rejects."""
    return {"dataset": name, "row": row.number, "line": row.line, "id": row.id, "problem": row.problem}


def base_of(row: ScoredRow) -> dict[str, Any]:
    """A line of a dataset's base responses, which another screening can be given."""
    samples = ["\n\n".join(answers) for answers in zip(*row.responses, strict=True)]
    said = {"responses": samples} if len(samples) > 1 else {"response": "".join(samples)}
    return {"row": row.number, "id": row.id, **said}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

"""`ScoredRow`: a row with its values, read back from what a run has saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_lens.runs import RunFolder
from persona_lens.screening.scoring import Unit

SCORES = "scores.jsonl"


class Quantity(StrEnum):
    """What is said of a row, in residual-stream units along a trait's unit vector (method, section 7)."""

    RAW = "raw"  # mean over the response's tokens
    DIFFERENCE = "difference"  # that, minus the same of the base model's own response
    PROMPT_DIFFERENCE = "prompt_difference"  # that, minus the projection of the last prompt token


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
    units = folder.each_row(SCORES)
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

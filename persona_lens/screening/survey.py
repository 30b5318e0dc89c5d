"""`Survey`: one pass over what was scored: means of datasets and groups, the reference, the labels, the extremes."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_lens.monitoring.transcripts import CALLS_TOOLS
from persona_lens.screening.labels import LabelledValues
from persona_lens.screening.means import StreamedMeans
from persona_lens.screening.scored import QUANTITIES, Quantity, ScoredRow
from persona_lens.statistics import Estimate

MOST_GROUPS = 50
OTHERS = "(others)"
NO_GROUP = "(none)"

Extreme = tuple[float, int, int]
"""Value, dataset and row."""


@dataclass
class Tally:
    """Rows of a dataset, or of a group of its rows."""

    means: StreamedMeans
    rows: int = 0
    rejected: int = 0
    tools: int = 0
    tokens: int = 0

    def add(self, rows: Sequence[ScoredRow], traits: int) -> None:
        """Take in rows."""
        self.rows += len(rows)
        self.rejected += sum(row.problem is not None for row in rows)
        self.tools += sum(CALLS_TOOLS in (row.problem or "") for row in rows)
        self.tokens += sum(row.tokens for row in rows)
        self.means.add(np.stack([row.values[:, :traits].ravel() for row in rows]))

    def to_json(self, gauges: Sequence[str]) -> dict[str, Any]:
        """Counts, and by gauge and quantity the mean with its interval."""
        found = iter(self.means.estimates())
        means: dict[str, dict[str, Any]] = {gauge: {} for gauge in gauges}
        for quantity in QUANTITIES:
            for gauge in gauges:
                estimate = next(found)
                means[gauge][quantity.value] = estimate.to_json() if isinstance(estimate, Estimate) else None
        counts = {"rows": self.rows, "rejected": self.rejected, "call_tools": self.tools, "tokens": self.tokens}
        return {**counts, "means": means}


@dataclass
class Survey:
    """What one pass over the rows finds; its memory grows by 8 bytes for each value of a reference or labelled row.

    Attributes:
        traits: How many gauges are of traits; those of random directions come behind them.
        gauges: How many there are.
        score: By which value rows are ranked and flagged.
        reference: Which datasets are clean references.
        top_k: How many extremes are kept on either side.
        seed: Of the bootstraps.
    """

    traits: int
    gauges: int
    score: Quantity
    reference: Collection[int]
    top_k: int
    seed: int = 0
    datasets: dict[int, Tally] = field(default_factory=dict)
    groups: dict[tuple[int, str], Tally] = field(default_factory=dict)
    top: list[list[Extreme]] = field(init=False)
    bottom: list[list[Extreme]] = field(init=False)
    labelled: LabelledValues = field(init=False)

    def __post_init__(self) -> None:
        self.top, self.bottom = [[] for _ in range(self.traits)], [[] for _ in range(self.traits)]
        self.labelled = LabelledValues(len(QUANTITIES) * self.gauges)
        self.lowest, self.highest = np.full(self.traits, np.inf), np.full(self.traits, -np.inf)
        self._reference: array[float] = array("d")

    @property
    def reference_scores(self) -> NDArray[np.float64]:
        """Float64 [rows, traits]."""
        return np.array(self._reference).reshape(-1, self.traits)

    def add(self, rows: Sequence[ScoredRow]) -> None:
        """Take in rows of one dataset."""
        number = rows[0].dataset
        tally = self.datasets.setdefault(number, self._new_tally(number))
        tally.add(rows, self.traits)
        self._group(number, rows)
        for row in rows:
            if row.problem is None:
                self._note(row)

    def _note(self, row: ScoredRow) -> None:
        scores = row.values[QUANTITIES.index(self.score), : self.traits]
        there = np.isfinite(scores)
        self.lowest = np.where(there, np.minimum(self.lowest, scores), self.lowest)
        self.highest = np.where(there, np.maximum(self.highest, scores), self.highest)
        if row.dataset in self.reference:
            self._reference.extend(scores.tolist())
            return
        if row.label is not None:
            self.labelled.add(row.label, row.values.ravel())
        for gauge in np.flatnonzero(there):
            score = float(scores[gauge])
            keep_largest(self.top[gauge], (score, -row.dataset, -row.number), self.top_k)
            keep_largest(self.bottom[gauge], (-score, -row.dataset, -row.number), self.top_k)

    def _group(self, number: int, rows: Sequence[ScoredRow]) -> None:
        members: dict[str, list[ScoredRow]] = {}
        for row in rows:
            if row.group is not None or any(each == number for each, _ in self.groups):
                members.setdefault(NO_GROUP if row.group is None else row.group, []).append(row)
        for group, found in members.items():
            full = sum(each == number for each, _ in self.groups) >= MOST_GROUPS
            key = (number, OTHERS if full and (number, group) not in self.groups else group)
            self.groups.setdefault(key, self._new_tally(number, len(self.groups) + 1)).add(found, self.traits)

    def _new_tally(self, *numbers: int) -> Tally:
        seed = np.random.SeedSequence((self.seed, *numbers)).generate_state(1)[0]
        return Tally(StreamedMeans(len(QUANTITIES) * self.traits, int(seed)))


def keep_largest(heap: list[Extreme], item: Extreme, most: int) -> None:
    """Add to a heap that holds the largest items only."""
    if len(heap) < most:
        heapq.heappush(heap, item)
    elif most and item > heap[0]:
        heapq.heapreplace(heap, item)

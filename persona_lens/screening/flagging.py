"""`Flagging`: how rows are ranked and flagged; and the pass that counts and draws what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_lens.screening.errors import ScreeningError
from persona_lens.screening.scored import Quantity, ScoredRow
from persona_lens.screening.settings import BaseResponses, ScreeningSettings
from persona_lens.screening.survey import Extreme, Survey, keep_largest
from persona_lens.screening.thresholds import Band, Decision, RowThreshold, check_rates, decide

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

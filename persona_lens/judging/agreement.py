"""Agreement: how far two judges, people among them, score the same responses alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from persona_lens.core.statistics import CORRELATION, PLAIN, SHARE, Scale, auc, jackknifed, pearson
from persona_lens.judging.blind import AgreementError, Scored, response_id, write_blinded
from persona_lens.judging.scored import read_scored

__all__ = [
    "Agreement",
    "AgreementError",
    "Counts",
    "Cuts",
    "Measure",
    "Pair",
    "Scored",
    "Sides",
    "compare",
    "read_scored",
    "response_id",
    "write_blinded",
]

LEAST = 3  # responses; with fewer, every measure is a coincidence
NORMAL_95 = 1.96
SCALES: dict[str, Scale] = {
    "pearson": CORRELATION,
    "spearman": CORRELATION,
    "pairwise_first": SHARE,
    "pairwise_second": SHARE,
    "mean_difference": PLAIN,
    "lower_limit": PLAIN,
    "upper_limit": PLAIN,
    "same_side": SHARE,
}
MEASURES = tuple(SCALES)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Cuts:
    """Where scores are cut into kinds; each of 0 to 100.

    Attributes:
        threshold: Responses are above it, if they score at least that much, or below: where the filter of an extraction
            keeps or drops them.
        high: A response that scores at least this is high-scored in the pairwise measures.
        low: One that scores at most this is low-scored there.
    """

    threshold: float = 50.0
    high: float = 80.0
    low: float = 20.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise AgreementError(
                f"high-scored responses must score above low-scored ones; got high {self.high:g} and low {self.low:g}"
            )


@dataclass(frozen=True)
class Measure:
    """A number with its 95% interval.

    Attributes:
        value: The number; None where it is not defined.
        low: Lower end; None where there is no interval.
        high: Upper end.
        n: What it rests on: responses, or pairs of responses.
        reason: Why the number or its interval is missing.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None


@dataclass(frozen=True)
class Counts:
    """What was matched, and what was left out.

    Attributes:
        matched: Responses that both sources hold, each counted once.
        only_first: Responses that only the first source holds.
        only_second: Responses that only the second source holds.
        repeated_first: Further scores of the same response in the first source; their mean is taken.
        repeated_second: The same in the second.
        scored: Matched responses with both scores; everything is measured on them.
        missing_first: Matched responses that only the first judge gave no score.
        missing_second: Matched responses that only the second judge gave no score.
        missing_both: Matched responses that neither gave a score.
        refused_first: Matched responses that the first judge took for a refusal and the second did not.
        refused_second: Those that only the second took for a refusal.
        refused_both: Those that both took for a refusal.
    """

    matched: int
    only_first: int
    only_second: int
    repeated_first: int
    repeated_second: int
    scored: int
    missing_first: int
    missing_second: int
    missing_both: int
    refused_first: int
    refused_second: int
    refused_both: int


@dataclass(frozen=True)
class Sides:
    """On which side of the threshold the two scores of a response are; a score equal to it is above.

    Attributes:
        both_above: Responses that both judges score at least the threshold.
        both_below: Responses that both score below it.
        first_above: Responses that only the first scores at least the threshold.
        second_above: Responses that only the second does.
    """

    both_above: int
    both_below: int
    first_above: int
    second_above: int


@dataclass(frozen=True)
class Pair:
    """A response with both scores."""

    id: str
    question: str
    response: str
    first: float
    second: float

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first


@dataclass(frozen=True)
class Agreement:
    """How two judges compare.

    Attributes:
        names: What the two sources are called.
        counts: What was matched and what was not.
        pairs: The responses with both scores, in the order of the first source.
        questions: Different questions among them; intervals are over questions, each with all its responses.
        cuts: What counts as above, high and low.
        pearson: Correlation of the scores.
        spearman: Correlation of their ranks.
        pairwise_first: Of all pairs of a response that the first judge scores high and one that it scores low, the
            share in which the second judge scores the former higher, ties counting half; 0.5 is chance.
        pairwise_second: The same with the judges exchanged.
        mean_difference: Second score minus first, in points.
        lower_limit: Bland and Altman's lower 95% limit of agreement: mean difference minus 1.96 standard deviations.
        upper_limit: The upper one.
        same_side: Share of the responses whose scores are on the same side of the threshold.
        sides: Counts by side of the threshold.
    """

    names: tuple[str, str]
    counts: Counts
    pairs: tuple[Pair, ...]
    questions: int
    cuts: Cuts
    pearson: Measure
    spearman: Measure
    pairwise_first: Measure
    pairwise_second: Measure
    mean_difference: Measure
    lower_limit: Measure
    upper_limit: Measure
    same_side: Measure
    sides: Sides

    def most_disagreed(self, n: int = 10) -> list[Pair]:
        """The responses whose two scores are furthest apart, the furthest first."""
        return sorted(self.pairs, key=lambda pair: -abs(pair.difference))[:n]

    def to_json(self) -> dict[str, Any]:
        """All numbers by name, without the responses."""
        values = asdict(replace(self, pairs=()))
        del values["pairs"]
        shown = ("id", "question", "first", "second")
        disagreed = [{name: getattr(pair, name) for name in shown} for pair in self.most_disagreed()]
        return values | {"most_disagreed": disagreed}


def compare(
    first: Sequence[Scored],
    second: Sequence[Scored],
    *,
    names: tuple[str, str] = ("first", "second"),
    cuts: Cuts | None = None,
    seed: int = 0,
) -> Agreement:
    """Compare two judges' scores of the same responses.

    Responses are matched by their id. 95% intervals are over questions (`jackknifed`): responses to one question
    resemble each other, so they are taken together.

    Args:
        first: One judge's scores.
        second: The other's.
        names: What to call the two.
        cuts: What counts as above, high and low; see `Cuts`.
        seed: Of the resampling.

    Raises:
        AgreementError: If no response is in both, or none of them has both scores.
    """
    cuts = cuts or Cuts()
    ones, others = _by_id(first), _by_id(second)
    matched = [key for key in ones if key in others]
    counts = _count(first, second, ones, others, matched)
    if not matched:
        raise AgreementError(
            f"no response of {names[0]} ({len(ones)}) is in {names[1]} ({len(others)}): question and response must be "
            "the same texts in both"
        )
    pairs = tuple(pair for key in matched if (pair := _pair(ones[key], others[key])))
    if not pairs:
        raise AgreementError(
            f"{len(matched)} responses are in both {names[0]} and {names[1]}, but none of them has a score in both"
        )
    x = np.array([pair.first for pair in pairs])
    y = np.array([pair.second for pair in pairs])
    questions = [pair.question for pair in pairs]
    measures = _measure(x, y, questions, names, cuts, seed)
    above = list(zip((x >= cuts.threshold).tolist(), (y >= cuts.threshold).tolist(), strict=True))
    sides = Sides(
        both_above=above.count((True, True)),
        both_below=above.count((False, False)),
        first_above=above.count((True, False)),
        second_above=above.count((False, True)),
    )
    return Agreement(names, counts, pairs, len(set(questions)), cuts, sides=sides, **measures)


def _by_id(scored: Sequence[Scored]) -> dict[str, Scored]:
    """One entry a response, with the mean of its scores."""
    groups: dict[str, list[Scored]] = {}
    for each in scored:
        groups.setdefault(each.id, []).append(each)
    found = {}
    for key, group in groups.items():
        scores = [each.score for each in group if each.score is not None]
        found[key] = replace(group[0], score=fmean(scores), reason=None) if scores else group[0]
    return found


def _count(
    first: Sequence[Scored],
    second: Sequence[Scored],
    ones: Mapping[str, Scored],
    others: Mapping[str, Scored],
    matched: Sequence[str],
) -> Counts:
    missing = [(ones[key].score is None, others[key].score is None) for key in matched]
    refused = [(ones[key].refused, others[key].refused) for key in matched]
    return Counts(
        matched=len(matched),
        only_first=len(ones) - len(matched),
        only_second=len(others) - len(matched),
        repeated_first=len(first) - len(ones),
        repeated_second=len(second) - len(others),
        scored=missing.count((False, False)),
        missing_first=missing.count((True, False)),
        missing_second=missing.count((False, True)),
        missing_both=missing.count((True, True)),
        refused_first=refused.count((True, False)),
        refused_second=refused.count((False, True)),
        refused_both=refused.count((True, True)),
    )


def _pair(one: Scored, other: Scored) -> Pair | None:
    if one.score is None or other.score is None:
        return None
    # A table that people filled in keeps the id whatever became of the text; show the text that is still whole.
    whole = one if response_id(one.question, one.response) == one.id else other
    return Pair(one.id, whole.question, whole.response, one.score, other.score)


def _measure(
    x: Values, y: Values, questions: Sequence[str], names: tuple[str, str], cuts: Cuts, seed: int
) -> dict[str, Measure]:
    sizes = dict.fromkeys(MEASURES, len(x)) | {
        "pairwise_first": _n_pairs(x, cuts),
        "pairwise_second": _n_pairs(y, cuts),
    }
    if len(x) < LEAST:
        why = f"only {len(x)} of the responses {'has' if len(x) == 1 else 'have'} both scores; {LEAST} are needed"
        return {key: Measure(None, None, None, n, why) for key, n in sizes.items()}
    found = jackknifed(
        lambda rows: np.array([*_statistics(x[rows], y[rows], cuts).values()]), questions, [*SCALES.values()], seed
    )
    several = len(set(questions)) > 1
    without = "too few responses for an interval" if several else "one question only, so there is no interval"
    undefined = _why_undefined(x, y, names, cuts)
    measures = {}
    for (key, value), ends in zip(_statistics(x, y, cuts).items(), found, strict=True):
        if not np.isfinite(value):
            measures[key] = Measure(None, None, None, sizes[key], undefined[key])
        else:
            low, high = ends or (None, None)
            measures[key] = Measure(value, low, high, sizes[key], None if ends else without)
    return measures


def _statistics(x: Values, y: Values, cuts: Cuts) -> dict[str, float]:
    """Every measure of some responses; NaN where one is not defined."""
    difference = y - x
    mean = float(difference.mean())
    reach = NORMAL_95 * float(difference.std(ddof=1)) if len(difference) > 1 else float("nan")
    return {
        "pearson": float(pearson(x, y)),
        "spearman": float(pearson(rankdata(x), rankdata(y))),
        "pairwise_first": _pairwise(x, y, cuts),
        "pairwise_second": _pairwise(y, x, cuts),
        "mean_difference": mean,
        "lower_limit": mean - reach,
        "upper_limit": mean + reach,
        "same_side": float(np.mean((x >= cuts.threshold) == (y >= cuts.threshold))),
    }


def _why_undefined(x: Values, y: Values, names: tuple[str, str], cuts: Cuts) -> dict[str, str]:
    constant = " and ".join(name for name, scores in zip(names, (x, y), strict=True) if np.ptp(scores) == 0)
    missing = f"scores no response {cuts.high:g} or more, or none {cuts.low:g} or less"
    return dict.fromkeys(("pearson", "spearman"), f"all scores of {constant} are the same") | {
        "pairwise_first": f"{names[0]} {missing}",
        "pairwise_second": f"{names[1]} {missing}",
    }


def _pairwise(chooser: Values, other: Values, cuts: Cuts) -> float:
    """In what share of the chooser's pairs of a high and a low response the other agrees; NaN if it has none."""
    above, below = other[chooser >= cuts.high], other[chooser <= cuts.low]
    return auc(above, below) if len(above) and len(below) else float("nan")


def _n_pairs(chooser: Values, cuts: Cuts) -> int:
    return int(np.sum(chooser >= cuts.high) * np.sum(chooser <= cuts.low))

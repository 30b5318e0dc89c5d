"""Intervals hold what they promise, on samples drawn from distributions whose means are known."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from persona_lens.core.statistics import (
    CORRELATION,
    PLAIN,
    SCORES,
    SHARE,
    SHARE_CHANGES,
    Estimate,
    Scale,
    auc,
    auc_interval,
    bootstrap_mean,
    clear_side,
    crossed_interval,
    few,
    jackknifed,
    large_mean,
    pearson,
    verdict_of,
)

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
SAMPLES = 300
# By name: how scores of 0 to 100 fall, and their mean.
KINDS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, n: rng.normal(50, 10, n), 50),
    "skewed to 0": (lambda rng, n: 100 * rng.beta(0.5, 3, n), 100 / 7),
    "skewed to 100": (lambda rng, n: 100 * rng.beta(5, 1, n), 500 / 6),
    "three of five at 0": (lambda rng, n: np.where(rng.random(n) < 0.6, 0, 100 * rng.random(n)), 20),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_interval_of_a_mean_covers(kind: str) -> None:
    """At least 94%; of a few hundred samples of one size a little less may come out by chance."""
    draw, mean = KINDS[kind]
    rng = np.random.default_rng(5)
    covered = {}
    for n in (5, 8, 12, 20):
        found = [bootstrap_mean(draw(rng, n).tolist(), within=SCORES) for _ in range(SAMPLES)]
        covered[n] = float(np.mean([each.low - 1e-9 <= mean <= each.high + 1e-9 for each in found]))
    assert np.mean(list(covered.values())) >= 0.94, covered
    assert min(covered.values()) >= 0.92, covered


def test_the_interval_of_many_is_that_of_large_samples() -> None:
    values = np.random.default_rng(0).gamma(2.0, 10.0, size=3000)
    found = bootstrap_mean(values.tolist())
    expected = large_mean(float(values.mean()), float(((values - values.mean()) ** 2).sum()), 3000)
    assert found.mean == pytest.approx(expected.mean)
    assert found.n == 3000
    assert found.low == pytest.approx(expected.low, abs=0.1 * (expected.high - expected.low))
    assert found.high == pytest.approx(expected.high, abs=0.1 * (expected.high - expected.low))
    assert found.low < found.mean < found.high


def test_scores_that_saturate_have_an_interval() -> None:
    top = bootstrap_mean([100.0] * 5, within=SCORES)
    assert (top.mean, top.high, top.n) == (100, 100, 5)
    assert top.low == pytest.approx(100 * 0.05**0.2)
    assert bootstrap_mean([50.0] * 5, within=SCORES) == Estimate(50, 50, 50, 5)
    one_off = bootstrap_mean([0.0, 0.0, 0.0, 0.0, 100.0], within=SCORES)
    assert (one_off.low, one_off.mean) == (0, 20)
    assert 60 < one_off.high <= 100
    tiny = bootstrap_mean([1.0, 1.0 + 1e-12, 1.0 - 1e-12])
    assert tiny.low < 1 < tiny.high


@pytest.mark.parametrize(("lost", "won", "n"), [(0.05, 0.01, 120), (0.1, 0.1, 60), (0.2, 0.05, 20), (0.02, 0.0, 400)])
def test_few_answers_that_change_have_an_interval(lost: float, won: float, n: int) -> None:
    """Where resamples that missed the few that changed made the bootstrap's reach to the end of the scale."""
    rng = np.random.default_rng(2)
    drawn = rng.choice([-1.0, 0.0, 1.0], p=[lost, 1 - lost - won, won], size=(600, n))
    found = [bootstrap_mean(row.tolist(), within=SHARE_CHANGES) for row in drawn]
    assert np.mean([each.low <= won - lost <= each.high for each in found]) >= 0.93
    one = bootstrap_mean([-1.0, *[0.0] * 119], within=SHARE_CHANGES)
    down, up = 2 / 122, 1 / 122  # of 120 answers one changed, and one more each way
    reach = stats.norm.ppf(0.975) * np.sqrt((down + up - (up - down) ** 2) / 122)
    assert (one.low, one.mean, one.high) == pytest.approx((up - down - reach, -1 / 120, up - down + reach))
    none = bootstrap_mean([0.0] * 120, within=SHARE_CHANGES)
    assert none.low == -none.high
    assert 0.02 < none.high < 0.03  # three of 120 could have changed


def test_correlations_shares_and_tables_cover() -> None:
    """Where percentile intervals held the truth in 82% to 90% of such samples."""
    rng = np.random.default_rng(1)
    covered: dict[str, list[bool]] = {"r": [], "share": [], "auc": [], "crossed": []}
    where = np.repeat(np.arange(8), 6).tolist()

    def held(statistic: Callable[[NDArray[np.intp]], float], scale: Scale, truth: float) -> bool:
        (ends,) = jackknifed(lambda rows: np.array([statistic(rows)]), where, scale)
        return ends is not None and ends[0] <= truth <= ends[1]

    def correlation(x: NDArray[np.float64], y: NDArray[np.float64], rows: NDArray[np.intp]) -> float:
        return float(pearson(x[rows], y[rows]))

    def share(shown: NDArray[np.float64], rows: NDArray[np.intp]) -> float:
        return float(shown[rows].mean())

    for _ in range(150):
        question, condition = np.repeat(rng.normal(size=8), 6), np.tile(np.linspace(-1.5, 1.5, 6), 8)
        x, y = (condition + 0.7 * question + rng.normal(size=48) for _ in range(2))
        truth = (1.05 + 0.49) / (1.05 + 0.49 + 1)  # variance of conditions and of questions over that with the noise
        covered["r"].append(held(partial(correlation, x, y), CORRELATION, truth))
        shown = (question + rng.normal(size=48) > 0).astype(float)
        covered["share"].append(held(partial(share, shown), SHARE, 0.5))
        low, high = auc_interval(rng.normal(1, 1, 8), rng.normal(0, 1, 12))
        covered["auc"].append(bool(low <= stats.norm.cdf(1 / np.sqrt(2)) <= high))
        table = rng.normal(0, 5, (3, 1)) + rng.normal(0, 15, (1, 8)) + rng.normal(0, 15, (3, 8))
        low, high = crossed_interval(table)
        covered["crossed"].append(bool(low <= 0 <= high))
    shares = {name: float(np.mean(found)) for name, found in covered.items()}
    assert min(shares.values()) >= 0.92, shares


def test_of_a_mean_the_jackknife_is_the_interval_of_the_mean() -> None:
    values = np.random.default_rng(3).normal(size=9)
    (ends,) = jackknifed(lambda rows: np.array([values[rows].mean()]), range(9), PLAIN)
    expected = bootstrap_mean(values.tolist())
    assert ends is not None
    assert list(ends) == pytest.approx([expected.low, expected.high])
    assert jackknifed(lambda rows: np.array([values[rows].mean()]), [0] * 9, PLAIN) == [None]
    assert jackknifed(lambda rows: np.array([np.nan]), range(9), PLAIN) == [None]


def test_an_auc_is_the_nearest_number_to_a_share_of_pairs() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        positive, negative = (rng.integers(0, 9, rng.integers(3, 40)).astype(float) for _ in range(2))
        wins = sum(Fraction(int(a > b)) + Fraction(int(a == b), 2) for a in positive for b in negative)
        assert auc(positive, negative) == float(wins / (len(positive) * len(negative)))
        assert auc(np.flip(positive), negative) == auc(positive, negative)


def test_an_auc_of_one_is_no_certainty_of_few_rows() -> None:
    high, low = np.array([3.0, 4.0]), np.array([1.0, 2.0, 2.5])
    assert auc(high, low) == 1
    assert list(auc_interval(high, low)) == pytest.approx([0.05**0.5, 1])
    assert list(auc_interval(low, high)) == pytest.approx([0, 1 - 0.05**0.5])


def test_clear_has_one_meaning() -> None:
    up, down, none = (Estimate(mean, mean - 2, mean + 2, 9) for mean in (5.0, -5.0, 1.0))
    assert [clear_side(up, each) for each in (up, down, none, None)] == [1, 0, 0, 0]
    assert clear_side(down, down) == -1
    assert clear_side(Estimate(5, 5, 5, 1), up) == 0
    assert [verdict_of(up, each) for each in (up, none, None)] == ["clear", "unclear", "no null"]
    assert [verdict_of(down, each) for each in (down, None)] == ["reversed", "reversed"]
    assert verdict_of(down, down, -1) == "clear"
    assert verdict_of(none, None) == "unclear"


def test_few_is_said() -> None:
    assert [few(n) for n in (1, 4, 5)] == ["only 1 question", "only 4 questions", ""]
    assert few(2, "model") == "only 2 models"

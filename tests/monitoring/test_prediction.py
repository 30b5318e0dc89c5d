"""Correlations whose values are known by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from persona_lens.core.statistics import bootstrap_mean, pearson
from persona_lens.monitoring.prediction import Measured, correlate

X = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
Y = np.array([2.0, 1.0, 4.0, 3.0, 5.0])  # r by hand: deviations multiply to 8, squares sum to 10 and 10


def test_pearson_by_column() -> None:
    assert float(pearson(X, Y)) == pytest.approx(0.8)
    columns = np.column_stack([X, -X, np.full(5, 3.0), X * 1e-12 + 1])
    found = pearson(columns, Y)
    assert found[:2] == pytest.approx([0.8, -0.8])
    assert np.isnan(found[2])
    assert found[3] == pytest.approx(0.8, abs=1e-3)
    assert np.isnan(pearson(X, np.ones(5)))


def test_overall_and_within_conditions() -> None:
    # Two conditions far apart; within each the order is turned round.
    x = np.array([0.0, 1, 2, 10, 11, 12])
    y = np.array([12.0, 11, 10, 92, 91, 90])
    found = correlate(x[:, None], y, ["a"] * 3 + ["b"] * 3, [0, 1, 2] * 2, [7])
    at = found.at(7)
    # Sums of squares: 4 within and 150 between; 4 within and 9600 between. Products: -4 within, 1200 between.
    assert at.pearson.value == pytest.approx((1200 - 4) / np.sqrt((150 + 4) * (9600 + 4)))
    assert at.within_pearson.value == pytest.approx(-1)
    assert at.within_spearman.value == pytest.approx(-1)
    assert at.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert (found.within, found.left_out, found.prompts) == (("a", "b"), (), 6)
    assert at.null is None
    assert found.best_null is None


def test_conditions_whose_scores_hardly_vary_are_left_out_and_named() -> None:
    x = np.array([0.0, 1, 2, 10, 11, 12])
    y = np.array([50.0, 50.5, 51, 60, 80, 90])  # a standard deviation of 0.5 in the first
    found = correlate(x[:, None], y, ["a"] * 3 + ["b"] * 3, [0, 1, 2] * 2, [0])
    assert (found.within, found.left_out) == (("b",), ("a",))
    assert found.at(0).within_pearson.value == pytest.approx(float(pearson(x[3:], y[3:])))
    assert correlate(x[:, None], y / 100, ["a"] * 3 + ["b"] * 3, [0, 1, 2] * 2, [0]).at(0).within_pearson == Measured(
        None, None, None
    )


def test_intervals_are_over_questions_with_all_their_conditions() -> None:
    rng = np.random.default_rng(3)
    questions = [0, 1, 2, 3, 4, 5] * 2
    effect = np.repeat([0.0, 30.0], 6)
    y = effect + rng.normal(0, 5, 12)
    x = effect + rng.normal(0, 5, 12)
    found = correlate(x[:, None], y, ["a"] * 6 + ["b"] * 6, questions, [0], seed=1).at(0).pearson
    # By hand: Fisher's z with each question left out, in both of its conditions.
    kept = [np.array([row for row in range(12) if questions[row] != left]) for left in range(6)]
    z = np.arctanh(float(pearson(x, y)))
    pseudo = 6 * z - 5 * np.arctanh([float(pearson(x[rows], y[rows])) for rows in kept])
    of = bootstrap_mean(pseudo.tolist(), seed=1)
    assert found.low == pytest.approx(np.tanh(z + of.low - of.mean))
    assert found.high == pytest.approx(np.tanh(z + of.high - of.mean))
    assert correlate(x[:, None], y, ["a"] * 12, [0] * 12, [0]).at(0).pearson.low is None


def test_random_directions_have_a_mean_a_range_and_the_best_of_all_layers() -> None:
    null = np.stack([np.column_stack([X, -X, Y]), np.column_stack([Y, X, -X])], axis=2)  # [prompts, directions, layers]
    found = correlate(np.column_stack([X, X]), Y, ["a"] * 5, list(range(5)), [0, 1], null)
    first = found.at(0).null
    assert first is not None
    assert first.mean == pytest.approx((0.8 - 0.8 + 1) / 3)
    assert first.n == 3
    assert (first.low, first.high) == pytest.approx(tuple(np.percentile([0.8, -0.8, 1], [2.5, 97.5])))
    assert found.best_null is not None
    assert found.best_null.mean == pytest.approx((1 + 0.8 + 1) / 3)
    within = found.at(1).within_null
    assert within is not None
    assert within.mean == pytest.approx((1 + 0.8 - 0.8) / 3)

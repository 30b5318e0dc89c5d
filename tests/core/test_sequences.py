"""A bound on a mean that holds at every look: what is simulated here is what may be claimed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_lens.core.sequences import mean_at_most
from persona_lens.core.statistics import CHANGES, SCORES, SHARES

DRAWN: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "even": lambda rng, n: rng.uniform(size=n),
    "right or wrong": lambda rng, n: (rng.uniform(size=n) < 0.7).astype(float),
    "mostly low": lambda rng, n: rng.beta(0.3, 2.0, size=n),
    "saturated": lambda rng, n: np.clip(rng.normal(0.95, 0.15, size=n), 0, 1),
    "of two kinds": lambda rng, n: np.where(rng.uniform(size=n) < 0.5, 0.1, 0.9),
}
MEANS = {"even": 0.5, "right or wrong": 0.7, "mostly low": 0.3 / 2.3, "of two kinds": 0.5}


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("population", [8, 20])
def test_the_mean_of_a_population_is_below_the_bound_at_every_look(kind: str, population: int) -> None:
    rng, wrong, repeats = np.random.default_rng(0), 0, 600
    for _ in range(repeats):
        values = DRAWN[kind](rng, population)
        # The bound never rises again, so that the last of the looks but for the one that sees all stands for each.
        wrong += mean_at_most(values[:-1].tolist(), SHARES, population=population) < values.mean() - 1e-6
    assert wrong / repeats <= 0.05


@pytest.mark.parametrize("kind", MEANS)
def test_the_mean_of_independent_values_is_below_the_bound_at_every_look(kind: str) -> None:
    rng, repeats = np.random.default_rng(1), 400
    # The bound only ever falls, so that the last of the looks stands for all of them.
    lowest = [mean_at_most(DRAWN[kind](rng, 60).tolist(), SHARES) for _ in range(repeats)]
    assert sum(bound < MEANS[kind] for bound in lowest) / repeats <= 0.05


def test_looking_again_and_again_at_the_usual_interval_would_be_wrong_too_often() -> None:
    """What the sequence is for: the simulation above can fail."""
    rng, wrong, repeats = np.random.default_rng(2), 0, 400
    for _ in range(repeats):
        values = DRAWN["right or wrong"](rng, 60)
        counts = np.arange(5, 61)
        means = np.cumsum(values)[4:] / counts
        wrong += bool((means + 1.645 * np.sqrt(0.21 / counts) < 0.7).any())
    assert wrong / repeats > 0.1


def test_the_bound_tightens_and_is_the_mean_once_all_have_come() -> None:
    scores = [30.0, 10.0, 20.0, 40.0, 25.0, 30.0, 15.0, 30.0]
    bounds = [mean_at_most(scores[:n], SCORES, population=8) for n in range(9)]  # what was known once stays known
    assert bounds[0] == 100.0
    assert bounds[8] == pytest.approx(25.0, abs=1e-6)
    assert all(later <= earlier for earlier, later in pairwise(bounds))
    for n, bound in enumerate(bounds):  # never more than if all others were as good as can be
        assert bound <= (sum(scores[:n]) + 100 * (8 - n)) / 8 + 1e-6
    assert bounds[4] < 60 < mean_at_most(scores[:4], SCORES) < 100  # what is not drawn again is known, too
    assert mean_at_most(scores[:4], SCORES, population=8, risk=0.5) < bounds[4]


def test_many_values_say_nearly_what_the_mean_is() -> None:
    values = np.random.default_rng(3).uniform(size=4000)
    assert 0.5 < mean_at_most(values.tolist(), SHARES) < 0.6
    assert mean_at_most((-100 + 200 * values).tolist(), CHANGES) == pytest.approx(
        -100 + 200 * mean_at_most(values.tolist(), SHARES), abs=1e-6
    )


@pytest.mark.parametrize("values", [[100.0] * 8, [100.0] * 3, []])
def test_the_best_there_is_leaves_the_bound_at_the_end_of_the_scale(values: list[float]) -> None:
    assert mean_at_most(values, SCORES, population=8) == pytest.approx(100.0, abs=1e-6)
    assert mean_at_most(values, SCORES) == 100.0


def test_the_worst_there_is_leaves_what_has_not_come() -> None:
    assert mean_at_most([0.0] * 8, SCORES, population=8) == pytest.approx(0.0, abs=1e-6)
    assert mean_at_most([0.0] * 4, SCORES, population=8) <= 50.0
    assert 0 < mean_at_most([0.0] * 4, SCORES) < 70


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="values are from 0 to 100"):
        mean_at_most([101.0], SCORES)
    with pytest.raises(ValueError, match="values are from 0 to 100"):
        mean_at_most([float("nan")], SCORES)
    with pytest.raises(ValueError, match="3 values of a population of 2"):
        mean_at_most([1.0] * 3, SCORES, population=2)

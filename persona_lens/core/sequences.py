"""`mean_at_most`: a bound on a mean that holds at every look at once, however often somebody looks.

Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (2023). Whether a mean is as large as
m is tested by betting on each value, as it comes, that it is smaller. If the mean is m or more, no such bets can be
expected to win, so by Ville's inequality the wealth ever exceeds 1 / risk with a chance of at most ``risk``. The bound
is the least m against which that much was won. `tests/core/test_sequences.py` simulates the coverage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from persona_lens.core.statistics import LEVEL, Ends, Values

# Shares of the most that may be bet. Their mean is a bet too, so that the best of them need not be known beforehand.
_SHARES = np.array([0.25, 0.5, 0.75, 1.0])
_HALVINGS = 40
_ROUNDING = 1e-9


def mean_at_most(
    values: Sequence[float], within: Ends, *, population: int | None = None, risk: float = 1 - LEVEL
) -> float:
    """What the mean is at most: the bound is below the mean at any look with a chance of at most ``risk``.

    Args:
        values: In the order in which they came.
        within: Ends of what a value can be, such as `persona_lens.core.statistics.SCORES`.
        population: How many values there are altogether, if these were drawn from so many without putting any back; the
            mean is then that of all of them, and is known once all have come. None draws them independently.
        risk: See above.

    Raises:
        ValueError: If a value is outside, or there are more than ``population``.
    """
    low, high = within
    data = (np.asarray(values, dtype=np.float64) - low) / (high - low)
    if population is not None and len(data) > population:
        raise ValueError(f"{len(data)} values of a population of {population}")
    if len(data) and not (data.min() >= 0 and data.max() <= 1):
        raise ValueError(f"values are from {low:g} to {high:g}")
    below, above = 0.0, 1.0
    enough = -np.log(risk)
    if _log_wealth(data, above, population) < enough:
        return high
    for _ in range(_HALVINGS):  # the wealth grows with the mean that is bet against
        middle = (below + above) / 2
        below, above = (below, middle) if _log_wealth(data, middle, population) >= enough else (middle, above)
    return low + above * (high - low)


def _log_wealth(data: Values, mean: float, population: int | None) -> float:
    """Log of the most that was ever won by betting that values in 0 to 1 are below this mean.

    Infinite if no such values can have it.
    """
    if not len(data):
        return 0.0
    # What the values that are still to come have on average, before each one: with none put back, others than these.
    if population is None:
        expected = np.full(len(data), mean)
        impossible = mean >= 1 and bool((data < 1).any())
    else:
        left = population - np.arange(len(data) + 1)
        rest = population * mean - np.concatenate([[0.0], np.cumsum(data)])
        expected = np.clip(rest[:-1] / left[:-1], 0, 1)
        impossible = bool((rest > left + _ROUNDING).any())
    if impossible:
        return float("inf")
    certain = expected > 1 - _ROUNDING  # nothing below can come, so there is nothing to bet on
    odds = np.where(certain, 1.0, (1 - data) / np.where(certain, 1.0, 1 - expected))
    with np.errstate(divide="ignore"):  # all may be lost
        won = np.cumsum(np.log1p(np.outer(_SHARES, odds - 1)), axis=1)
    return max(0.0, float(np.logaddexp.reduce(won, axis=0).max() - np.log(len(_SHARES))))

"""What is said for an axis: planted roles are found, and shuffled ones are not."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lens.vectors.axis_evidence import AxisEvidence, axis_evidence

ROLES, QUESTIONS, WIDTH = 24, 4, 40


def planted(spread: float, default: float, seed: int = 0) -> AxisEvidence:
    """Roles spread along one direction, the default at a place on it; noise by question."""
    rng = np.random.default_rng(seed)
    direction = np.zeros(WIDTH)
    direction[3] = 1
    at = np.concatenate([[default], spread * rng.normal(size=ROLES)])
    noise = 0.3 * rng.normal(size=(1 + ROLES, QUESTIONS, WIDTH))
    means = rng.normal(size=(1, QUESTIONS, WIDTH)) + at[:, None, None] * direction + noise
    counts = rng.integers(2, 6, size=(1 + ROLES, QUESTIONS)).astype(float)
    return axis_evidence(5, means * counts[:, :, None], counts)


def test_an_axis_along_which_roles_are_spread_is_found_and_the_default_at_its_end() -> None:
    found = planted(spread=2, default=9)
    assert found.layer == 5
    assert found.length > 5
    assert found.cosine.low > found.cosine_null
    assert found.cosine.mean > 0.95
    assert found.from_end.mean == 0.0
    assert found.axis_halves is not None
    assert found.axis_halves_null is not None
    assert found.axis_halves.low > found.axis_halves_null
    assert found.role_halves is not None
    assert found.role_halves_null is not None
    assert found.role_halves.low > found.role_halves_null


def test_where_nobody_differs_nothing_is_found() -> None:
    clear = 0
    for seed in range(10):
        found = planted(spread=0, default=0, seed=seed)
        assert found.role_halves is not None
        assert found.role_halves_null is not None
        clear += found.role_halves.low > found.role_halves_null
    assert clear <= 2


def test_in_the_middle_of_the_roles_the_default_is_far_from_an_end() -> None:
    assert planted(spread=2, default=0.1).from_end.mean > 0.25


def test_one_question_and_roles_of_one_half_have_no_halves() -> None:
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(size=(5, 1, 8)), np.ones((5, 1))
    assert axis_evidence(0, sums, counts).axis_halves is None
    counts = np.array([[1.0, 1.0], [1, 0], [0, 1], [1, 0], [0, 1]])
    sums = rng.normal(size=(5, 2, 8)) * counts[:, :, None]
    assert axis_evidence(0, sums, counts).axis_halves is None


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_roles_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sums, counts = rng.normal(size=(6, 3, 8)), np.ones((6, 3))
    order = [0, *(1 + rng.permutation(5))]
    one, other = axis_evidence(0, sums, counts), axis_evidence(0, sums[order], counts[order])
    assert one.cosine.mean == pytest.approx(other.cosine.mean)
    assert one.role_halves is not None
    assert other.role_halves is not None
    assert one.role_halves.mean == pytest.approx(other.role_halves.mean)

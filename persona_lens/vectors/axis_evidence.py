"""`AxisEvidence`: what speaks for an axis at one layer, beside what permuted labels would bring.

Under the null the labels of roles and of the default are shuffled within each question, so that nothing of who spoke is
left, and everything else is as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import nan

import numpy as np
from numpy.typing import NDArray

from persona_lens.core.documents import Record
from persona_lens.core.statistics import CORRELATION, SHARES, Estimate, Scale, bootstrap_mean, jackknife_interval

PERMUTATIONS = 100
SPLITS = 20
IN_RANGE = Scale(np.asarray, np.asarray, SHARES)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class AxisEvidence(Record):
    """One layer's. Intervals are 95% and over roles; a null is what 95% of permuted labels stay within.

    Attributes:
        layer: Block index, 0-based.
        length: Of the axis, in residual-stream units.
        cosine: Of the axis and the roles' first principal component, whose sign is such that it is not negative.
        cosine_null: What 95% of permuted labels stay below.
        from_end: How far the default is from the nearer end of the roles' range on that component, as a share of it.
        from_end_null: What 95% of permuted labels stay above.
        axis_halves: Cosine of the axes of two halves of the questions, mean over splits.
        axis_halves_null: What 95% of permuted labels stay below.
        role_halves: Cosine of a role's vectors from two halves, after subtracting each half's mean; mean over roles.
        role_halves_null: What 95% of permuted labels stay below.
    """

    layer: int
    length: float
    cosine: Estimate
    cosine_null: float
    from_end: Estimate
    from_end_null: float
    axis_halves: Estimate | None = None
    axis_halves_null: float | None = None
    role_halves: Estimate | None = None
    role_halves_null: float | None = None


def axis_evidence(layer: int, sums: Array, counts: Array, seed: int = 0) -> AxisEvidence:
    """What speaks for the axis at a layer.

    Args:
        layer: Block index, 0-based.
        sums: float64 [1 + roles, questions, d_model]: of the default first, then of each role, the responses' mean
            residuals, added up over the responses to each question.
        counts: float64 [1 + roles, questions]: how many those are; none for a question that nobody kept.
        seed: Of splits and permutations.
    """
    rng = np.random.default_rng(seed)
    means = _means(sums, counts)
    cosine, from_end = _first(means)
    without = np.array([_first(np.delete(means, role, axis=0)) for role in range(1, len(means))])
    splits = _splits(sums.shape[1], rng)
    nulls = np.array([_permuted(sums, counts, splits, rng) for _ in range(PERMUTATIONS)])
    found = AxisEvidence(
        layer,
        float(np.linalg.norm(means[0] - means[1:].mean(axis=0))),
        _estimated(cosine, without[:, 0], CORRELATION),
        float(np.quantile(nulls[:, 0], 0.95)),
        _estimated(from_end, without[:, 1], IN_RANGE),
        float(np.quantile(nulls[:, 1], 0.05)),
    )
    if not len(splits):
        return found
    axis, without_each, roles = _halves(sums, counts, splits)
    played = roles[np.isfinite(roles)]
    known = nulls[np.isfinite(nulls[:, 2:]).all(axis=1), 2:]
    if not np.isfinite(axis) or not len(played) or not len(known):  # nobody is in both halves
        return found
    high = np.quantile(known, 0.95, axis=0)
    return replace(
        found,
        axis_halves=_estimated(axis, without_each, CORRELATION),
        axis_halves_null=float(high[0]),
        role_halves=bootstrap_mean(played.tolist(), within=(-1.0, 1.0)),
        role_halves_null=float(high[1]),
    )


def _estimated(value: float, without: Array, scale: Scale) -> Estimate:
    ends = jackknife_interval(value, without, scale)
    low, high = (value, value) if ends is None else ends
    return Estimate(value, low, high, len(without))


def _means(sums: Array, counts: Array) -> Array:
    """The mean residual of each group over all its responses; NaN where it has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = sums.sum(axis=1) / counts.sum(axis=1)[:, None]
    return found


def _first(means: Array) -> tuple[float, float]:
    """Cosine of axis and first component, and how far the default is from an end of the roles' range on it."""
    roles = means[1:][np.isfinite(means[1:, 0])]
    centre = roles.mean(axis=0)
    axis, rows = means[0] - centre, roles - centre
    # By the small side: there are fewer roles than entries of a residual.
    weights = np.linalg.eigh(rows @ rows.T)[1][:, -1]
    component = rows.T @ weights
    component /= max(float(np.linalg.norm(component)), 1e-300)
    along = float(axis @ component)
    component, along = (component, along) if along >= 0 else (-component, -along)
    placed = rows @ component
    place = (along - placed.min()) / max(float(np.ptp(placed)), 1e-300)
    return along / max(float(np.linalg.norm(axis)), 1e-300), max(0.0, float(min(place, 1 - place)))


def _splits(questions: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which questions are in the first half: [splits, questions]; none where there are too few to be split."""
    if questions < 2:
        return np.zeros((0, questions), dtype=bool)
    order = np.argsort(rng.random((SPLITS, questions)), axis=1)
    found: NDArray[np.bool_] = order < questions // 2
    return found


def _halves(sums: Array, counts: Array, splits: NDArray[np.bool_]) -> tuple[float, Array, Array]:
    """Means over splits into two halves: the cosine of the axes, that without each role, and of each role's vectors."""
    axes, without, roles = [], [], []
    for split in splits:
        halves = [_means(sums[:, half], counts[:, half]) for half in (split, ~split)]
        known = np.isfinite(halves[0][1:, 0]) & np.isfinite(halves[1][1:, 0])
        if known.sum() < 2 or not np.isfinite([half[0, 0] for half in halves]).all():
            continue
        played = [half[1:][known] for half in halves]
        centres = [each.mean(axis=0) for each in played]
        axes.append(_cosine(*(half[0] - centre for half, centre in zip(halves, centres, strict=True))))
        others = [centre + (centre - each) / (len(each) - 1) for each, centre in zip(played, centres, strict=True)]
        without.append(np.full(len(known), nan))
        without[-1][known] = _cosine(*(half[0] - other for half, other in zip(halves, others, strict=True)))
        roles.append(_cosine(*(half[1:] - centre for half, centre in zip(halves, centres, strict=True))))
    if not axes:
        return nan, np.full(len(sums) - 1, nan), np.full(len(sums) - 1, nan)
    return float(np.mean(axes)), _mean_of_known(np.array(without)), _mean_of_known(np.array(roles))


def _mean_of_known(values: Array) -> Array:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        found: Array = np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)
    return found


def _cosine(one: Array, other: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        found: Array = np.asarray((one * other).sum(axis=-1) / lengths)
    return found


def _permuted(sums: Array, counts: Array, splits: NDArray[np.bool_], rng: np.random.Generator) -> tuple[float, ...]:
    """What `_first` and one of `_halves` give with the labels shuffled within each question."""
    groups, questions = counts.shape
    order = np.argsort(rng.random((groups, questions)), axis=0)
    shuffled = np.take_along_axis(sums, order[:, :, None], axis=0), np.take_along_axis(counts, order, axis=0)
    first = _first(_means(*shuffled))
    if not len(splits):
        return (*first, nan, nan)
    axis, _, roles = _halves(*shuffled, splits[rng.integers(len(splits))][None])
    known = roles[np.isfinite(roles)]
    return (*first, axis, float(known.mean()) if len(known) else nan)

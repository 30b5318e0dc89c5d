"""`split_half_reliability`: how much of a vector is the trait, and how much the questions that it was made from.

The responses of an extraction are cut into two halves by their questions, again and again, and a vector is made of each
half. Two halves that share nothing but the trait agree as far as the vector is reliable.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persona_lens.core.documents import Record
from persona_lens.core.statistics import CORRELATION, Estimate, jackknife_interval
from persona_lens.vectors.geometry import GeometryError
from persona_lens.vectors.provenance import OWN_REDUCTION
from persona_lens.vectors.samples import Array, Samples, read_samples

SPLITS = 200
LEAST = 4  # questions


@dataclass(frozen=True)
class LayerReliability(Record):
    """One layer's reliability.

    Attributes:
        layer: Block index, 0-based.
        halves: Mean cosine of the vectors of two halves.
        whole: What that makes for the whole vector and another from as many new questions (Spearman and Brown), with
            a 95% interval by the jackknife over questions.
        null: What 95% of such cosines stay within where the arms of each question are swapped at random, so that
            nothing of the trait is left.
    """

    layer: int
    halves: float
    whole: Estimate
    null: float


@dataclass(frozen=True)
class Reliability(Record):
    """Reliability of a vector, layer by layer.

    Attributes:
        trait: Its name.
        reduction: Which of the vectors.
        questions: How many there are to be split.
        splits: How many splits were drawn.
        layers: One for each layer.
    """

    trait: str
    reduction: str
    questions: int
    splits: int
    layers: tuple[LayerReliability, ...]


def split_half_reliability(
    folder: Path | str, reduction: str = OWN_REDUCTION, *, splits: int = SPLITS, seed: int = 0
) -> Reliability:
    """Split-half reliability of the vectors in an extraction's run folder, from its activations and scores.

    Args:
        folder: The run folder; nothing in it is changed.
        reduction: Which of the vectors.
        splits: How many random splits of the questions are averaged.
        seed: Of the splits.

    Raises:
        GeometryError: If ``splits`` is none, or responses to fewer than four questions were kept.
        RunError: If the folder is no finished extraction, or is damaged.
        VectorsError: If there is no such reduction, or the vectors cannot be read.
    """
    if splits < 1:
        raise GeometryError(f"splits must be at least 1, got {splits}")
    run = read_samples(folder)
    reduction = reduction or run.vectors.default_reduction
    run.vectors.rows(reduction)
    questions = len(np.unique(run.responses.question))
    if questions < LEAST:
        raise GeometryError(
            f"{run.folder} kept responses to {questions} questions; at least {LEAST} are needed to be split"
        )
    rng = np.random.default_rng(seed)
    halves = _drawn_halves(questions, splits, rng)
    swaps = rng.random((splits, questions)) < 0.5
    rows = tuple(
        _at(layer, *_by_question(run.layer(layer, reduction)), halves, swaps)
        for layer in range(run.vectors.model.n_layers)
    )
    return Reliability(run.vectors.trait, reduction, questions, splits, rows)


def cosine_between(
    one: Path | str, other: Path | str, layer: int, reduction: str = OWN_REDUCTION
) -> tuple[float, tuple[float, float] | None]:
    """The cosine of two extractions' vectors, with its 95% interval by leaving each question of either out in turn.

    Args:
        one: Run folder of an extraction.
        other: Run folder of another, on the same model.
        layer: Block index, 0-based.
        reduction: Which of the vectors.

    Returns:
        The cosine and the ends of its interval; None for these where too few questions were kept.

    Raises:
        RunError: If a folder is no finished extraction, or is damaged.
        VectorsError: If there is no such reduction, or the vectors cannot be read.
    """
    sums = [_by_question(read_samples(each).layer(layer, reduction)) for each in (one, other)]
    vectors = [_difference(*each) for each in sums]
    without = [
        _cosine(*(_difference(own[keep], counts[keep]) if at == side else vectors[at] for at in (0, 1)))
        for side, (own, counts) in enumerate(sums)
        for keep in ~np.eye(len(counts), dtype=bool)
    ]
    value = _cosine(*vectors)
    return value, jackknife_interval(value, np.asarray(without), CORRELATION)


def _difference(sums: Array, counts: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        means: Array = sums.sum(axis=0) / counts.sum(axis=0)[:, None]
    found: Array = means[0] - means[1]
    return found


def _cosine(one: Array, other: Array) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def agreement_of_halves(samples: Samples, splits: int, rng: np.random.Generator) -> tuple[float, float] | None:
    """`LayerReliability.halves` and its null at one layer, without an interval; None with fewer than four questions."""
    sums, counts = _by_question(samples)
    if len(counts) < LEAST:
        return None
    halves, swaps = _drawn_halves(len(counts), splits, rng), rng.random((splits, len(counts))) < 0.5
    _, observed, null = _observed(sums, counts, halves, swaps)
    observed, null = (each[np.isfinite(each)] for each in (observed, null))
    if not len(observed) or not len(null):  # nothing of an arm in any half, or no noise at all
        return None
    return float(observed.mean()), float(np.quantile(np.abs(null), 0.95))


def _by_question(samples: Samples) -> tuple[Array, Array]:
    """Responses by question and arm: their sums, [questions, arms, d_model], and how many."""
    numbers, place = np.unique(samples.question, return_inverse=True)
    arm = np.where(samples.positive, 0, 1)
    counts, sums = np.zeros((len(numbers), 2)), np.zeros((len(numbers), 2, samples.activations.shape[1]))
    np.add.at(counts, (place, arm), 1)
    np.add.at(sums, (place, arm), samples.activations)
    return sums, counts


def _drawn_halves(questions: int, splits: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which questions are in the first half: [splits, questions]."""
    order = np.argsort(rng.random((splits, questions)), axis=1)
    found: NDArray[np.bool_] = order < questions // 2
    return found


def _at(
    layer: int, sums: Array, counts: Array, halves: NDArray[np.bool_], swaps: NDArray[np.bool_]
) -> LayerReliability:
    products, observed, null = _observed(sums, counts, halves, swaps)
    whole = _stepped_up(observed)
    without = [  # each question in turn
        _stepped_up(_cosines(products, counts, halves & left, ~halves & left, np.zeros_like(swaps)))
        for left in ~np.eye(len(counts), dtype=bool)
    ]
    low, high = jackknife_interval(whole, np.asarray(without), CORRELATION) or (nan, nan)
    estimate = Estimate(whole, low, high, len(counts))
    return LayerReliability(layer, float(np.nanmean(observed)), estimate, float(np.nanquantile(np.abs(null), 0.95)))


def _observed(
    sums: Array, counts: Array, halves: NDArray[np.bool_], swaps: NDArray[np.bool_]
) -> tuple[Array, Array, Array]:
    """Products of all sums, in which all cosines of any halves are; those cosines; and with arms swapped."""
    flat = sums.reshape(len(counts) * 2, -1)
    products = flat @ flat.T
    observed, null = (_cosines(products, counts, halves, ~halves, arms) for arms in (np.zeros_like(swaps), swaps))
    return products, observed, null


def _stepped_up(cosines: Array | float) -> float:
    """Of the agreement of halves, that of wholes."""
    half = float(np.nanmean(cosines))
    return 2 * half / (1 + half)


def _cosines(
    products: Array, counts: Array, one: NDArray[np.bool_], other: NDArray[np.bool_], swaps: NDArray[np.bool_]
) -> Array:
    """The cosine of the vectors of two sets of questions in each split; NaN where a set has nothing of an arm."""
    a, b = (_weights(counts, chosen, swaps) for chosen in (one, other))
    with np.errstate(divide="ignore", invalid="ignore"):
        lengths = [np.sqrt(np.einsum("sa,ab,sb->s", w, products, w)) for w in (a, b)]
        found: Array = np.einsum("sa,ab,sb->s", a, products, b) / (lengths[0] * lengths[1])
    return found


def _weights(counts: Array, chosen: NDArray[np.bool_], swaps: NDArray[np.bool_]) -> Array:
    """What each question's sums count for in a difference of means: [splits, questions x arms]."""
    swapped = np.where(swaps[:, :, None], counts[:, ::-1], counts)  # [splits, questions, arms]
    totals = (swapped * chosen[:, :, None]).sum(axis=1)  # [splits, arms]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.array([1.0, -1.0]) / totals
    roles = np.where(swaps[:, :, None], shares[:, None, ::-1], shares[:, None, :])
    return np.where(chosen[:, :, None], roles, 0.0).reshape(len(chosen), -1)

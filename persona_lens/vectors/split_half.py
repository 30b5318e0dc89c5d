"""`split_half_reliability`: how much of a vector is the trait, and how much the questions that it was made from.

The responses of an extraction are cut into two halves by their questions, again and again, and a vector is made of each
half. Two halves that share nothing but the trait agree as far as the vector is reliable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from persona_lens.core.documents import Record
from persona_lens.core.statistics import CORRELATION, Estimate, jackknife_interval
from persona_lens.data.tables import DataError, read_rows
from persona_lens.runs import RunError
from persona_lens.runs.chunks import ROW, open_shard
from persona_lens.runs.rollouts import ACTIVATIONS, ROLLOUTS
from persona_lens.traits import Arm
from persona_lens.vectors.geometry import GeometryError
from persona_lens.vectors.provenance import DEFAULT_REDUCTION
from persona_lens.vectors.vectors import PersonaVectors, load_vectors

SPLITS = 200
SCORES = "scores.jsonl"
Array = NDArray[np.float64]


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
    folder: Path | str, reduction: str = DEFAULT_REDUCTION, *, splits: int = SPLITS, seed: int = 0
) -> Reliability:
    """Split-half reliability of the vectors in an extraction's run folder, from its activations and scores.

    Args:
        folder: The run folder; nothing in it is changed.
        reduction: Which of the vectors.
        splits: How many random splits of the questions are averaged.
        seed: Of the splits.

    Raises:
        GeometryError: If the folder is no finished extraction, is damaged, or kept responses to fewer than four
            questions.
        VectorsError: If there is no such reduction, or the vectors cannot be read.
    """
    if splits < 1:
        raise GeometryError(f"splits must be at least 1, got {splits}")
    run = Path(folder)
    vectors = load_vectors(run)
    vectors.rows(reduction)
    sums, counts = _sums(run, vectors, reduction)
    questions = len(counts)
    if questions < 4:
        raise GeometryError(
            f"{run} kept responses to {questions} questions in both arms; at least 4 are needed to be split"
        )
    rng = np.random.default_rng(seed)
    halves = _drawn_halves(questions, splits, rng)
    swaps = rng.random((splits, questions)) < 0.5
    rows = tuple(_at(layer, sums[:, :, layer], counts, halves, swaps) for layer in range(vectors.model.n_layers))
    return Reliability(vectors.trait, reduction, questions, splits, rows)


def _drawn_halves(questions: int, splits: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which questions are in the first half: [splits, questions]."""
    order = np.argsort(rng.random((splits, questions)), axis=1)
    found: NDArray[np.bool_] = order < questions // 2
    return found


def _at(
    layer: int, sums: Array, counts: Array, halves: NDArray[np.bool_], swaps: NDArray[np.bool_]
) -> LayerReliability:
    flat = sums.reshape(len(counts) * 2, -1)
    products = flat @ flat.T  # all cosines of any halves are in here
    as_they_are = np.zeros_like(swaps)
    observed = _cosines(products, counts, halves, ~halves, as_they_are)
    null = _cosines(products, counts, halves, ~halves, swaps)
    whole = _stepped_up(observed)
    without = [  # each question in turn
        _stepped_up(_cosines(products, counts, halves & left, ~halves & left, as_they_are))
        for left in ~np.eye(len(counts), dtype=bool)
    ]
    low, high = jackknife_interval(whole, np.asarray(without), CORRELATION) or (nan, nan)
    estimate = Estimate(whole, low, high, len(counts))
    return LayerReliability(layer, float(np.nanmean(observed)), estimate, float(np.nanquantile(np.abs(null), 0.95)))


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


def _sums(run: Path, vectors: PersonaVectors, reduction: str) -> tuple[Array, Array]:
    """Of what was kept, by question and arm: the sums, [questions, arms, layers, d_model], and how many.

    Questions of which nothing was kept are left out.
    """
    rows, scores = _rows(run / ROLLOUTS), _rows(run / SCORES)
    if len(scores) != len(rows):
        raise GeometryError(f"{run / SCORES} has other rows than {ROLLOUTS}: the run is not finished, or damaged")
    try:
        answered = [(int(row["question_number"]), list(Arm).index(Arm(row["arm"]))) for row in rows]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise GeometryError(f"a row of {run / ROLLOUTS} does not say what it answers ({error!r})") from error
    questions = sorted({question for question, _ in answered})
    shape = (len(questions), len(Arm), vectors.model.n_layers, vectors.model.d_model)
    sums, counts = np.zeros(shape), np.zeros(shape[:2])
    for at, values in saved_means(run, reduction, len(rows), shape[2:]):
        if scores[at].get("kept") is True:
            place = questions.index(answered[at][0]), answered[at][1]
            sums[place] += values
            counts[place] += 1
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums.sum(axis=0) / counts.sum(axis=0)[:, None, None]
    if not np.allclose(means[0] - means[1], vectors.rows(reduction).numpy(), rtol=1e-3, atol=1e-4):
        raise GeometryError(
            f"the activations and scores in {run} do not give the vectors in it; something was changed after the run"
        )
    some = counts.any(axis=1)
    return sums[some], counts[some]


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a run's file, one for each response in the order of the extraction's plan."""
    if not file.is_file():
        raise GeometryError(f"{file} is missing; give the run folder of a finished extraction")
    try:
        found = [row for _, row in read_rows(file)]
    except DataError as error:
        raise GeometryError(f"{file} is damaged: {error}") from error
    if any(row.get(ROW) != at for at, row in enumerate(found)):
        raise GeometryError(f"{file} has other rows than were planned: the run is not finished, or damaged")
    return found


def saved_means(run: Path, reduction: str, count: int, shape: tuple[int, ...]) -> Iterator[tuple[int, Array]]:
    """Every response's reduction, by its row in the file of responses.

    Args:
        run: The run folder.
        reduction: Which of what was read.
        count: How many responses there are.
        shape: Of a response's, [n_layers, d_model].

    Yields:
        The row, and float64 of that shape.

    Raises:
        GeometryError: If the run is damaged, or not whole.
    """
    seen: list[int] = []
    for file in sorted((run / ACTIVATIONS).glob("batch-*.safetensors")):
        try:
            header, tensors = open_shard(file)
            values, places = tensors[reduction], [int(place) for place in header["rows"]]
        except (RunError, KeyError, TypeError, ValueError) as error:
            raise GeometryError(f"{file} is damaged, or holds no {reduction}: {error}") from error
        if tuple(values.shape) != (len(places), *shape):
            wanted = [len(places), *shape]
            raise GeometryError(f"{file} holds {list(values.shape)}; its responses and the vectors are {wanted}")
        seen += places
        if max(places, default=0) < count:
            yield from zip(places, values.to(torch.float64).numpy(), strict=True)
    if sorted(seen) != list(range(count)):
        raise GeometryError(
            f"{run / ACTIVATIONS} holds {len(seen)} responses and {ROLLOUTS} {count}; the run is not whole"
        )

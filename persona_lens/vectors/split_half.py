"""`split_halves`: how much of a vector is the trait, and how much the questions that it was made from.

The responses of an extraction are cut into two halves by their questions, again and again, and a vector is made of each
half. Two halves that share nothing but the trait agree as far as the vector is reliable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from persona_lens.core.documents import DocumentError, parse_json
from persona_lens.core.statistics import CORRELATION, Estimate, jackknife_interval
from persona_lens.runs import RunError
from persona_lens.runs.chunks import open_shard
from persona_lens.runs.rollouts import ACTIVATIONS, ROLLOUTS
from persona_lens.traits import Arm
from persona_lens.vectors.geometry import GeometryError
from persona_lens.vectors.provenance import DEFAULT_REDUCTION
from persona_lens.vectors.vectors import PersonaVectors, load_vectors

SPLITS = 200
SCORES = "scores.jsonl"
LABELS = ("question_number", "pair", "sample", "arm")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class HalvesAt:
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
class Halves:
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
    layers: tuple[HalvesAt, ...]

    def to_json(self) -> dict[str, Any]:
        """The values by name, None where one is undefined."""

        def number(value: float | int) -> float | int | None:
            return value if isfinite(value) else None

        rows = [
            {
                "layer": row.layer,
                "halves": number(row.halves),
                "whole": {name: number(value) for name, value in row.whole.to_json().items()},
                "null": number(row.null),
            }
            for row in self.layers
        ]
        return {
            "trait": self.trait,
            "reduction": self.reduction,
            "questions": self.questions,
            "splits": self.splits,
            "layers": rows,
        }


def split_halves(
    folder: Path | str, reduction: str = DEFAULT_REDUCTION, *, splits: int = SPLITS, seed: int = 0
) -> Halves:
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
    return Halves(vectors.trait, reduction, questions, splits, rows)


def _drawn_halves(questions: int, splits: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which questions are in the first half: [splits, questions]."""
    order = np.argsort(rng.random((splits, questions)), axis=1)
    found: NDArray[np.bool_] = order < questions // 2
    return found


def _at(layer: int, sums: Array, counts: Array, halves: NDArray[np.bool_], swaps: NDArray[np.bool_]) -> HalvesAt:
    flat = sums.reshape(len(counts) * 2, -1)
    products = flat @ flat.T  # all cosines of any halves are in here
    observed = _cosines(products, counts, halves, np.zeros_like(swaps))
    null = _cosines(products, counts, halves, swaps)
    whole = _stepped_up(float(np.nanmean(observed)))
    return HalvesAt(
        layer,
        float(np.nanmean(observed)),
        _jackknife(whole, products, counts, halves),
        float(np.nanquantile(np.abs(null), 0.95)),
    )


def _stepped_up(half: float) -> float:
    """Of the agreement of halves, that of wholes."""
    return 2 * half / (1 + half)


def _jackknife(whole: float, products: Array, counts: Array, halves: NDArray[np.bool_]) -> Estimate:
    """The interval: how much the estimate owes to each question."""
    n = len(counts)
    without = []
    for left_out in range(n):
        present = np.arange(n) != left_out
        found = _cosines(products, counts * present[:, None], halves, np.zeros_like(halves), present)
        without.append(_stepped_up(float(np.nanmean(found))))
    low, high = jackknife_interval(whole, np.asarray(without), CORRELATION) or (nan, nan)
    return Estimate(whole, low, high, n)


def _cosines(
    products: Array,
    counts: Array,
    halves: NDArray[np.bool_],
    swaps: NDArray[np.bool_],
    present: NDArray[np.bool_] | None = None,
) -> Array:
    """The cosine of the two halves' vectors in each split; NaN where a half has nothing of an arm."""
    here = np.ones(len(counts), dtype=bool) if present is None else present
    one, other = (_weights(counts, half & here, swaps) for half in (halves, ~halves))
    with np.errstate(divide="ignore", invalid="ignore"):
        lengths = [np.sqrt(np.einsum("sa,ab,sb->s", w, products, w)) for w in (one, other)]
        found: Array = np.einsum("sa,ab,sb->s", one, products, other) / (lengths[0] * lengths[1])
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
    rows = _rows(run / ROLLOUTS)
    if sorted(rows, key=lambda row: _place(run, row)) != rows:
        raise GeometryError(f"{run / ROLLOUTS} is not in order: the run is not finished, or damaged")
    kept = _kept(run, len(rows))
    questions = sorted({int(row["question_number"]) for row in rows})
    shape = (len(questions), len(Arm), vectors.model.n_layers, vectors.model.d_model)
    sums, counts = np.zeros(shape), np.zeros(shape[:2])
    for at, values in _activations(run, reduction, len(rows), shape[2:]):
        if kept[at]:
            place = questions.index(int(rows[at]["question_number"])), list(Arm).index(Arm(rows[at]["arm"]))
            sums[place] += values
            counts[place] += 1
    _check(run, vectors, reduction, sums, counts)
    some = counts.any(axis=1)
    return sums[some], counts[some]


def _check(run: Path, vectors: PersonaVectors, reduction: str, sums: Array, counts: Array) -> None:
    """Raise unless the sums give the run's own vectors."""
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums.sum(axis=0) / counts.sum(axis=0)[:, None, None]
    if not np.allclose(means[0] - means[1], vectors.rows(reduction).numpy(), rtol=1e-3, atol=1e-4):
        raise GeometryError(
            f"the activations and scores in {run} do not give the vectors in it; something was changed after the run"
        )


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        found = [parse_json(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError:
        raise GeometryError(f"{file} is missing; give the run folder of a finished extraction") from None
    except (OSError, ValueError, DocumentError) as error:
        raise GeometryError(f"{file} is damaged: {error}") from error
    if not found or not all(isinstance(row, dict) for row in found):
        raise GeometryError(f"{file} is damaged: every line is to be an object")
    return found


def _place(run: Path, row: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Where a response stands in the extraction's plan, in whose order the scores are."""
    try:
        question, pair, sample, arm = (row[name] for name in LABELS)
        return int(question), int(pair), int(sample), list(Arm).index(Arm(arm))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise GeometryError(f"a row of {run / ROLLOUTS} does not say what it answers ({error!r})") from error


def _kept(run: Path, count: int) -> list[bool]:
    rows = _rows(run / SCORES)
    if len(rows) != count or any(row.get("row") != at for at, row in enumerate(rows)):
        raise GeometryError(f"{run / SCORES} has other rows than {ROLLOUTS}: the run is not finished, or damaged")
    return [row.get("kept") is True for row in rows]


def _activations(run: Path, reduction: str, count: int, shape: tuple[int, ...]) -> Iterator[tuple[int, Array]]:
    """Every response's reduction, by its row in the file of responses."""
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

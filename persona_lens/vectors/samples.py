"""`RunSamples`: the responses that a finished extraction kept, read from its run folder one layer at a time.

Nothing is generated and no model is opened. The folder is read and checked once; then each layer is read when it is
asked for, so that memory holds one layer of one reduction, however large the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, float64

from persona_lens.data.tables import DataError, read_rows
from persona_lens.runs import RunError
from persona_lens.runs.chunks import ROW, open_shard, shard_layer
from persona_lens.runs.rollouts import ACTIVATIONS, ROLLOUTS
from persona_lens.traits import Arm
from persona_lens.vectors.provenance import OWN_REDUCTION
from persona_lens.vectors.vectors import PersonaVectors, load_vectors

SCORES = "scores.jsonl"
Array = NDArray[np.float64]
Numbers = NDArray[np.int64]
Kept = TypeVar("Kept", bound="Responses")


@dataclass(frozen=True, eq=False)
class Responses:
    """What is known of each kept response, in the order of the extraction's plan.

    Attributes:
        positive: bool [n]: whether it is of the positive arm.
        question: int64 [n]: number of the question that it answers.
        pair: int64 [n]: number of its pair of instructions.
        sample: int64 [n]: number among the responses to the same question and pair.
        length: int64 [n]: tokens of the response.
        score: float64 [n]: the judge's score of the trait, 0 to 100.
    """

    positive: NDArray[np.bool_]
    question: Numbers
    pair: Numbers
    sample: Numbers
    length: Numbers
    score: Array

    def __len__(self) -> int:
        return len(self.positive)

    def chosen(self: Kept, which: NDArray[np.bool_] | Numbers) -> Kept:
        """Some of them: by a mask [n], or by their places in the wanted order."""
        return replace(self, **{each.name: getattr(self, each.name)[which] for each in fields(self)})

    def at(self, activations: Array) -> Samples:
        """They at a layer, where their activations are these: float64 [n, d_model].

        Those without any are left out: a response without thinking has no mean of it, but NaN.
        """
        known = {each.name: getattr(self, each.name) for each in fields(Responses)}
        found = Samples(**known, activations=activations)
        there = ~np.isnan(activations).any(axis=1).reshape(-1)
        return found if there.all() else found.chosen(there)

    def twins(self) -> tuple[Numbers, Numbers]:
        """Places of the positive and of the negative response of each pair that differs in nothing but the arm."""
        labels = list(zip(self.question.tolist(), self.pair.tolist(), self.sample.tolist(), strict=True))
        negative = {label: at for at, label in enumerate(labels) if not self.positive[at]}
        both = [(at, negative[label]) for at, label in enumerate(labels) if self.positive[at] and label in negative]
        found = np.array(both, dtype=np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]


@dataclass(frozen=True, eq=False)
class Samples(Responses):
    """Kept responses at one layer.

    Attributes:
        activations: float64 [n, d_model]: each one's reduction, in residual-stream units.
    """

    activations: Array

    @property
    def difference(self) -> Array:
        """Mean of the positive ones minus mean of the negative ones: [d_model]; NaN where there are none of an arm."""
        with np.errstate(divide="ignore", invalid="ignore"):
            means = [self.activations[arm].sum(axis=0) / arm.sum() for arm in (self.positive, ~self.positive)]
        found: Array = means[0] - means[1]
        return found


@dataclass(frozen=True, eq=False)
class RunSamples:
    """What an extraction kept, whose activations stay on the disk until a layer of them is asked for.

    Attributes:
        folder: The run folder.
        vectors: The run's own vectors.
        responses: What is known of each kept response.
        shards: By file: where in the file the kept responses are, and where they belong in ``responses``.
    """

    folder: Path
    vectors: PersonaVectors
    responses: Responses
    shards: Mapping[Path, tuple[Numbers, Numbers]]

    @property
    def reductions(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(self.vectors.directions)

    def layer(self, layer: int, reduction: str = OWN_REDUCTION) -> Samples:
        """The kept responses at a layer.

        Args:
            layer: Block index, 0-based.
            reduction: Which of what was read.

        Raises:
            RunError: If they do not give the run's own vector, so that something was changed after the run.
            VectorsError: If there is no such layer or reduction.
        """
        reduction = reduction or self.vectors.default_reduction
        own = self.vectors.rows(reduction).numpy()
        self.vectors.check_layer(layer)
        rows = np.empty((len(self.responses), own.shape[1]))
        for file, (there, here) in self.shards.items():
            rows[here] = shard_layer(file, reduction, layer).to(float64).numpy()[there]
        found = self.responses.at(rows)
        if not np.allclose(found.difference, own[layer], rtol=1e-3, atol=1e-4):
            raise RunError(
                f"the activations and scores in {self.folder} do not give the vectors in it; something was changed "
                "after the run"
            )
        return found

    def everything(self, layer: int, reduction: str = OWN_REDUCTION) -> tuple[Samples, NDArray[np.bool_]]:
        """Every response that has a score at a layer, those too that the extraction did not keep.

        Args:
            layer: Block index, 0-based.
            reduction: Which of what was read.

        Returns:
            The responses, and of each whether it was kept.

        Raises:
            RunError: If the folder was changed since it was read.
        """
        reduction = reduction or self.vectors.default_reduction
        rows, scores = _rows(self.folder / ROLLOUTS), _rows(self.folder / SCORES)
        shape = (self.vectors.model.n_layers, self.vectors.model.d_model)
        read = np.full((len(rows), shape[1]), np.nan)
        for file, places, _ in _shards(self.folder, (reduction,), len(rows), shape):
            read[places] = shard_layer(file, reduction, layer).to(float64).numpy()
        there = [
            at for at, score in enumerate(scores) if score.get("score") is not None and np.isfinite(read[at]).all()
        ]
        responses = _responses(self.folder, [(rows[at], scores[at]) for at in there])
        return responses.at(read[there]), np.array([scores[at].get("kept") is True for at in there], dtype=np.bool_)


def read_samples(folder: Path | str) -> RunSamples:
    """The responses that an extraction kept; nothing in its run folder is changed.

    Args:
        folder: The run folder.

    Raises:
        RunError: If it is no finished extraction, or is damaged.
        VectorsError: If its vectors cannot be read.
    """
    run = Path(folder)
    vectors = load_vectors(run)
    rows, scores = _rows(run / ROLLOUTS), _rows(run / SCORES)
    if len(scores) != len(rows):
        raise RunError(f"{run / SCORES} has other rows than {ROLLOUTS}: the run is not finished, or damaged")
    kept = [at for at, score in enumerate(scores) if score.get("kept") is True]
    responses = _responses(run, [(rows[at], scores[at]) for at in kept])
    place = {at: number for number, at in enumerate(kept)}
    shards = {}
    shape = (vectors.model.n_layers, vectors.model.d_model)
    for file, places, _ in _shards(run, tuple(vectors.directions), len(rows), shape):
        pairs = [(there, place[at]) for there, at in enumerate(places) if at in place]
        found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        shards[file] = found[:, 0], found[:, 1]
    return RunSamples(run, vectors, responses, shards)


def _responses(run: Path, kept: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Responses:
    """What the rows of responses and of their scores say of each."""
    try:
        numbers = np.array(
            [
                [*(int(row[name]) for name in ("question_number", "pair", "sample")), len(row["response_ids"])]
                for row, _ in kept
            ],
            dtype=np.int64,
        ).reshape(-1, 4)
        positive = np.array([Arm(row["arm"]) is Arm.POSITIVE for row, _ in kept], dtype=np.bool_)
        scores = np.array([float(score["score"]) for _, score in kept])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RunError(f"a row of {ROLLOUTS} or {SCORES} in {run} does not say what it answers ({error!r})") from error
    question, pair, sample, length = numbers.T
    return Responses(positive, question, pair, sample, length, scores)


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a run's file, one for each response in the order of the extraction's plan."""
    if not file.is_file():
        raise RunError(f"{file} is missing; give the run folder of a finished extraction")
    try:
        found = [row for _, row in read_rows(file)]
    except DataError as error:
        raise RunError(f"{file} is damaged: {error}") from error
    if any(row.get(ROW) != at for at, row in enumerate(found)):
        raise RunError(f"{file} has other rows than were planned: the run is not finished, or damaged")
    return found


def saved_means(run: Path, reduction: str, count: int, shape: tuple[int, ...]) -> Iterator[tuple[int, Array]]:
    """Every response's reduction at all layers, kept or not, by its row in the file of responses.

    Args:
        run: The run folder.
        reduction: Which of what was read.
        count: How many responses there are.
        shape: Of a response's, [n_layers, d_model].

    Yields:
        The row, and float64 of that shape.

    Raises:
        RunError: If the run is damaged, or not whole.
    """
    for _, places, tensors in _shards(run, (reduction,), count, shape):
        yield from zip(places, tensors[reduction].to(float64).numpy(), strict=True)


def _shards(
    run: Path, reductions: Sequence[str], count: int, shape: tuple[int, ...]
) -> Iterator[tuple[Path, list[int], Mapping[str, Tensor]]]:
    """Every file of activations that is whole, with the rows in it and its tensors; at the end, that all rows are."""
    seen: list[int] = []
    for file in sorted((run / ACTIVATIONS).glob("batch-*.safetensors")):
        header, tensors = open_shard(file)
        try:
            places = [int(place) for place in header["rows"]]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{file} is damaged: it does not say which responses it holds ({error!r})") from error
        for reduction in reductions:
            if reduction not in tensors:
                raise RunError(f"{file} is damaged, or holds no {reduction}")
            if (found := tuple(tensors[reduction].shape)) != (len(places), *shape):
                wanted = [len(places), *shape]
                raise RunError(f"{file} holds {list(found)}; its responses and the vectors are {wanted}")
        seen += places
        if 0 <= min(places, default=0) <= max(places, default=0) < count:
            yield file, places, tensors
    if sorted(seen) != list(range(count)):
        raise RunError(f"{run / ACTIVATIONS} holds {len(seen)} responses and {ROLLOUTS} {count}; the run is not whole")

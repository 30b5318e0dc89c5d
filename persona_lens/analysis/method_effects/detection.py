"""What directions detect: how well they tell the arms of an extraction apart, on questions they were not made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from persona_lens.core.statistics import SHARE, auc, jackknifed
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.fit import maker_of
from persona_lens.vectors.methods import FitError
from persona_lens.vectors.samples import Array, RunSamples, Samples
from persona_lens.vectors.separation import FOLDS, null_units

Maker: TypeAlias = Callable[[Samples], Array]


def detection(
    run: RunSamples,
    methods: Mapping[str, PersonaVectors],
    others: Sequence[RunSamples],
    layer: int,
    reduction: str,
    seed: int,
) -> dict[str, Any]:
    """How well each method's direction tells the arms of a run apart, beside random directions and the run's judge.

    A direction is made anew of the kept responses to half of the questions, and tried on all responses to the others,
    kept or not. Vectors that were not made of the run are tried as they are.

    Args:
        run: The extraction.
        methods: Vectors of its trait, by the methods that made them.
        others: Extractions whose traits may have been kept out of them.
        layer: Where.
        reduction: Which of what was read.
        seed: Of the random directions.

    Returns:
        By method the ``auc`` with its interval over questions (``low`` and ``high``; None where it is not known), and
        whether it was made ``anew``, or None where it cannot be; the same of the ``judge``'s score; and ``random``,
        what 19 of 20 random directions stay below, taken the way round that separates better.
    """
    samples, kept = run.everything(layer, reduction)
    fold = samples.question % FOLDS
    makers = {name: _maker(each, run, others, layer, reduction) for name, each in methods.items()}
    found = {name: _projections(samples, kept, fold, maker) for name, (maker, _) in makers.items() if maker}
    known = {name: values for name, values in found.items() if values is not None}
    nulls = null_units(1, samples.activations.shape[1], seed)[:, 0].double().numpy()
    columns = np.column_stack([*known.values(), samples.score])
    values = _aucs(columns, samples.positive, fold)
    ends = jackknifed(
        lambda rows: _aucs(columns[rows], samples.positive[rows], fold[rows]), samples.question.tolist(), SHARE
    )
    told = [
        {"auc": None, "low": None, "high": None} if np.isnan(value) else
        {"auc": float(value), "low": own[0] if own else None, "high": own[1] if own else None}
        for value, own in zip(values, ends, strict=True)
    ]  # fmt: skip
    random = _aucs(samples.activations @ nulls.T, samples.positive, fold)
    return {
        "responses": len(samples),
        "questions": len(np.unique(samples.question)),
        "methods": {
            name: {**told[list(known).index(name)], "anew": makers[name][1]} if name in known else None
            for name in methods
        },
        "judge": told[-1],
        "random": None if np.isnan(random).any() else float(np.quantile(np.maximum(random, 1 - random), 0.95)),
    }


def _maker(
    vectors: PersonaVectors, run: RunSamples, others: Sequence[RunSamples], layer: int, reduction: str
) -> tuple[Maker | None, bool]:
    """What makes a direction of responses, or gives what is there; and whether it makes it anew."""
    try:
        made = maker_of(vectors, run, others, layer, reduction)
    except FitError:  # it was made of these responses, and how cannot be repeated
        return None, True
    if made is not None:
        return made, True
    given = vectors.vector(layer, reduction).double().numpy()
    return lambda samples: given, False


def _projections(samples: Samples, kept: NDArray[np.bool_], fold: NDArray[np.int64], make: Maker) -> Array | None:
    """Of every response on the direction that the other questions give; None where they do not suffice."""
    found = np.empty(len(samples))
    for each in range(FOLDS):
        seen = samples.chosen(kept & (fold != each))
        if np.bincount(seen.positive, minlength=2).min() < 2:
            return None
        try:
            vector = make(seen)
        except FitError:
            return None
        found[fold == each] = samples.activations[fold == each] @ (vector / max(float(np.linalg.norm(vector)), 1e-12))
    return found


def _aucs(columns: Array, positive: NDArray[np.bool_], fold: NDArray[np.int64]) -> Array:
    """The AUC of each column, averaged over the folds; NaN where a fold has one arm only."""
    each = []
    for number in range(FOLDS):
        arms = [columns[(fold == number) & arm] for arm in (positive, ~positive)]
        if not all(map(len, arms)):
            return np.full(columns.shape[1], np.nan)
        each.append([auc(*values) for values in zip(*(arm.T for arm in arms), strict=True)])
    found: Array = np.mean(each, axis=0)
    return found

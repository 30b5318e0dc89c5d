"""`diagnose`: what an extraction's kept responses say of its vectors, layer by layer, before anything is steered.

Nothing is generated, and memory holds the responses of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from persona_lens.backend import Backend
from persona_lens.backend.blocks import ModuleError, UnsupportedModelError
from persona_lens.backend.readout import FrozenNorm, ReadoutError, answering_readout
from persona_lens.core.statistics import separation
from persona_lens.vectors.diagnostics import Array, Diagnostics, LayerDiagnostics, rounded
from persona_lens.vectors.provenance import OWN_REDUCTION
from persona_lens.vectors.samples import Responses, Samples, read_samples
from persona_lens.vectors.separation import FOLDS
from persona_lens.vectors.split_half import agreement_of_halves
from persona_lens.vectors.vectors import PersonaVectors, load_vectors, random_directions

DRAWS = 200  # of swapped arms
SPLITS = 100
RANDOM = 20  # directions, and sets of tokens
TOKENS = 20  # on either side
SEPARATION = {
    "d_prime": "d_prime",
    "d_prime_null": "random_d_prime",
    "auc": "auc",
    "auc_null": "random_auc",
}


def diagnose(folder: Path | str, backend: Backend | None = None, reduction: str = OWN_REDUCTION) -> Diagnostics:
    """What can be said of an extraction's vectors before anything is generated under them.

    Args:
        folder: The run folder of the extraction, in which nothing is changed; or any vectors that carry diagnostics.
        backend: The model, to measure anew what its unembedding reads. Without it what the vectors carry is given; and
            what can be measured without a model, where they carry nothing.
        reduction: Which of the vectors.

    Raises:
        ModuleError: If the weights of the backend's model are out of reach.
        ReadoutError: If the model ends otherwise than with one norm and an unembedding.
        RunError: If the folder is no finished extraction, or is damaged.
        VectorsError: If there is no such reduction, or the vectors belong to another model.
    """
    vectors = load_vectors(folder)
    reduction = reduction or vectors.default_reduction
    vectors.rows(reduction)
    stored = vectors.diagnostics
    if backend is None and stored is not None and stored.reduction == reduction:
        return stored
    unembedding = None
    if backend is not None:
        vectors.check_model(backend, allowable=False)
        unembedding = Unembedding.of(backend)
    run = read_samples(folder)
    known = None
    if stored is not None and (shares := stored.values("relative_norm")) is not None:
        known = vectors.norms(stored.reduction).double().numpy() / shares
    return diagnostics_of(vectors, run, reduction, residual_norms=known, unembedding=unembedding)


@runtime_checkable
class KeptSamples(Protocol):
    """The responses that vectors were made of: `persona_lens.vectors.samples.RunSamples`, or what is like it."""

    @property
    def responses(self) -> Responses:
        """What is known of each."""
        ...

    def layer(self, layer: int, reduction: str = OWN_REDUCTION) -> Samples:
        """Their activations at a layer."""
        ...


def diagnostics_of(
    vectors: PersonaVectors,
    kept: KeptSamples,
    reduction: str = OWN_REDUCTION,
    *,
    residual_norms: Sequence[float] | Array | None = None,
    unembedding: Unembedding | None = None,
) -> Diagnostics:
    """The diagnostics of vectors, from the responses that they were made of.

    Args:
        vectors: With the separation of the arms in their provenance, if it is known.
        kept: The responses; each layer is asked for once, and once more with an unembedding, which reads what all
            layers have in one pass over the vocabulary, where all their responses need not fit in memory.
        reduction: Which of the vectors.
        residual_norms: Mean length of the residual at each layer; None where it is not known.
        unembedding: The model's; None where it is out of reach.
    """
    layers, twins = range(vectors.model.n_layers), kept.responses.twins()
    reduction = reduction or vectors.default_reduction
    separations = _separations(vectors) if reduction == vectors.default_reduction else {}
    found: list[dict[str, float | None]] = []
    contrasts: list[Tensor] = []
    for layer in layers:
        samples = kept.layer(layer, reduction)
        pairs = twins if len(samples) == len(kept.responses) else samples.twins()
        found.append({**measured(samples, pairs), **separations.get(layer, {})})
        if unembedding is not None:
            contrasts.append(unembedding.contrasts(samples))
    if residual_norms is not None:
        for values, length, norm in zip(found, vectors.norms(reduction).tolist(), residual_norms, strict=True):
            values["relative_norm"] = length / float(norm)
    if unembedding is not None:
        read = unembedding.reading(vectors.rows(reduction), torch.stack(contrasts))
        for layer, values in zip(layers, found, strict=True):
            values |= read.rises(layer) | read.accessibility(layer, kept.layer(layer, reduction))
    rows = tuple(LayerDiagnostics(layer, **rounded(values)) for layer, values in zip(layers, found, strict=True))
    questions = len(set(kept.responses.question[twins[0]].tolist()))
    return Diagnostics(vectors.trait, reduction, len(kept.responses), len(twins[0]), questions, rows)


def _separations(vectors: PersonaVectors) -> dict[int, dict[str, float | None]]:
    """What the extraction found of it, by layer; nothing where it says nothing that can be read."""
    try:
        rows = {int(row["layer"]): row for row in vectors.provenance.get("separation") or ()}
        return {layer: {name: float(row[stored]) for name, stored in SEPARATION.items()} for layer, row in rows.items()}
    except (KeyError, TypeError, ValueError):
        return {}


# From the responses alone


def measured(samples: Samples, twins: tuple[NDArray[np.int64], NDArray[np.int64]]) -> dict[str, float | None]:
    """What the responses at a layer say by themselves: consistency and the agreement of halves, with their nulls."""
    one, other = twins
    differences, numbers = samples.activations[one] - samples.activations[other], samples.question[one]
    rng = np.random.default_rng(0)
    consistent = consistency(differences, numbers, rng)
    halves = agreement_of_halves(samples, SPLITS, rng)
    return {
        **dict(zip(("consistency", "consistency_null"), consistent or (None, None), strict=True)),
        **dict(zip(("halves", "halves_null"), halves or (None, None), strict=True)),
    }


def consistency(
    differences: Array, questions: NDArray[np.int64], rng: np.random.Generator
) -> tuple[float, float] | None:
    """Mean cosine of single differences with the mean of those of the other questions, and its null.

    Args:
        differences: [n, d_model].
        questions: [n]: which question each is of.
        rng: Draws the questions whose arms are swapped.

    Returns:
        The mean over questions of the mean over a question's differences; and what 95% of draws stay below. None with
        differences of fewer than two questions.
    """
    numbers, place = np.unique(questions, return_inverse=True)
    if len(numbers) < 2:
        return None
    sums = np.zeros((len(numbers), differences.shape[1]))
    np.add.at(sums, place, differences)
    # All that any draw needs: swapping changes nothing but signs.
    dots, products = differences @ sums.T, sums @ sums.T
    lengths: Array = np.linalg.norm(differences, axis=1)
    counts = np.bincount(place)

    def means(signs: Array) -> Array:
        """Of each draw, [draws, questions] of 1 and -1."""
        cross = signs * (signs @ products)
        squares = cross.sum(axis=1, keepdims=True) - 2 * cross + np.diag(products)  # of the other questions' sums
        along = signs[:, place] * (signs @ dots.T) - dots[np.arange(len(place)), place]
        scale = lengths * np.sqrt(np.maximum(squares, 0))[:, place]
        cosines = np.divide(along, scale, out=np.zeros_like(along), where=scale > 0)
        by_question = np.zeros_like(signs)
        np.add.at(by_question.T, place, cosines.T)
        found: Array = (by_question / counts).mean(axis=1)
        return found

    drawn = np.where(rng.random((DRAWS, len(numbers))) < 0.5, -1.0, 1.0)
    return float(means(np.ones((1, len(numbers))))[0]), float(np.quantile(means(drawn), 0.95))


def apart(values: Array, responses: Responses) -> float | None:
    """Standard deviations between the arms, the mean over folds; None if one has fewer than two of an arm.

    Args:
        values: [n, folds]: a value of every response, as it is to be taken where the response is in that fold.
        responses: The responses.
    """
    fold = responses.question % FOLDS
    found = []
    for number in range(FOLDS):
        own = values[:, number]
        arms = [own[(fold == number) & arm] for arm in (responses.positive, ~responses.positive)]
        if min(map(len, arms)) < 2:
            return None
        found.append(separation(*arms))
    return float(np.mean(found))


# What the unembedding reads


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The end of a model, wherever the model is.

    Attributes:
        answer: See `persona_lens.backend.readout.answering_readout`.
        norm: The final norm; None where there is none.
        known: How many rows stand for tokens.
    """

    answer: Callable[..., Any]
    norm: FrozenNorm | None
    known: int

    @staticmethod
    def of(backend: Backend) -> Unembedding:
        """That of a backend's model.

        Raises:
            ModuleError: If the weights are out of reach.
            ReadoutError: If the model ends otherwise than with one norm and an unembedding.
        """
        answer = answering_readout(backend)
        return Unembedding(answer, answer("norm"), min(len(backend.tokenizer), answer("vocabulary")))

    @staticmethod
    def within_reach(backend: Backend) -> Unembedding | None:
        """That of a backend's model; None where its weights are out of reach, or it ends otherwise."""
        try:
            return Unembedding.of(backend)
        except (ModuleError, ReadoutError, UnsupportedModelError):
            return None

    def behind_norm(self, residuals: Array) -> Float[Tensor, "n d_model"]:
        """Residuals as the unembedding takes them: float32."""
        h = torch.from_numpy(residuals).float()
        return h if self.norm is None else self.norm.normed(h)

    def contrasts(self, samples: Samples) -> Float[Tensor, "folds d_model"]:
        """The difference of the arms' means behind the norm, on each fold; NaN where one has nothing of an arm."""
        states, fold = self.behind_norm(samples.activations), samples.question % FOLDS
        arms = (samples.positive, ~samples.positive)
        means = [
            [states[torch.from_numpy((fold == number) & arm)].mean(dim=0) for arm in arms] for number in range(FOLDS)
        ]
        return torch.stack([positive - negative for positive, negative in means])

    def reading(
        self, vectors: Float[Tensor, "layers d_model"], contrasts: Float[Tensor, "layers folds d_model"]
    ) -> Reading:
        """What it reads in vectors and in contrasts, in one pass over the vocabulary."""
        units = random_directions(vectors.shape[1], RANDOM, 0)
        changes = torch.cat([vectors.float(), units])
        changes = changes if self.norm is None else self.norm(changes)
        found = self.answer("extremes", torch.cat([changes, contrasts.flatten(0, 1).nan_to_num()]), TOKENS, self.known)
        rises, rest = found.rise[: len(vectors)], len(changes)
        sides = [self.answer("mean_rows", ids[rest:]) for ids in (found.highest, found.lowest)]
        drawn = torch.randint(self.known, (2, RANDOM, TOKENS), generator=torch.Generator().manual_seed(0))
        nulls = [self.answer("mean_rows", ids) for ids in drawn]
        return Reading(
            self,
            (rises / vectors.float().norm(dim=-1).clamp(min=1e-12)).double().numpy(),
            found.rise[len(vectors) : rest].double().numpy(),
            (sides[0] - sides[1]).unflatten(0, contrasts.shape[:2]),
            nulls[0] - nulls[1],
        )


@dataclass(frozen=True, eq=False)
class Reading:
    """What an unembedding reads in the vectors of all layers.

    Attributes:
        of: The unembedding.
        own: float64 [layers]: how far a vector of length one raises the logit that it raises most.
        random: float64 [directions]: the same of random directions.
        directions: float32 [layers, folds, d_model]: behind the norm, that of the mean logit of the tokens that a
            fold's positive arm promotes most, minus those that it suppresses most.
        nulls: float32 [sets, d_model]: the same of random tokens.
    """

    of: Unembedding
    own: Array
    random: Array
    directions: Float[Tensor, "layers folds d_model"]
    nulls: Float[Tensor, "sets d_model"]

    def rises(self, layer: int) -> dict[str, float | None]:
        """See `LayerDiagnostics.logit_rise`."""
        usual = float(self.random.mean())
        return {
            "logit_rise": float(self.own[layer]) / usual,
            "logit_rise_null": float(np.quantile(self.random, 0.95)) / usual,
        }

    def accessibility(self, layer: int, samples: Samples) -> dict[str, float | None]:
        """See `LayerDiagnostics.accessibility`."""
        states = self.of.behind_norm(samples.activations)
        # Each fold is tested by the other's tokens.
        value = apart((states @ self.directions[layer].flip(0).T).double().numpy(), samples)
        if value is None:
            return {"accessibility": None, "accessibility_null": None}
        drawn = (states @ self.nulls.T).double().numpy()
        others = [apart(np.stack([one] * FOLDS, axis=1), samples) for one in drawn.T]
        return {
            "accessibility": value,
            "accessibility_null": float(np.quantile(np.abs([each for each in others if each is not None]), 0.95)),
        }

"""The logit lens of vectors: which tokens they promote and suppress through the unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.analysis import AnalysisError
from persona_lens.backend import Backend, Read, ReadKind, TokenBatch
from persona_lens.backend.batches import forward_batches
from persona_lens.backend.blocks import module_of
from persona_lens.backend.readout import Readout, find_readout
from persona_lens.core.documents import Record
from persona_lens.models.chat import chat_format
from persona_lens.reports.result import Result
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors, random_directions

RANDOM_DIRECTIONS = 20
PROMPTS = 8  # of the trait's questions, for the scale of the final norm


@dataclass(frozen=True)
class TokenShift:
    """A token and how far its logit moves.

    Attributes:
        id: Token id.
        text: What it stands for.
        shift: Change of the logit, minus the mean change over the vocabulary, which moves no probability.
    """

    id: int
    text: str
    shift: float


@dataclass(frozen=True)
class LensLayer:
    """What the vector of one layer says.

    Attributes:
        layer: Block index, 0-based.
        norm: Length of the vector.
        promoted: The tokens whose logits rise most, the first one most.
        suppressed: Those whose logits fall most.
        random_most: The largest rise of any token under random directions as long as the vector: the mean over
            `RANDOM_DIRECTIONS`.
        random_limit: The largest rise under any of them.
    """

    layer: int
    norm: float
    promoted: tuple[TokenShift, ...]
    suppressed: tuple[TokenShift, ...]
    random_most: float
    random_limit: float


@dataclass(frozen=True, repr=False)
class LogitLens(Record, Result):
    """The lens of a trait's vectors (the direct path only).

    A shift is what adding the raw vector once to the residual after the last block does to a logit:
    ``W_U (gain * v) / scale``, with v centred first where the final norm is a LayerNorm. The scale of the norm is held
    at its mean over the given prompts, so the lens is linear in the vector; factors and soft caps that a model applies
    to its logits afterwards are left out. For an earlier layer it is what the vector would do if no block in between
    changed it or answered to it.

    Attributes:
        trait: Name of the trait.
        reduction: Which of the vectors.
        scale: What the final norm divides by; 1 where there is none.
        layers: Layer by layer.
    """

    trait: str
    reduction: str
    scale: float
    layers: tuple[LensLayer, ...]

    kind = "lens"
    folder = None

    @property
    def summary(self) -> dict[str, Any]:  # type: ignore[override]  # made when it is asked for
        """See `persona_lens.reports.result.Result`."""
        return self.to_json()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One a layer and token."""
        return [
            {"layer": each.layer, "side": side, **asdict(token)}
            for each in self.layers
            for side, tokens in (("promoted", each.promoted), ("suppressed", each.suppressed))
            for token in tokens
        ]


def lens(
    backend: Backend,
    vectors: PersonaVectors,
    layers: Sequence[int] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    top: int = 10,
    reduction: str = OWN_REDUCTION,
    seed: int = 0,
) -> LogitLens:
    """What vectors promote and suppress through the final norm and the unembedding.

    Args:
        backend: The model, in this process.
        vectors: Of this model.
        layers: Which layers' vectors; None for all.
        prompts: Token ids of prompts; at their last tokens the scale of the final norm is taken. By default those of
            the trait's first evaluation questions.
        top: How many tokens on either side.
        reduction: Which of the vectors.
        seed: Of the random directions.

    Raises:
        AnalysisError: If there are no layers or prompts.
        ModuleError: If the weights are out of reach.
        ReadoutError: If the model ends otherwise than with one norm and an unembedding.
        VectorsError: If the vectors belong to another model, or a layer has none.
    """
    vectors.check_model(backend, allowable=False)
    layers = range(vectors.model.n_layers) if layers is None else layers
    reduction = reduction or vectors.default_reduction
    if prompts is None:
        chat, questions = chat_format(backend), vectors.trait_definition.evaluation_questions[:PROMPTS]
        prompts = [chat.encode(None, question) for question in questions]
    if not layers or not prompts or top < 1:
        raise AnalysisError("the lens needs at least one layer, one prompt and one token to show")
    rows = torch.stack([vectors.vector(layer, reduction) for layer in layers])
    readout = find_readout(module_of(backend))
    scale = _scale(backend, readout, prompts)
    shifts = _centred(readout.shifts(rows, scale))
    units = random_directions(rows.shape[1], RANDOM_DIRECTIONS, seed)
    largest = _centred(readout.shifts(units, scale)).amax(dim=1)
    found = []
    for layer, row, shift in zip(layers, rows, shifts, strict=True):
        norm = float(row.norm())
        promoted, suppressed = (_tokens(backend, shift, top, largest=side) for side in (True, False))
        most, limit = float(largest.mean()) * norm, float(largest.max()) * norm
        found.append(LensLayer(layer, norm, promoted, suppressed, most, limit))
    return LogitLens(vectors.trait, reduction, scale, tuple(found))


def _scale(backend: Backend, readout: Readout, prompts: Sequence[Sequence[int]]) -> float:
    """Mean of what the final norm divides by, at the last tokens of prompts."""
    if readout.norm is None:
        return 1.0
    read = Read(ReadKind.PROMPT_LAST, (backend.info.n_layers - 1,))
    last = [
        result.reads[read.kind.value][:, 0] for _, result in forward_batches(backend, TokenBatch.of(prompts), [read])
    ]
    return float(readout.norm.scale(torch.cat(last)).mean())


def _centred(shifts: Float[Tensor, "k vocabulary"]) -> Float[Tensor, "k vocabulary"]:
    centred: Tensor = shifts - shifts.mean(dim=1, keepdim=True)
    return centred


def _tokens(
    backend: Backend, shift: Float[Tensor, " vocabulary"], top: int, *, largest: bool
) -> tuple[TokenShift, ...]:
    known = min(len(backend.tokenizer), len(shift))  # unembeddings are often padded
    values, ids = shift[:known].topk(min(top, known), largest=largest)
    return tuple(
        TokenShift(token, str(backend.tokenizer.decode([token])), value)
        for token, value in zip(ids.tolist(), values.tolist(), strict=True)
    )

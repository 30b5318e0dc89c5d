"""Prompts before they are answered: where the last token of each stands on any number of traits."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Backend, Read, ReadKind, TokenBatch
from persona_lens.backend.memory import forward_batches
from persona_lens.monitoring.errors import MonitoringError
from persona_lens.pieces import Pieces, Row
from persona_lens.runs import RunFolder
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors

PROJECTIONS = "projections.jsonl"


def prompt_projections(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    vectors: Sequence[PersonaVectors],
    layers: Sequence[int],
    *,
    reduction: str = DEFAULT_REDUCTION,
    allow_other_model: bool = False,
) -> Float[Tensor, "prompts traits layers"]:
    """Project the last token of every prompt on every trait, before anything is generated (method, section 5).

    Prompts run in batches of like length, up to the deepest layer that is asked for.

    Args:
        backend: The model.
        prompts: Token ids as `ChatFormat.encode` gives them, up to where the model begins to answer.
        vectors: One trait or more.
        layers: Block indices, 0-based.
        reduction: Which of the vectors.
        allow_other_model: Read a model that the vectors were not extracted from.

    Returns:
        Projections on the unit vectors in residual-stream units, float32, in the order of the arguments.

    Raises:
        MonitoringError: If no vectors or no layers are given, or a vector is zero.
        TokenError: If there are no prompts, or one is empty.
        VectorsError: If there is no such layer or reduction, or vectors belong to another model.
    """
    if not vectors or not layers:
        raise MonitoringError("give vectors to project on, and layers to read: there are none")
    for each in vectors:
        if not allow_other_model:
            each.check_model(backend)
    ascending = sorted(set(layers))
    units = torch.stack([unit_vectors(each, ascending, reduction) for each in vectors], dim=1)
    tokens = TokenBatch.of(prompts)
    found = torch.empty(len(tokens), len(vectors), len(ascending))
    for rows, result in forward_batches(backend, tokens, [Read(ReadKind.PROMPT_LAST, tuple(ascending))]):
        found[rows] = projected(result.reads[ReadKind.PROMPT_LAST.value], units).transpose(1, 2)
    order = [ascending.index(layer) for layer in layers]
    return found[:, :, order]


def kept_projections(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    vectors: PersonaVectors,
    layers: Sequence[int],
    texts: Sequence[str],
    folder: RunFolder | None,
    prefix: str,
    *,
    reduction: str = DEFAULT_REDUCTION,
) -> Float[Tensor, "prompts layers"]:
    """`prompt_projections` on one trait in any model, kept in a run folder and read from there by the next call.

    Args:
        backend: The model.
        prompts: Token ids.
        vectors: The trait.
        layers: Block indices, 0-based.
        texts: What each prompt asks.
        folder: Where to keep them; None keeps nothing.
        prefix: What the file's name begins with.
        reduction: Which of the vectors.
    """

    def work(_: int) -> list[Row]:
        found = prompt_projections(backend, prompts, [vectors], layers, reduction=reduction, allow_other_model=True)
        return [{"question": text, "projections": row.tolist()} for text, row in zip(texts, found[:, 0], strict=True)]

    purposes = [json.dumps([text, list(prompt)]) for text, prompt in zip(texts, prompts, strict=True)]

    def read(row: Row) -> list[float]:
        found = list(map(float, row["projections"]))
        if len(found) != len(layers):
            raise ValueError("of other layers")
        return found

    pieces = Pieces(folder, prefix + PROJECTIONS, [range(len(prompts))], purposes, form=read)
    return torch.tensor(list(map(read, pieces.run(work))))


def unit_vectors(
    vectors: PersonaVectors, layers: Sequence[int], reduction: str = DEFAULT_REDUCTION
) -> Float[Tensor, "layers d_model"]:
    """Directions of length one.

    Raises:
        MonitoringError: If one is zero or not finite, so that there is no projection on it.
    """
    rows = torch.stack([vectors.vector(layer, reduction) for layer in layers])
    lengths = rows.norm(dim=-1, keepdim=True)
    for layer, length in zip(layers, lengths.flatten().tolist(), strict=True):
        if not 0 < length < float("inf"):
            raise MonitoringError(
                f"the {reduction} vector of {vectors.trait!r} at layer {layer} has length {length:g}: nothing can be "
                "projected on it"
            )
    units: Tensor = rows / lengths
    return units


def projected(
    activations: Float[Tensor, "rows layers d_model"], units: Float[Tensor, "layers k d_model"]
) -> Float[Tensor, "rows layers k"]:
    """Each row's projection on the k directions of its layer."""
    found: Tensor = torch.einsum("rld,lkd->rlk", activations.float(), units)
    return found

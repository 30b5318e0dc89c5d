"""What to bring back from the residual stream: `Read`, already reduced where the activations are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from persona_lens.core.errors import PersonaLensError


class ReadError(PersonaLensError):
    """A read that cannot mean anything, or that does not fit the model."""


class ReadKind(StrEnum):
    """The reductions, each taken in float32 after the edits at the layer."""

    RESPONSE_MEAN = "response_mean"  # mean over response tokens, the end-of-turn token left out
    PROMPT_MEAN = "prompt_mean"  # mean over prompt tokens, the template's own included and attention sinks left out
    PROMPT_LAST = "prompt_last"  # the last prompt token, from which the response begins
    THINKING_MEAN = "thinking_mean"  # mean over the response tokens that are thinking, see `persona_lens.backend.parts`
    ANSWER_MEAN = "answer_mean"  # mean over those that are answer: all of a model that never thinks
    RESPONSE_NORM = "response_norm"  # mean over response tokens of the residual's length, attention sinks left out
    PROJECTIONS = "projections"  # every token's projection on given directions
    NORMS = "norms"  # the length of every token's residual
    ACTIVATIONS = "activations"  # everything; large, and only on request


MEANS = (ReadKind.RESPONSE_MEAN, ReadKind.PROMPT_MEAN, ReadKind.PROMPT_LAST)
OF_PARTS = (ReadKind.THINKING_MEAN, ReadKind.ANSWER_MEAN)
PER_ROW = (*MEANS, *OF_PARTS, ReadKind.RESPONSE_NORM)  # which bring back nothing of single tokens
# To which no token of a prompt contributes.
OF_RESPONSES = (ReadKind.RESPONSE_MEAN, *OF_PARTS, ReadKind.RESPONSE_NORM)
# Reductions that a sink would dominate. Responses do not hold a text's first token, and their mean is the paper's: it
# takes in every token, as reads of single tokens do.
LEAVING_OUT_SINKS = (ReadKind.PROMPT_MEAN, ReadKind.RESPONSE_NORM)


@dataclass(frozen=True, eq=False)
class Read:
    """One thing to bring back.

    Attributes:
        kind: The reduction.
        layers: Block indices, 0-based, ascending; None reads every layer.
        directions: For `PROJECTIONS`: float [k, d_model], used at every layer, or [layers, k, d_model]. They are made
            unit vectors, so that a projection is in residual-stream units.
        sinks: For `PROMPT_MEAN` and `RESPONSE_NORM`: take attention sinks in, see `persona_lens.backend.sinks`.

    Shapes of the result, float32 on the CPU, L being the number of layers read:
        ``response_mean``, ``thinking_mean``, ``answer_mean``, ``prompt_mean``, ``prompt_last``: [batch, L, d_model];
        NaN where there is no such token, as in the prompt mean of one token: it is a sink.
        ``response_norm``: [batch, L], likewise.
        ``projections``: [batch, L, width, k], left-padded with NaN.
        ``norms``: [batch, L, width], likewise.
        ``activations``: [batch, L, width, d_model], left-padded with NaN.

    Raises:
        ReadError: If layers are not ascending, or directions are missing or not wanted.
    """

    kind: ReadKind
    layers: tuple[int, ...] | None = None
    directions: Float[Tensor, "k d_model"] | Float[Tensor, "layers k d_model"] | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        if self.sinks and self.kind not in LEAVING_OUT_SINKS:
            raise ReadError(f"{self.kind} takes in every token, attention sinks too; leave out sinks=True")
        if (self.directions is None) == (self.kind is ReadKind.PROJECTIONS):
            raise ReadError(f"{self.kind} {'needs' if self.directions is None else 'takes no'} directions")
        if self.layers is None:
            return
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ReadError(f"layers must be ascending, without repeats, from 0: got {self.layers}")

    @staticmethod
    def means(layers: tuple[int, ...] | None = None, *, sinks: bool = False) -> tuple[Read, ...]:
        """The three reductions of the method, at the same layers; the prompt mean with attention sinks or without."""
        return tuple(Read(kind, layers, sinks=sinks and kind in LEAVING_OUT_SINKS) for kind in MEANS)

    @staticmethod
    def projections(directions: Tensor, layers: tuple[int, ...] | None = None) -> Read:
        """Projections of every token on ``directions``, see `Read`."""
        return Read(ReadKind.PROJECTIONS, layers, directions)

    @property
    def leaves_out_sinks(self) -> bool:
        """Whether it depends on which tokens are attention sinks."""
        return self.kind in LEAVING_OUT_SINKS and not self.sinks

    def resolved_layers(self, n_layers: int) -> tuple[int, ...]:
        """The layers read in a model of ``n_layers`` blocks."""
        return tuple(range(n_layers)) if self.layers is None else self.layers

    def unit_directions(self, n_layers: int) -> Float[Tensor, "layers k d_model"]:
        """The directions of each layer read, of length one, float32."""
        assert self.directions is not None  # checked when the read was made
        given = self.directions.detach().to("cpu", torch.float32)
        layers = len(self.resolved_layers(n_layers))
        expanded = given.expand(layers, -1, -1) if given.ndim == 2 else given
        unit: Tensor = expanded / expanded.norm(dim=-1, keepdim=True)
        return unit

    def values_per_row(self, n_layers: int, d_model: int, width: int) -> int:
        """Numbers that the result holds for each row of a batch ``width`` tokens wide."""
        layers = len(self.resolved_layers(n_layers))
        if self.kind in (*MEANS, *OF_PARTS):
            return layers * d_model
        if self.kind is ReadKind.RESPONSE_NORM:
            return layers
        if self.kind is ReadKind.NORMS:
            return layers * width
        return layers * width * (d_model if self.directions is None else int(self.directions.shape[-2]))

    def plain(self, n_layers: int) -> dict[str, Any]:
        """The read of a model of ``n_layers`` blocks as a dictionary that needs no class of this package."""
        # Each layer's directions have memory of their own: a view is sent with all that it is a view of.
        units = None if self.directions is None else [unit.clone() for unit in self.unit_directions(n_layers)]
        return {
            "kind": self.kind.value,
            "per_row": self.kind in PER_ROW,
            "layers": self.resolved_layers(n_layers),
            "units": units,
            "sinks": not self.leaves_out_sinks,
        }


def need_prompts(reads: Sequence[Read]) -> bool:
    """Whether a prompt has to be run over for them: one whose keys and values are there already cannot be read."""
    return any(read.kind not in OF_RESPONSES for read in reads)


def need_last_token(reads: Sequence[Read]) -> bool:
    """Whether a generation has to run one step more than it may have tokens.

    The last token of a response that is cut at its limit has an activation only once the model has run over it.
    """
    return any(read.kind not in (ReadKind.PROMPT_MEAN, ReadKind.PROMPT_LAST) for read in reads)


def joined_reads(pieces: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Reads of several batches as those of one: values of tokens are padded on the left with NaN to the widest."""
    joined = {}
    for name in pieces[0]:
        values = [piece[name] for piece in pieces]
        if name in (ReadKind.PROJECTIONS, ReadKind.ACTIVATIONS, ReadKind.NORMS):
            width = max(value.shape[2] for value in values)
            within = (0, 0) * (values[0].ndim - 3)  # of a token nothing is missing
            values = [pad(value, (*within, width - value.shape[2], 0), value=torch.nan) for value in values]
        joined[name] = torch.cat(values) if len(values) > 1 else values[0]
    return joined


def check_reads(reads: Sequence[Read], n_layers: int, d_model: int) -> None:
    """Raise `ReadError` for the first read that does not fit a model of that size, or is asked for twice."""
    kinds = [read.kind for read in reads]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise ReadError(f"{kind} is asked for twice; put all its layers into one read")
    for read in reads:
        layers = read.resolved_layers(n_layers)
        if layers[-1] >= n_layers:
            raise ReadError(f"layer {layers[-1]} does not exist: the model has layers 0 to {n_layers - 1}")
        if read.directions is not None:
            _check_directions(read.directions, len(layers), d_model)


def _check_directions(directions: Tensor, n_read: int, d_model: int) -> None:
    shape = list(directions.shape)
    if directions.ndim not in (2, 3) or shape[-1] != d_model or (directions.ndim == 3 and shape[0] != n_read):
        raise ReadError(
            f"directions must be [k, {d_model}] or [{n_read}, k, {d_model}] for {n_read} layers, got {shape}"
        )
    norms = directions.norm(dim=-1)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise ReadError("directions must be finite and not zero: there is no projection on such a direction")

"""Attention sinks: tokens whose residual is massive, so that a projection there says nothing about the text.

In most models the first token of a text, whatever it is, and sometimes a few others have residuals that are many times
as long as all others and point nearly the same way: heads that have nothing to attend to attend to them. Their
projection on any direction is large, an edit that goes by it takes the model apart, and a mean that takes them in is a
mean of little else.

A token is a sink at a layer if it is the first of its text, or if its residual there is longer than the layer's limit.
That is a function of the token alone: it is the same in a batch, with a cache of keys and values, and in training. The
limits are constants of the model, `MULTIPLE` times the typical length of a residual at each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_lens.backend.blocks import context_of, text_config
from persona_lens.backend.edits import Edit, Operation
from persona_lens.backend.protocol import Backend
from persona_lens.backend.reads import Read, ReadKind
from persona_lens.backend.tokens import TokenBatch

MULTIPLE = 4.0  # other tokens of the embedded model reach 2.8 times the typical length, sinks have 4.6 and more
PROBE_TOKENS = 64

NORMS = (Read(ReadKind.NORMS),)


def probe(config: Any) -> TokenBatch:
    """The text on which residuals are measured: ids spread evenly over the first half of a model's vocabulary.

    No tokenizer is needed for it, so that a model that is trained can be measured too. Later ids are rarer, and among
    the last are those that no text ever holds.

    Args:
        config: The Hugging Face model's configuration.
    """
    tokens = min(PROBE_TOKENS, context_of(config) or PROBE_TOKENS)
    known = text_config(config).vocab_size
    return TokenBatch.of([[int((number + 0.5) * known / (2 * tokens)) for number in range(tokens)]])


def limits_from(norms: Float[Tensor, "1 layers tokens"]) -> tuple[float, ...]:
    """The limit of each layer, from the lengths of the residuals over `probe`, whose first token does not count."""
    typical = norms[0, :, 1:].float().median(dim=-1).values
    return tuple((MULTIPLE * typical).tolist())


def depend_on_sinks(edits: Sequence[Edit], reads: Sequence[Read] = ()) -> bool:
    """Whether it has to be known which tokens are sinks."""
    return any(edit.leaves_out_sinks for edit in edits) or any(read.leaves_out_sinks for read in reads)


def sink_limits(backend: Backend) -> tuple[float, ...] | None:
    """For each layer of a backend's model the length beyond which a residual is a sink's.

    Backends may say it in an attribute of this name, as those of this package do; it is measured when it is first asked
    for. None where a backend does not: the first token of each text alone is taken for a sink there.
    """
    found: tuple[float, ...] | None = getattr(backend, "sink_limits", None)
    return found


def sinks_of(backend: Backend, text: TokenBatch, to_come: int = 0) -> Bool[Tensor, "layers tokens"]:
    """Which tokens of a text of one row are sinks at each layer, unedited.

    One forward pass tells; on a server, and where a backend knows no limits, the first token alone is taken for one.

    Args:
        backend: The model.
        text: The text.
        to_come: How many tokens may follow, of which nothing is known yet.
    """
    there = text.lengths[0]
    found = torch.zeros(backend.info.n_layers, there + to_come, dtype=torch.bool)
    found[:, 0] = True
    if not backend.info.remote and (limits := sink_limits(backend)) is not None:
        norms = backend.forward(text, (), NORMS).reads["norms"][0]
        found[:, :there] |= norms > torch.tensor(limits).unsqueeze(-1)
    return found


def left_out(edit: Edit, sinks: Bool[Tensor, "layers tokens"]) -> Bool[Tensor, " tokens"]:
    """The tokens that an edit leaves out, of a text with these sinks."""
    moves_all_alike = edit.operation is Operation.ADD and not edit.relative
    layers = [] if moves_all_alike else [edit.layer]
    layers += [] if edit.condition is None else [edit.condition.layer]
    return sinks[layers].any(dim=0) & edit.leaves_out_sinks

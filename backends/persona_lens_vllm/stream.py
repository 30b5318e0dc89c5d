"""The residual stream in what vLLM's decoder blocks return, whichever form that has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def stream_of(output: Any) -> Tensor:
    """The residual stream after a block, [tokens, d_model].

    Most blocks return it in two parts, of which the next block's norm takes the sum; some return it whole, as a tensor
    or with None beside it; those of transformers, which vLLM runs where it has no model of its own, as a batch of one.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(output, Tensor) and output.ndim == 3 and len(output) == 1:
        return output[0]
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and output[0].ndim == 2:
        beside = output[1] if len(output) > 1 else None
        if beside is None:
            return output[0]
        if isinstance(beside, Tensor) and beside.shape == output[0].shape:
            return output[0] + beside
    parts = output if isinstance(output, tuple) else (output,)
    found = ", ".join(str(list(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
    raise ValueError(f"a block's output is ({found}), and no residual stream [tokens, d_model] in one part or two")


def with_stream(output: Any, h: Tensor) -> Any:
    """A block's output with another residual stream: 0 + h is h to the last bit in every precision."""
    if isinstance(output, Tensor):
        return h.view_as(output)
    if len(output) > 1 and isinstance(output[1], Tensor):
        return (torch.zeros_like(output[0]), h, *output[2:])
    return (h, *output[1:])

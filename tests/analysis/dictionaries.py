"""Stand-in dictionaries for the tests: directions and an encoder that need no SAELens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from persona_lens.analysis.dissection.features import Features, TensorDecoder
from tests.tiny import D_MODEL

LAYER = 1


def directions(count: int = 40, d_model: int = D_MODEL, seed: int = 0) -> Tensor:
    """Random directions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, d_model, generator=generator)
    return rows * (0.5 + torch.rand(count, 1, generator=generator))


def dictionary(rows: Tensor | None = None, **changed: Any) -> Features:
    """A dictionary at `LAYER` whose features are active where a residual lies along their directions."""
    weights = directions() if rows is None else rows
    given: dict[str, Any] = {
        "name": "stand-in",
        "hook": f"blocks.{LAYER}.hook_resid_post",
        "layer": LAYER,
        "decoder": TensorDecoder(weights),
        "encode": lambda h: torch.relu(h @ weights.T),
    }
    return Features(**{**given, **changed})

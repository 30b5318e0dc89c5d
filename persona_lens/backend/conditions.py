"""`Condition`: apply an edit only at tokens whose projection on some direction is high, or low."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.errors import PersonaLensError


class ConditionError(PersonaLensError):
    """A condition that can never be decided."""


@dataclass(frozen=True, eq=False)
class Condition:
    """True at a token whose projection on a direction is above (or below) a threshold.

    It is decided token by token, on the residual stream after the edits of its layer; at the edit's own layer, on the
    residual as that edit finds it.

    Attributes:
        layer: Where the projection is taken, 0-based; at or before the layer of the edit.
        direction: float [d_model]; its length does not matter.
        threshold: In residual-stream units.
        above: Whether the projection has to be above the threshold, or below.

    Raises:
        ConditionError: If the direction is no direction, or the threshold is not finite.
    """

    layer: int
    direction: Float[Tensor, " d_model"]
    threshold: float
    above: bool = True

    def __post_init__(self) -> None:
        if self.direction.ndim != 1 or not bool(torch.isfinite(self.direction).all() & self.direction.any()):
            raise ConditionError("the direction of a condition must be float [d_model], finite and not zero everywhere")
        if not isfinite(self.threshold):
            raise ConditionError(f"the threshold of a condition must be finite, got {self.threshold}")
        object.__setattr__(self, "direction", self.direction.detach().clone())

    def plain(self) -> dict[str, Any]:
        """The condition as a dictionary that needs no class of this package; its direction is of length one."""
        wide = self.direction.float()
        return {
            "layer": self.layer,
            "direction": wide / wide.norm(),
            "threshold": float(self.threshold),
            "above": self.above,
        }

"""`Cells`: what was kept of the default Assistant and of each role, by question; and levels along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from persona_lens.extraction.means import ExtractionError
from persona_lens.runs.rollouts import Request, RolloutBatches
from persona_lens.vectors.axis_evidence import AxisEvidence, axis_evidence
from persona_lens.vectors.persona_space import ASSISTANT, PersonaSpace
from persona_lens.vectors.provenance import DEFAULT_REDUCTION

PERCENTILES = tuple(range(101))


@dataclass(frozen=True, eq=False)
class Cells:
    """What was kept of the default (first) and of each role, by question.

    Attributes:
        sums: float64 [1 + roles, questions, n_layers, d_model]: means of responses, added up.
        counts: float64 [1 + roles, questions]: how many those are.
        names: Of the default and of the roles.
    """

    sums: Float[Tensor, "groups questions layers d_model"]
    counts: Float[Tensor, "groups questions"]
    names: tuple[str, ...]

    @staticmethod
    def of(
        requests: Sequence[Request], played: Sequence[bool], collected: RolloutBatches, mean: str = DEFAULT_REDUCTION
    ) -> Cells:
        """Add up the responses that count, one shard in memory at a time; empty ones have no mean."""
        names = tuple(dict.fromkeys(request.labels["role"] for request in requests))
        info, questions = collected.backend.info, 1 + max(request.labels["question_number"] for request in requests)
        sums = torch.zeros(len(names), questions, info.n_layers, info.d_model, dtype=torch.float64)
        counts = torch.zeros(len(names), questions, dtype=torch.float64)
        for indices, tensors in collected.reductions():
            for index, found in zip(indices, tensors[mean], strict=True):
                if played[index] and bool(found.isfinite().all()):
                    labels = requests[index].labels
                    place = names.index(labels["role"]), labels["question_number"]
                    sums[place] += found.double()
                    counts[place] += 1
        if not bool(counts[0].any()):
            what = "is empty" if mean == DEFAULT_REDUCTION else "comes to no answer"
            raise ExtractionError(f"every response of the default Assistant {what}; allow for more tokens")
        return Cells(sums, counts, names)

    def of_roles(self, kept: Sequence[str]) -> Cells:
        """Those of the default and of these roles."""
        places = [0, *(self.names.index(name) for name in kept)]
        return Cells(self.sums[places], self.counts[places], (self.names[0], *kept))

    @property
    def means(self) -> Float[Tensor, "groups layers d_model"]:
        """Mean over all responses of each: float32."""
        found: Tensor = self.sums.sum(dim=1) / self.counts.sum(dim=1)[:, None, None]
        return found.float()

    def evidence(self, layer: int, seed: int) -> AxisEvidence:
        """What speaks for the axis at a layer."""
        return axis_evidence(layer, self.sums[:, :, layer].numpy(), self.counts.numpy(), seed)


def projections(
    requests: Sequence[Request],
    collected: RolloutBatches,
    units: Float[Tensor, "layers d_model"],
    mean: str = DEFAULT_REDUCTION,
) -> Float[Tensor, "rows layers"]:
    """Every response's mean residual on a unit direction at each layer: float32, NaN for an empty response."""
    found = torch.full((len(requests), len(units)), torch.nan)
    for indices, tensors in collected.reductions():
        means = tensors[mean].float()
        found[torch.tensor(indices)] = einsum(means, units, "rows layers d_model, layers d_model -> rows layers")
    return found


Levels = dict[str, list[list[float]]]
"""By whose responses they are (``all``, ``default``, ``roles``) and layer: percentiles 0 to 100 of projections."""


def levels_along(requests: Sequence[Request], collected: RolloutBatches, space: PersonaSpace) -> Levels:
    """Where responses stand along the axis."""
    axis = space.axis
    units = axis / axis.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    values = projections(requests, collected, units, space.reduction).double().numpy()
    default = np.array([request.labels["role"] == ASSISTANT for request in requests])
    chosen = {"all": np.ones_like(default), "default": default, "roles": ~default}
    found = {name: np.nanpercentile(values[rows], PERCENTILES, axis=0) for name, rows in chosen.items()}
    return {name: each.T.round(4).tolist() for name, each in found.items()}

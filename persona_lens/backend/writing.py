"""Carries out edits while a model runs over a batch: which of them at which layer, and at which tokens of a pass.

Runs where the model runs, see `residual`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from persona_lens.backend.residual import changed, prepared, scheduled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor

    from persona_lens.backend.intervention import TokenMasks


class Writer:
    """Edits, as plain data, in the order in which they are applied where several meet at a layer.

    Attributes:
        at: The edits of each layer, by their number.
        leaving_out: Layers where it has to be known which tokens are attention sinks.

    Args:
        edits: See `persona_lens.backend.edits.Edit.plain`.
    """

    def __init__(self, edits: Sequence[dict[str, Any]]) -> None:
        self._edits = list(edits)
        self._ready: dict[tuple[int, torch.device], dict[str, Any]] = {}
        self._met: dict[int, Bool[Tensor, "batch window"]] = {}
        self.at: dict[int, list[int]] = {}
        self._decided_at: dict[int, list[int]] = {}
        for number, edit in enumerate(self._edits):
            self.at.setdefault(edit["layer"], []).append(number)
            if edit["condition"] is not None and edit["condition"]["layer"] < edit["layer"]:
                self._decided_at.setdefault(edit["condition"]["layer"], []).append(number)
        leaving_out = [edit for edit in self._edits if not edit["sinks"]]
        conditions = [edit["condition"] for edit in leaving_out if edit["condition"] is not None]
        self.leaving_out = {each["layer"] for each in (*leaving_out, *conditions)}

    @property
    def layers(self) -> set[int]:
        """Layers where something is written or decided."""
        return set(self.at) | set(self._decided_at)

    def block(
        self,
        layer: int,
        h: Float[Tensor, "batch window d_model"],
        masks: TokenMasks | None,
        sinks: Bool[Tensor, "batch window"] | None = None,
    ) -> Float[Tensor, "batch window d_model"]:
        """The residual after the edits of a layer.

        Args:
            layer: The layer.
            h: Its residual.
            masks: What is what in this pass; None where every token is edited.
            sinks: Which tokens of this pass are attention sinks at this layer; needed at `leaving_out`.
        """
        for number in self.at.get(layer, ()):
            edit = self._edits[number]
            if masks is None or masks.touches(edit["positions"]):
                h = self._written(number, h, masks, sinks)
        for number in self._decided_at.get(layer, ()):
            edit = self._prepared(number, h.device)
            self._met[number] = _met(edit["condition"], h, None if edit["sinks"] else sinks)
        return h

    def _written(self, number: int, h: Tensor, masks: TokenMasks | None, sinks: Tensor | None) -> Tensor:
        edit = self._prepared(number, h.device)
        sinks = None if edit["sinks"] else sinks
        where = masks.where(edit["positions"], edit["span"]) if masks is not None else None
        if edit["condition"] is not None:
            here = edit["condition"]["layer"] == edit["layer"]
            where = _both(where, _met(edit["condition"], h, sinks) if here else self._met[number], h.device)
        if sinks is not None and not edit["raw"]:
            where = _both(where, ~sinks, h.device)
        schedule = None
        if edit["schedule"] is not None and masks is not None:
            schedule = scheduled(masks.index(edit["positions"]).to(h.device, torch.float32), edit["schedule"])
        return changed(h, edit, where, schedule)

    def _prepared(self, number: int, device: torch.device) -> dict[str, Any]:
        """The edit made ready, once for each device; anew each time where it is part of a graph that is trained."""
        if (number, device) not in self._ready:
            ready = prepared(self._edits[number], device)
            if any(ready[name].requires_grad for name in ("direction", "factor")):
                return ready
            self._ready[number, device] = ready
        return self._ready[number, device]


def _met(
    condition: dict[str, Any], h: Float[Tensor, "batch window d_model"], sinks: Bool[Tensor, "batch window"] | None
) -> Bool[Tensor, "batch window"]:
    projection: Tensor = h.detach().float() @ condition["direction"]
    difference: Tensor = projection - condition["threshold"]
    met = (difference if condition["above"] else -difference).gt(0)
    return met if sinks is None else met & ~sinks


def _both(where: Tensor | None, also: Tensor, device: torch.device) -> Tensor:
    also = also.to(device)
    return also if where is None else where.to(device) & also

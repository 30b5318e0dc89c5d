"""`ProjectionPenalty`: a loss term that holds projections where the base model has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import Edit
from persona_lens.backend.blocks import bare_model, find_blocks
from persona_lens.backend.hooked import hooking_blocks
from persona_lens.finetuning.errors import FinetuningError


class ProjectionPenalty:
    """The change that training makes in the projections on some directions, squared (method, section 6).

    The base model is the model without its adapter, which runs over every batch once more. The paper reports that this
    does not work well: what is held back along the vector is learned beside it.

    Args:
        model: A PEFT model with an adapter.
        edits: Say the directions and their layers; what they would do there does not matter.

    Raises:
        FinetuningError: If the model has no adapter that can be switched off.
    """

    def __init__(self, model: Any, edits: Sequence[Edit]) -> None:
        if not hasattr(model, "disable_adapter"):
            raise FinetuningError(
                "the projection penalty compares with the model without its adapter, and there is none; train LoRA"
            )
        self._model = model
        self._blocks = find_blocks(bare_model(model))[1]
        at: dict[int, list[Tensor]] = {}
        for edit in edits:
            at.setdefault(edit.layer, []).append(edit.direction.float() / edit.direction.float().square().sum())
        self._directions = {layer: torch.stack(directions) for layer, directions in at.items()}
        self._taken: dict[int, Tensor] | None = None

    @contextmanager
    def taking(self) -> Iterator[dict[int, Tensor]]:
        """While open, forwards leave their projections, in norms of the vectors: float32 [batch, tokens, k] a layer."""
        taken: dict[int, Tensor] = {}

        def take(layer: int, h: Tensor) -> Tensor:
            directions = self._directions[layer] = self._directions[layer].to(h.device)  # moved once
            taken[layer] = h.float() @ directions.T
            return h

        with hooking_blocks(self._blocks, sorted(self._directions), take):
            yield taken

    def base(self, inputs: dict[str, Any]) -> dict[int, Tensor]:
        """The projections of the base model over a batch."""
        given = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self._model.disable_adapter(), self.taking() as taken:
            self._model(**given, use_cache=False)
        return taken

    def of(self, now: dict[int, Tensor], before: dict[int, Tensor], counted: Tensor) -> Tensor:
        """The mean squared change over directions and counted tokens.

        Args:
            now: What `taking` left of the trained model.
            before: The same of the base model.
            counted: Which tokens count, bool [batch, tokens].
        """
        terms = [(now[layer] - before[layer]).square()[counted].mean() for layer in now]
        return torch.stack([term.to(terms[0].device) for term in terms]).mean()

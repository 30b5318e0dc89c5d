"""Carries out edits while a model runs over a batch: which of them at which layer, and at which tokens of a pass.

Runs where the model runs, see `residual`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from persona_lens.backend.residual import changed, prepared, scheduled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from persona_lens.backend.tokens import PaddedTokens


class TokenMasks:
    """Which token of a running batch is what; grows by one column with each generated token."""

    def __init__(self, tokens: PaddedTokens, end_ids: Sequence[int], max_new_tokens: int) -> None:
        self.prompt = tokens.prompt
        self.response = tokens.response
        self.last_prompt = tokens.prompt & ~torch.nn.functional.pad(tokens.prompt[:, 1:], (0, 1))
        self.first = tokens.prompt & ~torch.nn.functional.pad(tokens.prompt[:, :-1], (1, 0))
        self.padded = not bool(tokens.attention.all())
        self._active = torch.ones_like(tokens.prompt[:, 0])
        self._end_ids = torch.tensor(list(end_ids), dtype=torch.long, device=tokens.ids.device)
        self._room = max_new_tokens
        self._passes = 0
        self._indices: dict[str, Tensor] = {}  # of this pass: every layer asks for the same ones
        self.window = self.fresh = tokens.ids.shape[1]

    def begin_pass(self, ids: Int[Tensor, "batch window"]) -> None:
        """Note the ids of the coming pass; after the first pass its last column is the newest token."""
        if self._passes:
            self._append(ids[:, -1].to(self.prompt.device))
        else:  # masks may come from a machine that does not know where the model is
            for name in ("prompt", "response", "last_prompt", "first", "_active", "_end_ids"):
                setattr(self, name, getattr(self, name).to(ids.device))
        self._passes += 1
        self._indices = {}
        self.window = ids.shape[1]
        self.fresh = 1 if self._passes > 1 else self.window

    def _append(self, newest: Int[Tensor, " batch"]) -> None:
        self._active = self._active & ~torch.isin(newest, self._end_ids)
        column = self._active.unsqueeze(-1) if self._room > 0 else torch.zeros_like(self._active).unsqueeze(-1)
        self._room -= 1
        nothing = torch.zeros_like(column)
        self.prompt = torch.cat([self.prompt, nothing], dim=1)
        self.last_prompt = torch.cat([self.last_prompt, nothing], dim=1)
        self.first = torch.cat([self.first, nothing], dim=1)
        self.response = torch.cat([self.response, column], dim=1)

    def stop(self, rows: Bool[Tensor, " batch"]) -> None:
        """End the responses of some rows with the newest token."""
        self._active = self._active & ~rows.to(self._active.device)

    @property
    def decoding(self) -> bool:
        """Whether the pass runs over one newly generated token a row."""
        return self._passes > 1 and self.window == 1

    @property
    def attention(self) -> Bool[Tensor, "batch width"]:
        """True at the tokens of the prompt and of the response so far."""
        return self.prompt | self.response

    def touches(self, positions: str | Tensor) -> bool:
        """Whether an edit at these positions can change anything in this pass."""
        return not self.decoding or (isinstance(positions, str) and positions != "prompt")

    def where(
        self, positions: str | Tensor, span: tuple[int, int | None] | None = None
    ) -> Bool[Tensor, "batch window"] | None:
        """The positions, or their part from ``start`` to ``stop``, as a mask over this pass's tokens; None for all.

        A finished row's tokens are changed or not as is cheaper: nothing that is kept depends on them.
        """
        if span is not None:
            return self._within(positions, *span)
        if self.decoding or (isinstance(positions, str) and positions == "all" and not self.padded):
            return None
        return self.mask(positions)[:, -self.window :]

    def _within(self, positions: str | Tensor, start: int, stop: int | None) -> Bool[Tensor, "batch window"]:
        mask, index = self.mask(positions), self.index(positions)
        length = mask.sum(dim=1, keepdim=True)
        inside = mask[:, -self.window :] & (index >= (start if start >= 0 else length + start))
        return inside if stop is None else inside & (index < (stop if stop >= 0 else length + stop))

    def index(self, positions: str | Tensor) -> Int[Tensor, "batch window"]:
        """Number of each token of this pass among the tokens of a kind, from 0; a mask's count as all tokens."""
        kind = positions if isinstance(positions, str) else "all"
        if kind not in self._indices:
            self._indices[kind] = (self.mask(kind).cumsum(dim=1) - 1)[:, -self.window :]
        return self._indices[kind]

    def mask(self, positions: str | Tensor) -> Bool[Tensor, "batch width"]:
        """The positions, a value of `Positions` or a mask over the prompts, as a mask over all tokens so far."""
        if not isinstance(positions, str):
            grown = self.prompt.shape[1] - positions.shape[1]
            return torch.nn.functional.pad(positions.to(self.prompt.device), (0, grown))
        if positions == "generating":
            return self.response | self.last_prompt
        return {"all": self.attention, "prompt": self.prompt, "response": self.response}[positions]

    def of_mean(self, kind: str) -> Bool[Tensor, "batch width"]:
        """The tokens that a mean, a value of `ReadKind`, is taken over."""
        return {"response_mean": self.response, "prompt_mean": self.prompt, "prompt_last": self.last_prompt}[kind]


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

"""Writes into the residual stream while a model runs: where it stands, what an edit makes of it, and at which tokens.

The functions take a tensor and return one; they are differentiable and never change their input. They run wherever the
model runs: like `intervention` and `sampling`, this module is sent to machines that have torch but not this package, so
at run time it uses nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from persona_lens.backend.parts.masks import PartMasks, part_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from persona_lens.backend.tokens import PaddedTokens

    class Masks(Protocol):
        """Which token of a pass is what: `TokenMasks`, or `persona_lens.backend.packed.masks.PackedMasks`."""

        def touches(self, positions: str | Tensor) -> bool: ...  # noqa: D102

        def where(  # noqa: D102
            self, positions: str | Tensor, span: tuple[int, int | None] | None = None
        ) -> Bool[Tensor, "batch window"] | None: ...

        def index(self, positions: str | Tensor) -> Int[Tensor, "batch window"]: ...  # noqa: D102

        def by_row(self, values: Float[Tensor, "rows k"]) -> Float[Tensor, "batch k"]: ...  # noqa: D102


def residual_of(output: Any) -> Tensor:
    """The residual stream in a block's output, which is a tensor or a tuple that begins with one.

    Raises:
        ValueError: If it is no [batch, tokens, d_model].
    """
    h: Tensor = output[0] if isinstance(output, tuple) else output
    if h.ndim != 3:
        raise ValueError(f"a block's output is {list(h.shape)}, and no residual stream [batch, tokens, d_model]")
    return h


def with_residual(output: Any, h: Tensor) -> Any:
    """A block's output with the residual replaced."""
    return (h, *output[1:]) if isinstance(output, tuple) else h


def sinks_among(
    layer: int,
    h: Float[Tensor, "batch tokens d_model"],
    limits: Sequence[float] | None,
    first: Bool[Tensor, "batch tokens"] | None,
) -> Bool[Tensor, "batch tokens"]:
    """Which tokens are attention sinks at a layer: the first of a text, and those whose residual is massive.

    Args:
        layer: The layer.
        h: Its residual.
        limits: For each layer the length beyond which it is massive there, constants of the model, see
            `persona_lens.backend.sinks`; None where they are not known.
        first: True at each text's first token; None where that is not known.
    """
    massive: Tensor = h.detach().float().norm(dim=-1) > (float("inf") if limits is None else limits[layer])
    return massive if first is None else massive | first.to(h.device)


def own_norm(
    h: Float[Tensor, "batch tokens d_model"], unit: Float[Tensor, " d_model"], level: float | None
) -> Float[Tensor, "batch tokens"]:
    """How far a step of the residual's own length goes."""
    length: Tensor = h.norm(dim=-1)
    return length


def to_zero(h: Tensor, unit: Tensor, level: float | None) -> Tensor:
    """How far it is to no projection on the unit direction; shapes as above."""
    return -(h @ unit)


def down_to(h: Tensor, unit: Tensor, level: float) -> Tensor:
    """How far down it is to a projection of ``level``, from above it."""
    return (level - h @ unit).clamp(max=0)


def up_to(h: Tensor, unit: Tensor, level: float) -> Tensor:
    """How far up it is to a projection of ``level``, from below it."""
    return (level - h @ unit).clamp(min=0)


def onto(h: Tensor, unit: Tensor, level: float) -> Tensor:
    """How far it is to a projection of ``level``."""
    return level - h @ unit


# By name: the argument that an edit must give; what becomes of a residual h at coefficient 1, given the direction v of
# unit v̂; and how far each token moves along v̂, from h in the precision of v, v̂ and the argument.
OPERATIONS: dict[str, tuple[str | None, str, Callable[..., Tensor]]] = {
    "add": (None, "h + v, with v raw: its norm matters; relative: h + |h| v̂", own_norm),
    "ablate": (None, "h - (h . v̂) v̂", to_zero),
    "cap": ("threshold", "h - max(h . v̂ - threshold, 0) v̂", down_to),
    "floor": ("threshold", "h + max(threshold - h . v̂, 0) v̂", up_to),
    "affine": ("target", "h - (h . v̂) v̂ + target v̂", onto),
}


def scheduled(index: Float[Tensor, "batch tokens"], points: Float[Tensor, "points 2"]) -> Float[Tensor, "batch tokens"]:
    """The factor of a schedule at token indices: linear between its points, constant outside."""
    places, factors = points[:, 0].contiguous(), points[:, 1]
    index = index.clamp(places[0], places[-1])
    right = torch.bucketize(index, places).clamp(min=1)
    share = (index - places[right - 1]) / (places[right] - places[right - 1])
    return torch.lerp(factors[right - 1], factors[right], share)


def prepared(edit: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """An edit, see `persona_lens.backend.edits.Edit.plain`, with what needs no more of a residual than its kind."""
    direction = edit["direction"].to(device, torch.promote_types(edit["direction"].dtype, torch.float32))
    factor = torch.as_tensor(edit["coefficient"]).to(device, direction.dtype).reshape(-1, 1)
    raw = edit["operation"] == "add" and not edit["relative"]
    condition, schedule = edit["condition"], edit["schedule"]
    return {
        **edit,
        "direction": direction if raw else direction / direction.norm(),
        "factor": factor,
        "step": (factor * direction).to(dtype) if raw else None,
        "condition": condition and {**condition, "direction": condition["direction"].to(device)},
        "schedule": schedule and torch.tensor(schedule, dtype=torch.float32, device=device),
    }


def changed(
    h: Float[Tensor, "batch tokens d_model"],
    edit: dict[str, Any],
    where: Bool[Tensor, "batch tokens"] | None,
    schedule: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens d_model"]:
    """The residual after one edit.

    Args:
        h: Residual of one layer.
        edit: What to do, see `prepared`.
        where: Positions to change; None changes every position.
        schedule: A further factor for each token.

    Returns:
        A new tensor in h's dtype and on its device.
    """
    direction, factor, step = edit["direction"], edit["factor"], edit["step"]
    if schedule is not None:
        factor = factor * schedule.to(factor)
    if step is not None:
        edited = h + (step.unsqueeze(1) if schedule is None else (factor.unsqueeze(-1) * direction).to(h.dtype))
    else:
        if (amount_of := edit["moves"] or OPERATIONS.get(edit["operation"], (None, "", None))[2]) is None:
            raise ValueError(f"there is no operation {edit['operation']!r}")
        wide = h.to(direction.dtype)
        amount = factor * amount_of(wide, direction, edit["level"])
        edited = (wide + amount.unsqueeze(-1) * direction).to(h.dtype)
    return edited if where is None else torch.where(where.to(h.device).unsqueeze(-1), edited, h)


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
        self._parts = PartMasks(tokens.parts, grows=max_new_tokens > 0) if tokens.parts is not None else None
        self._of_parts: dict[int, Tensor] = {}  # of this pass, likewise
        self.window = self.fresh = tokens.ids.shape[1]

    def begin_pass(self, ids: Int[Tensor, "batch window"]) -> None:
        """Note the ids of the coming pass; after the first pass its last column is the newest token."""
        if self._passes:
            self._append(ids[:, -1].to(self.prompt.device))
        else:  # masks may come from a machine that does not know where the model is
            for name in ("prompt", "response", "last_prompt", "first", "_active", "_end_ids"):
                setattr(self, name, getattr(self, name).to(ids.device))
            if self._parts is not None:
                self._parts.to(ids.device)
        self._passes += 1
        self._indices, self._of_parts = {}, {}
        self.window = ids.shape[1]
        self.fresh = 1 if self._passes > 1 else self.window

    def _append(self, newest: Int[Tensor, " batch"]) -> None:
        self._active = self._active & ~torch.isin(newest, self._end_ids)
        column = self._active.unsqueeze(-1) & (self._room > 0)
        self._room -= 1
        for name in ("prompt", "last_prompt", "first"):
            setattr(self, name, torch.nn.functional.pad(getattr(self, name), (0, 1)))
        self.response = torch.cat([self.response, column], dim=1)
        if self._parts is not None:
            self._parts.append(newest)

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
        everything = isinstance(positions, str) and positions == "all" and not self.padded
        if everything or (self.decoding and not self._is_of_part(positions)):
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

    def by_row(self, values: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
        """What an edit gives for each row, as it is multiplied with this pass's tokens, or added to them."""
        return values

    def mask(self, positions: str | Tensor) -> Bool[Tensor, "batch width"]:
        """Tokens of a kind as a mask over all tokens so far.

        Args:
            positions: A value of `Positions`, a value of `ReadKind` for those that it is a mean over, or a mask over
                the prompts.
        """
        if not isinstance(positions, str):
            grown = self.prompt.shape[1] - positions.shape[1]
            return torch.nn.functional.pad(positions.to(self.prompt.device), (0, grown))
        if positions == "all":
            return self.attention
        if positions == "generating":
            return self.response | self.last_prompt
        if positions == "prompt_last":
            return self.last_prompt
        if (part := part_of(positions)) is not None:
            return self._of_part(part)
        return self.prompt if positions.startswith("prompt") else self.response

    def _is_of_part(self, positions: str | Tensor) -> bool:
        """Whether not all tokens of a response are meant."""
        return self._parts is not None and isinstance(positions, str) and part_of(positions) is not None

    def _of_part(self, part: int) -> Bool[Tensor, "batch width"]:
        if self._parts is None:
            if part == part_of("thinking"):
                raise ValueError("nothing says which tokens are thinking: pad the batch with parts")
            return self.response
        if part not in self._of_parts:
            self._of_parts[part] = self._parts.mask(part) & self.response
        return self._of_parts[part]


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
        self._ready: dict[tuple[int, torch.device, torch.dtype], dict[str, Any]] = {}
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
        masks: Masks | None,
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
            edit = self._prepared(number, h)
            self._met[number] = _met(edit["condition"], h, None if edit["sinks"] else sinks)
        return h

    def _written(self, number: int, h: Tensor, masks: Masks | None, sinks: Tensor | None) -> Tensor:
        edit = self._prepared(number, h)
        sinks = None if edit["sinks"] else sinks
        where = masks.where(edit["positions"], edit["span"]) if masks is not None else None
        if edit["condition"] is not None:
            here = edit["condition"]["layer"] == edit["layer"]
            where = _both(where, _met(edit["condition"], h, sinks) if here else self._met[number], h.device)
        if sinks is not None and edit["step"] is None:
            where = _both(where, ~sinks, h.device)
        schedule = None
        if edit["schedule"] is not None and masks is not None:
            schedule = scheduled(masks.index(edit["positions"]).to(h.device, torch.float32), edit["schedule"])
        if masks is not None:
            name = "factor" if edit["step"] is None or schedule is not None else "step"
            edit = {**edit, name: masks.by_row(edit[name])}
        return changed(h, edit, where, schedule)

    def _prepared(self, number: int, h: Tensor) -> dict[str, Any]:
        """The edit made ready, once for each device and dtype; anew each time where it is part of a trained graph."""
        key = number, h.device, h.dtype
        if key not in self._ready:
            ready = prepared(self._edits[number], h.device, h.dtype)
            if any(ready[name].requires_grad for name in ("direction", "factor")):
                return ready
            self._ready[key] = ready
        return self._ready[key]


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

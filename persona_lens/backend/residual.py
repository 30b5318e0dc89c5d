"""The residual stream: where it stands in a block's output, and the arithmetic of edits on it.

The functions take a tensor and return one; they are differentiable and never change their input. They run wherever the
model runs: like `intervention`, `writing`, `sampling` and `logprobs`, this module is sent to machines that have torch
but not this package, so at run time it uses nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float
    from torch import Tensor


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
    h: Float[Tensor, "batch tokens d_model"], limit: float, first: Bool[Tensor, "batch tokens"] | None
) -> Bool[Tensor, "batch tokens"]:
    """Which tokens are attention sinks at a layer: the first of a text, and those whose residual is massive.

    Args:
        h: Residual of the layer.
        limit: The length beyond which it is massive there, a constant of the model, see `persona_lens.backend.sinks`.
        first: True at each text's first token; None where that is not known.
    """
    massive: Tensor = h.detach().float().norm(dim=-1) > limit
    return massive if first is None else massive | first.to(h.device)


def add(
    h: Float[Tensor, "batch tokens d_model"],
    direction: Float[Tensor, " d_model"],
    factor: Float[Tensor, "#batch #tokens"],
) -> Float[Tensor, "batch tokens d_model"]:
    """H + factor * direction, the product taken in the direction's precision."""
    return h + (factor.unsqueeze(-1) * direction).to(h.dtype)


def moved(
    h: Float[Tensor, "batch tokens d_model"],
    unit: Float[Tensor, " d_model"],
    amount: Float[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens d_model"]:
    """H moved along a unit direction, each token by its own amount; computed in the direction's precision."""
    return (h.to(unit.dtype) + amount.unsqueeze(-1) * unit).to(h.dtype)


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


def prepared(edit: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """An edit, see `persona_lens.backend.edits.Edit.plain`, with what does not depend on the residual computed."""
    direction = edit["direction"].to(device, torch.promote_types(edit["direction"].dtype, torch.float32))
    factor = torch.as_tensor(edit["coefficient"]).to(device, direction.dtype).reshape(-1, 1)
    raw = edit["operation"] == "add" and not edit["relative"]
    condition, schedule = edit["condition"], edit["schedule"]
    return {
        **edit,
        "direction": direction if raw else direction / direction.norm(),
        "factor": factor,
        "raw": raw,
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
    direction, factor = edit["direction"], edit["factor"]
    if schedule is not None:
        factor = factor * schedule.to(factor)
    if edit["raw"]:
        edited = add(h, direction, factor)
    else:
        if (amount_of := edit["moves"] or OPERATIONS.get(edit["operation"], (None, "", None))[2]) is None:
            raise ValueError(f"there is no operation {edit['operation']!r}")
        amount = amount_of(h.to(direction.dtype), direction, edit["level"])
        edited = moved(h, direction, factor * amount)
    return edited if where is None else torch.where(where.to(h.device).unsqueeze(-1), edited, h)

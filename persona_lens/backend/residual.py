"""The residual stream: where it stands in a block's output, and the arithmetic of edits on it.

The functions take a tensor and return one; they are differentiable and never change their input. They run wherever the
model runs: like `intervention`, `sampling` and `logprobs`, this module is sent to machines that have torch but not this
package, so at run time it uses nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def residual_of(output: Any) -> Tensor:
    """The residual stream in a block's output, which is a tensor or a tuple that begins with one."""
    h: Tensor = output[0] if isinstance(output, tuple) else output
    return h


def with_residual(output: Any, h: Tensor) -> Any:
    """A block's output with the residual replaced."""
    return (h, *output[1:]) if isinstance(output, tuple) else h


def add(
    h: Float[Tensor, "batch tokens d_model"],
    direction: Float[Tensor, " d_model"],
    coefficient: Float[Tensor, "#batch 1 1"],
) -> Float[Tensor, "batch tokens d_model"]:
    """H + coefficient * direction, the product taken in the direction's precision."""
    return h + (coefficient * direction).to(h.dtype)


def ablate(
    h: Float[Tensor, "batch tokens d_model"], direction: Float[Tensor, " d_model"]
) -> Float[Tensor, "batch tokens d_model"]:
    """H without its component along the direction; computed in float32 whatever the model's precision."""
    unit: Tensor = direction / direction.norm()
    wide = h.to(unit.dtype)
    return (wide - (wide @ unit).unsqueeze(-1) * unit).to(h.dtype)


def cap(
    h: Float[Tensor, "batch tokens d_model"], direction: Float[Tensor, " d_model"], threshold: float
) -> Float[Tensor, "batch tokens d_model"]:
    """H with its projection on the unit direction limited to ``threshold``; computed in float32."""
    unit: Tensor = direction / direction.norm()
    wide = h.to(unit.dtype)
    excess = (wide @ unit - threshold).clamp(min=0)
    return (wide - excess.unsqueeze(-1) * unit).to(h.dtype)


def changed(
    h: Float[Tensor, "batch tokens d_model"], edit: dict[str, Any], where: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, "batch tokens d_model"]:
    """The residual after one edit.

    Args:
        h: Residual of one layer.
        edit: What to do, as `persona_lens.backend.edits.Edit.plain` has it.
        where: Positions to change; None changes every position.

    Returns:
        A new tensor in h's dtype and on its device.

    Raises:
        ValueError: If there is no such operation.
    """
    direction = edit["direction"].to(h.device, torch.promote_types(edit["direction"].dtype, torch.float32))
    if edit["operation"] == "add":
        coefficient = torch.as_tensor(edit["coefficient"]).to(h.device, direction.dtype)
        edited = add(h, direction, coefficient.reshape(-1, 1, 1))
    elif edit["operation"] == "ablate":
        edited = ablate(h, direction)
    elif edit["operation"] == "cap":
        edited = cap(h, direction, edit["threshold"])
    else:
        raise ValueError(f"there is no operation {edit['operation']!r}")
    return edited if where is None else torch.where(where.to(h.device).unsqueeze(-1), edited, h)

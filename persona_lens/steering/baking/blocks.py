"""Blocks that write one vector and nothing else, for models that norm what a block writes before they add it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2, sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend.blocks import find_blocks
from persona_lens.steering.baking.plan import BakingError, too_long

State = dict[str, Tensor]
NORM = "post_feedforward_layernorm.weight"
# Whose f(z) z + f(-z) (-z) is z squared.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
SLIDING = "sliding_attention"
FAR = 1e3  # times the root of the norm's eps, which then changes half a millionth of what the block writes
MOST = 20  # powers of two; the largest residuals are still far from what float32 has squares for


@dataclass(frozen=True)
class Sandwich:
    """A class of models that norms what attention and MLP write.

    Attributes:
        offset: What a norm adds to its weight to have its gain.
    """

    offset: float


@dataclass(frozen=True)
class Inserted:
    """A model with blocks put between its own.

    Attributes:
        config: Its configuration.
        state: Its weights.
        names: By layer of the addition, the weight that says how long it is.
        written: By layer, what the block writes, after rounding, float64.
    """

    config: Any
    state: State
    names: dict[int, str]
    written: dict[int, Float[Tensor, " d_model"]]


def inserted(model: Any, sandwich: Sandwich, additions: Mapping[int, Float[Tensor, " d_model"]]) -> Inserted:
    """Put a block behind each block after which something is added.

    The attention of such a block writes nothing. Its MLP sends each number z of the residual through a gate and its
    mirror image, whose sum is z squared, and writes the sum of all of them along the vector: a positive multiple of it
    for every token, which the norm behind it makes the vector itself. Where nothing norms the residual, and it is so
    short that the norm's eps would count beside its square, the multiple is made larger by a power of two.

    Args:
        model: The model.
        sandwich: Its norms.
        additions: By layer what to add.

    Raises:
        BakingError: If the MLP is too narrow for that, its activation another, or its precision too small.
    """
    config, state = model.config, model.state_dict()
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    if config.intermediate_size < 2 * config.hidden_size or act not in ACTIVATIONS:
        raise BakingError(
            f"the MLP of {type(model).__name__} here has no room for a block that writes a constant, and no bias can "
            "follow its norms; keep the steering as an edit (`generate --edits`, `serve`)"
        )
    path, blocks = find_blocks(model)
    normed = hasattr(blocks[0], "pre_feedforward_layernorm")
    if model.dtype == torch.float16 and not normed:
        raise BakingError(
            f"squares of what the MLP of {type(model).__name__} reads, which nothing norms, are beyond float16; bake "
            "with --dtype float32"
        )
    place = {layer: layer + sum(each < layer for each in additions) for layer in range(len(blocks))}
    moved: State = {}
    for name, tensor in state.items():
        found = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
        moved[f"{path}.{place[int(found[1])]}.{name[found.end() :]}" if found else name] = tensor
    names, written, times = {}, {}, _times(model, normed)
    for layer, vector in additions.items():
        own, at = f"{path}.{layer}.", f"{path}.{place[layer] + 1}."
        alike = {name.removeprefix(own): torch.zeros_like(each) for name, each in state.items() if name.startswith(own)}
        written[layer] = _constant(layer, alike, vector, sandwich.offset, times)
        names[layer] = at + NORM
        moved |= {at + name: tensor for name, tensor in alike.items()}
    return Inserted(_longer(config, sorted(additions)), moved, names, written)


def _times(model: Any, normed: bool) -> float:
    """How many times the square of what the MLP reads a block writes: more where the shortest embedding is short."""
    if normed:
        return 1.0
    squares: Tensor = model.get_input_embeddings().weight.detach().float().square().sum(-1)
    least = float(squares[squares > 0].min()) if bool(squares.any()) else 1.0
    wanted = FAR * sqrt(model.config.rms_norm_eps) / least
    return 2.0 ** min(MOST, max(0, ceil(log2(wanted))))


def _constant(
    layer: int, block: State, vector: Float[Tensor, " d_model"], offset: float, times: float
) -> Float[Tensor, " d_model"]:
    """Set the weights of a block that are not zero; returns what it writes."""
    size, length = len(vector), float(vector.square().mean().sqrt())
    if length > torch.finfo(block[NORM].dtype).max:
        raise too_long(layer, block[NORM].dtype)
    unit = torch.eye(size, dtype=block["mlp.gate_proj.weight"].dtype)
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        block[name][: 2 * size] = torch.cat([unit, -unit])
    down, norm = block["mlp.down_proj.weight"], block[NORM]
    along = (vector / length).to(down.device, down.dtype)
    down[:, : 2 * size] = times * along.unsqueeze(-1)
    norm.fill_(length - offset)
    made: Tensor = along.double() / along.double().square().mean().sqrt() * (norm.double() + offset)
    return made.cpu()


def _longer(config: Any, layers: list[int]) -> Any:
    """The configuration with a block more behind each of these layers."""
    fields = config.to_dict()
    fields["num_hidden_layers"] += len(layers)
    if kinds := fields.get("layer_types"):
        added = SLIDING if SLIDING in kinds else kinds[0]  # which keeps fewer keys and values
        fields["layer_types"] = [
            each for layer, kind in enumerate(kinds) for each in ([kind, added] if layer in layers else [kind])
        ]
    return type(config).from_dict(fields)

"""A plan written into a model's weights, and what rounding to their precision leaves of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend.blocks import find_blocks
from persona_lens.steering.baking.architectures import (
    Architecture,
    Recast,
    State,
    block_writers,
    built,
)
from persona_lens.steering.baking.blocks import Sandwich, inserted
from persona_lens.steering.baking.plan import BakingError, Plan, too_long

ROWS = 8192  # of a weight at once, so that little is held in float64


@dataclass(frozen=True)
class Written:
    """A model with a plan in its weights.

    Attributes:
        model: It shares the weights that are as they were.
        note: What its class was changed to, and why that is the same; empty where it is the model's own.
        biases: By layer, the names of the weights that hold additions: biases, or gains of blocks of their own.
        added: Length of each addition, by layer.
        rounding: What rounding to the precision of the weights changes of each addition, as a share of it, by layer.
        left: What rounding leaves along the directions that are taken out, as a share of what was there: the most of
            any weight. None where none are taken out.
    """

    model: Any
    note: str
    biases: dict[int, str]
    added: dict[int, float]
    rounding: dict[int, float]
    left: float | None


def write(model: Any, architecture: Architecture, plan: Plan) -> Written:
    """Write a plan into a copy of a model, in the precision of its weights.

    Args:
        model: A causal language model; it stays as it is.
        architecture: Where it writes to the residual stream.
        plan: What to write.

    Raises:
        BakingError: If there is no class with biases for it, or no place, or no room in its precision.
    """
    if plan.basis is not None and architecture.sandwich is not None:
        raise BakingError(
            f"{type(model).__name__} norms what its blocks write on the way to the residual stream, so that no "
            "projection keeps a direction out of it; take nothing out everywhere of this model"
        )
    state: State = dict(model.state_dict())
    left = _take_out(model, architecture, plan, state) if plan.basis is not None else None
    found, names, missed = Recast(copy.deepcopy(model.config), state), dict[int, str](), dict[int, Tensor]()
    if plan.additions and architecture.sandwich is None:
        found, names, missed = _as_biases(model, architecture, plan, state)
    elif architecture.sandwich is not None:
        found, names, missed = _as_blocks(model, architecture.sandwich, plan)
    # As it is and not as it is configured: a checkpoint with a head of its own has it whatever its configuration says.
    found.config.tie_word_embeddings = plan.basis is None and _tied(model)
    made = built(found.config, found.state, next(iter(found.state.values())).dtype)
    made.generation_config = copy.deepcopy(model.generation_config)
    made.config.name_or_path = ""
    added = {layer: float(plan.additions[layer].norm()) for layer in names}
    rounding = {layer: float(missed[layer].norm()) / added[layer] for layer in names}
    return Written(made, found.note, names, added, rounding, left)


def _as_biases(
    model: Any, architecture: Architecture, plan: Plan, state: State
) -> tuple[Recast, dict[int, str], dict[int, Tensor]]:
    """The model with biases, their names by layer, and what rounding changes of each."""
    found = architecture.biased(model.config, state)
    path, names, missed = find_blocks(model)[0], {}, {}
    biases: State = {}
    for layer, vector in sorted(plan.additions.items()):
        name = f"{path}.{layer}.{architecture.mlp}"
        weight, before = found.state[f"{name}.weight"], found.state.get(f"{name}.bias")
        wanted = vector.to(weight.device) + (0.0 if before is None else before.double())
        bias = wanted.to(weight.dtype)
        if not bool(bias.isfinite().all()):
            raise too_long(layer, weight.dtype)
        names[layer], biases[f"{name}.bias"], missed[layer] = f"{name}.bias", bias, bias.double() - wanted
    return replace(found, state={**found.state, **biases}), names, missed


def _as_blocks(model: Any, sandwich: Sandwich, plan: Plan) -> tuple[Recast, dict[int, str], dict[int, Tensor]]:
    """The model with blocks that write what is added, the names of their gains, and what rounding changes of each."""
    found = inserted(model, sandwich, plan.additions)
    count = f"{len(found.names)} of {found.config.num_hidden_layers} blocks do that"
    note = (
        "its blocks norm what they write, so that each addition is a block of its own, behind the block after which it "
        f"is made, that writes it and nothing else; {count}"
    )
    missed = {layer: written - plan.additions[layer] for layer, written in found.written.items()}
    return Recast(found.config, found.state, note), found.names, missed


def _take_out(model: Any, architecture: Architecture, plan: Plan, state: State) -> float:
    """Take directions out of all that writes to the stream, in ``state``; returns the largest share that is left."""
    head = model.get_output_embeddings()
    if _tied(model):  # the head keeps what the embedding had
        [name] = [f"{path}.weight" for path, module in model.named_modules() if module is head]
        state[name] = head.weight.detach().clone()
    assert plan.basis is not None
    shares = [0.0]
    for name, across in _writing(model, architecture, state):
        whole = state[name]
        rows = whole if across or whole.ndim == 1 else whole.T
        if rows.shape[-1] != len(plan.basis):
            raise BakingError(
                f"what {name} writes is carried over to the residual stream by another projection; take nothing out "
                "everywhere of this model"
            )
        parts = torch.split(rows.reshape(-1, rows.shape[-1]), ROWS)
        cleared = [plan.without(part) for part in parts]
        was, is_left = _along(parts, plan), _along(cleared, plan)
        shares.append(is_left / was if was else 0.0)
        rest = torch.cat(cleared)
        rest = rest.reshape(rows.shape)
        state[name] = (rest if across or whole.ndim == 1 else rest.T).contiguous()
    return max(shares)


def _tied(model: Any) -> bool:
    """Whether the head has the weights of the embedding."""
    tied: bool = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return tied


def _writing(model: Any, architecture: Architecture, state: State) -> Iterator[tuple[str, bool]]:
    """Names of the weights that write to the stream, and whether their rows are what is written."""
    for path in architecture.embeddings:
        yield f"{path}.weight", True
    for path, module in block_writers(model, architecture):
        yield f"{path}.weight", type(module).__name__ == "Conv1D"
        if f"{path}.bias" in state:
            yield f"{path}.bias", True


def _along(parts: Sequence[Tensor], plan: Plan) -> float:
    """Length of what parts of a weight have along what is taken out."""
    assert plan.basis is not None
    return float(torch.stack([(part.double() @ plan.basis.to(part.device)).norm() for part in parts]).norm())

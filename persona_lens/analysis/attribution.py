"""Attribution: which parts of the model wrote the projection of a residual on a vector.

The residual stream after block l is the embedding plus what every block up to l added to it, so its projection on a
direction is the sum of the projections of these. What a block adds is the output of its attention and that of its MLP,
as they enter the stream: after the norms that some architectures put behind them. They are found by that very property
and by no name: **the writers of a block are the two modules in it whose outputs add up to what the block added**. That
holds in plain Hugging Face models of any layout, for blocks that run attention and MLP side by side, and inside a
TransformerBridge, whose wrappers return the same tensors (``blocks.l.hook_attn_out`` and ``blocks.l.hook_mlp_out`` of
TransformerLens are these two). A block in which no two outputs add up (scaled residuals, mixtures of other kinds) is
given whole: the sum still holds.

Heads split an attention whose output comes straight from its output projection, which is linear: each head's share is
what that module makes of its own part of the input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_lens.analysis import AnalysisError
from persona_lens.backend import Backend
from persona_lens.backend.blocks import find_blocks, module_of, text_config
from persona_lens.backend.readout import run
from persona_lens.backend.writing import residual_of
from persona_lens.core.documents import Record
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors

# What may be left, as a share of what a block adds, when two outputs are said to add up to it.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
COARSE_ROUNDING = 5e-2
DEPTH = 2  # of modules in modules that may be writers: wrappers put blocks one level deeper


class Part(StrEnum):
    """What writes to the residual stream."""

    EMBEDDING = "embedding"  # the stream before the first block, position embeddings and scaling included
    ATTENTION = "attention"
    MLP = "mlp"
    BLOCK = "block"  # both, where they cannot be told apart
    HEAD = "head"
    HEAD_BIAS = "head bias"  # of an attention's output projection, which belongs to no head


@dataclass(frozen=True, eq=False)
class Contribution(Record):
    """What one part adds to the projection.

    Attributes:
        part: Which kind of part.
        layer: Block index; None for the embedding.
        values: float64 [tokens], residual-stream units.
        head: Number of the head; None for other parts.
    """

    part: Part
    layer: int | None
    values: Float[Tensor, " tokens"]
    head: int | None = None

    def __str__(self) -> str:
        names = [self.part.value, "" if self.layer is None else str(self.layer)]
        return " ".join(filter(None, names)) + ("" if self.head is None else f".{self.head}")

    def to_json(self) -> dict[str, Any]:
        """The values by name, and what the part is called."""
        return {"name": str(self), **super().to_json()}


@dataclass(frozen=True, eq=False)
class Attribution(Record):
    """A projection, and who wrote it.

    Attributes:
        layer: The residual stream after this block is projected.
        ids: Token ids of the row.
        projection: float64 [tokens], on the unit vector, residual-stream units.
        parts: The embedding and every block's attention and MLP up to the layer; they sum to the projection.
        heads: The same attentions split by head, where that is exact; empty if not asked for.
    """

    layer: int
    ids: tuple[int, ...]
    projection: Float[Tensor, " tokens"]
    parts: tuple[Contribution, ...]
    heads: tuple[Contribution, ...] = ()

    @property
    def remainder(self) -> Float[Tensor, " tokens"]:
        """The projection minus the sum of its parts: rounding, about 1e-7 of the residual in float32."""
        left: Tensor = self.projection - torch.stack([each.values for each in self.parts]).sum(dim=0)
        return left

    def strongest(self, position: int = -1, count: int = 10) -> list[Contribution]:
        """The parts that add or take away most at a token."""
        return sorted(self.parts, key=lambda each: -abs(float(each.values[position])))[:count]

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {**super().to_json(), "remainder": self.remainder.tolist()}


def attribute(
    backend: Backend,
    vectors: PersonaVectors,
    layer: int,
    ids: Sequence[int],
    *,
    reduction: str = OWN_REDUCTION,
    heads: bool = False,
) -> Attribution:
    """Split the projection of every token's residual on a vector into what each part of the model wrote.

    Args:
        backend: The model, in this process. In float32 the parts sum to the projection
            within 1e-4 of it; in 16 bits the stream itself is rounded after every block, which `remainder` shows.
        vectors: Of this model.
        layer: The vector's layer, whose block's output is projected.
        ids: Token ids of one row: a prompt, with or without a response.
        reduction: Which of the vectors.
        heads: Whether to split attentions into heads.

    Raises:
        AnalysisError: If the row is empty.
        ModuleError: If the model runs elsewhere.
        VectorsError: If the vectors belong to another model, or the layer has none.
    """
    vectors.check_model(backend, allowable=False)
    direction = vectors.vector(layer, reduction).double()
    if not ids:
        raise AnalysisError("there are no tokens to attribute; give the ids of a prompt")
    module = module_of(backend)
    blocks = find_blocks(module)[1]
    n_heads = int(text_config(module.config).num_attention_heads) if heads else 0
    watch = _Watch(direction / direction.norm(), n_heads)
    with watch.attached(list(blocks)[: layer + 1]), suppress(_LastLayerReached):
        run(module, list(ids))
    return Attribution(layer, tuple(ids), watch.projection, tuple(watch.parts), tuple(watch.heads))


class _LastLayerReached(Exception):  # noqa: N818 - nothing went wrong
    """Ends the pass where nothing further is needed."""


@dataclass(eq=False)
class _Call:
    """A module's run inside a block: what came in, and what went out."""

    module: nn.Module
    given: Any
    output: Tensor


@dataclass(eq=False)
class _Watch:
    """Follows one pass block by block, and keeps projections only."""

    direction: Float[Tensor, " d_model"]
    n_heads: int
    projection: Float[Tensor, " tokens"] = field(default_factory=lambda: torch.empty(0))
    parts: list[Contribution] = field(default_factory=list)
    heads: list[Contribution] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)

    @contextmanager
    def attached(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """The hooks, which are gone afterwards whatever happened."""
        with ExitStack() as stack:
            for layer, block in enumerate(blocks):
                for name, each in block.named_modules():
                    if name and (self.n_heads or name.count(".") < DEPTH):
                        stack.callback(each.register_forward_hook(self._called, with_kwargs=True).remove)
                stack.callback(block.register_forward_pre_hook(self._entered, with_kwargs=True).remove)
                left = self._left(layer, last=layer == len(blocks) - 1)
                stack.callback(block.register_forward_hook(left).remove)
            yield

    def _entered(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.before = (args[0] if args else kwargs["hidden_states"]).detach().clone()
        self.calls.clear()
        if not self.parts:
            self.parts.append(Contribution(Part.EMBEDDING, None, self._project(self.before)))

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output  # of any part, whose shape need not be a residual's
        if isinstance(value, Tensor) and value.shape == self.before.shape and value.is_floating_point():
            self.calls.append(_Call(module, args[0] if args else None, value))

    def _left(self, layer: int, *, last: bool) -> Any:
        def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            after = residual_of(output)
            self._settle(layer, after)
            if last:
                self.projection = self._project(after)
                raise _LastLayerReached

        return on_output

    def _settle(self, layer: int, after: Tensor) -> None:
        added = after.double() - self.before.double()
        writers = _writers(self.calls, added, ROUNDING.get(after.dtype, COARSE_ROUNDING))
        if writers is None:
            self.parts.append(Contribution(Part.BLOCK, layer, added[0].cpu() @ self.direction))
            return
        for part, call in zip((Part.ATTENTION, Part.MLP), writers, strict=True):
            self.parts.append(Contribution(part, layer, self._project(call.output)))
        if self.n_heads:
            self.heads += self._split(layer, writers[0])

    def _split(self, layer: int, attention: _Call) -> Iterator[Contribution]:
        """The heads of an attention; nothing where its output is not that of a linear map of them."""
        projection = next((c for c in reversed(self.calls) if _is_output_projection(c, attention, self.n_heads)), None)
        if projection is None:
            return
        given, size = projection.given, projection.given.shape[-1] // self.n_heads
        forward = type(projection.module).forward
        bias = forward(projection.module, torch.zeros_like(given))
        for head in range(self.n_heads):
            own = torch.zeros_like(given)
            own[..., head * size : (head + 1) * size] = given[..., head * size : (head + 1) * size]
            values = self._project(forward(projection.module, own)) - self._project(bias)
            yield Contribution(Part.HEAD, layer, values, head)
        yield Contribution(Part.HEAD_BIAS, layer, self._project(bias))

    def _project(self, h: Tensor) -> Float[Tensor, " tokens"]:
        projected: Tensor = h[0].detach().double().cpu() @ self.direction
        return projected


def _writers(calls: Sequence[_Call], added: Tensor, tolerance: float) -> tuple[_Call, _Call] | None:
    """The two calls, in their order, whose outputs add up to what a block added; None where no two do."""
    different: list[_Call] = []
    for call in calls:
        if not any(torch.equal(call.output, other.output) for other in different):
            different.append(call)
    wide = [call.output.double() for call in different]
    left = {(i, j): float((added - wide[i] - wide[j]).norm()) for i, j in combinations(range(len(different)), 2)}
    if not left:
        return None
    best = min(left, key=left.__getitem__)
    if not left[best] <= tolerance * float(added.norm()):
        return None
    return different[best[0]], different[best[1]]


def _is_output_projection(call: _Call, attention: _Call, n_heads: int) -> bool:
    """Whether a call is that of one matrix which returned the attention's output."""
    own = [parameter for parameter in call.module.parameters(recurse=False) if parameter.ndim == 2]
    return (
        len(own) == 1
        and isinstance(call.given, Tensor)
        and call.given.shape[-1] % n_heads == 0
        and call.given.shape[-1] in own[0].shape
        and torch.equal(call.output, attention.output)
    )

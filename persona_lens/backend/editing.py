"""Hooks on a module's blocks, and edits by them in passes that a user runs: calls of the module, or its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from persona_lens.backend.blocks import require_reached
from persona_lens.backend.edits import Edit, Edits, as_edits, check_edits
from persona_lens.backend.protocol import Backend
from persona_lens.backend.sinks import depend_on_sinks, limits_from, probe, sink_limits
from persona_lens.backend.tokens import EditError, Positions
from persona_lens.backend.writing import Writer, residual_of, sinks_among, with_residual

BlockHook = Callable[[int, Tensor, Mapping[str, Any]], Tensor]
"""Takes a layer, its residual [batch, window, d_model] and what the block is given by keyword beside it, which is
nothing where a library's hooks are not told; returns the residual to go on with."""


@contextmanager
def hooking_blocks(blocks: nn.ModuleList, layers: Sequence[int], hook: BlockHook) -> Iterator[None]:
    """Hooks at the output of plain PyTorch blocks; gone afterwards, whatever happened inside."""

    def on_output(layer: int, _: nn.Module, __: Any, given: dict[str, Any], output: Any) -> Any:
        h = residual_of(output)
        changed = hook(layer, h, given)
        return None if changed is h else with_residual(output, changed)

    with ExitStack() as hooks:
        for layer in layers:
            handle = blocks[layer].register_forward_hook(partial(on_output, layer), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def first_tokens(h: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """Which tokens come first in their text, bool [batch, tokens]; None where nothing says so.

    It is taken from the block's own arguments, so that a block that gradient checkpointing runs a second time, when
    other batches may have run since, finds the same.

    Args:
        h: The residual, [batch, tokens, d_model].
        given: What the block is given: a mask of what each token may attend to, bool or added to the scores, [batch or
            1, 1, tokens, keys]; or positions counted from each text's first token, [batch or 1, tokens].
    """
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == h.shape[1]:
        may = mask if mask.dtype == torch.bool else mask == 0
        return (may[:, 0].sum(dim=-1) == 1).expand(h.shape[:2])  # nothing but itself
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == h.shape[1]:
        return (positions == 0).expand(h.shape[:2])
    return None


@contextmanager
def editing_blocks(
    attach: Callable[[Sequence[int], BlockHook], AbstractContextManager[None]],
    edits: Edits,
    backend: Backend,
) -> Iterator[None]:
    """While open, every forward pass over the blocks that ``attach`` reaches runs edited, in training too.

    Args:
        attach: As `hooking_blocks`, of the model's blocks.
        edits: What to write.
        backend: The model.

    Raises:
        EditError: If an edit does not fit the model, or names positions: a plain forward pass does not know which
            tokens are a prompt's.
        UnsupportedModelError: When it is closed, if no pass ran over the blocks in the meantime: what ran was another
            model than this.
    """
    edits = as_edits(edits)
    check_everywhere(edits, backend.info.n_layers, backend.info.d_model)
    if scheduled := next((edit for edit in edits if edit.schedule is not None), None):
        raise EditError(
            f"editing() does not know which token of a row comes first; leave out the schedule({scheduled.schedule})"
        )
    writer = Writer([edit.plain() for edit in edits])
    limits = sink_limits(backend) if depend_on_sinks(edits) else None
    reached: set[int] = set()

    def at_block(layer: int, h: Tensor, given: Mapping[str, Any]) -> Tensor:
        reached.add(layer)
        return written_everywhere(writer, layer, h, given, limits)

    with attach(sorted(writer.layers), at_block):
        yield
    require_reached(sorted(writer.layers - reached))


def written_everywhere(
    writer: Writer, layer: int, h: Tensor, given: Mapping[str, Any], limits: Sequence[float] | None
) -> Tensor:
    """The residual after a layer's edits at every token, attention sinks left out where an edit leaves them out.

    Where no token is known to come first, sinks are told by their length alone.
    """
    sinks = None
    if layer in writer.leaving_out:
        sinks = sinks_among(layer, h, limits, first_tokens(h, given))
    return writer.block(layer, h, None, sinks)


def check_everywhere(edits: Sequence[Edit], n_layers: int, d_model: int) -> None:
    """Raise `EditError` for the first edit that does not fit the model, or is not made at every token."""
    check_edits(edits, n_layers, d_model)
    for edit in edits:
        if edit.positions is not Positions.ALL:
            raise EditError(f"editing() cannot tell prompt from response; use positions 'all', not {edit.positions!r}")


def module_limits(model: Any, blocks: nn.ModuleList, config: Any) -> tuple[float, ...]:
    """The limits of `persona_lens.backend.sinks` for a module that no backend runs, without the adapter it may have.

    Args:
        model: A Hugging Face model, or what wraps it for training; it is left in the mode in which it was.
        blocks: Its decoder blocks.
        config: Its configuration.
    """
    norms: dict[int, Tensor] = {}

    def take(layer: int, h: Tensor, given: Mapping[str, Any]) -> Tensor:
        norms[layer] = h.float().norm(dim=-1).cpu()
        return h

    ids = torch.tensor(probe(config).prompts, device=next(model.parameters()).device)
    training = [module for module in model.modules() if module.training]
    plain = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    with torch.no_grad(), plain, hooking_blocks(blocks, range(len(blocks)), take):
        model.eval()
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            for module in training:
                module.training = True
    return limits_from(torch.stack([norms[layer] for layer in range(len(blocks))], dim=1))

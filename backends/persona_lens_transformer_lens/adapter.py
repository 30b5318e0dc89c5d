"""Reads and edits the residual stream through the hooks of a TransformerLens TransformerBridge.

The bridge's hooks sit inside the Hugging Face module that it wraps, so that module's own ``generate`` runs under
them: the sampler and the end of a turn are the same as in the other backends.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import BackendError, Edits
from persona_lens.backend.blocks import given_name
from persona_lens.backend.editing import BlockHook
from persona_lens.backend.hooked import HookedBackend
from persona_lens.models import end_of_turn_ids, load


class TransformerLensBackend(HookedBackend):
    """A TransformerBridge, hooked only while a call runs."""

    libraries = ("transformer-lens", "transformers")

    def __init__(self, bridge: Any, tokenizer: Any, name: str, revision: str | None) -> None:
        module = bridge.original_model
        ends = end_of_turn_ids(tokenizer, getattr(module, "generation_config", None))
        super().__init__(module, tokenizer, ends, name, revision, _is_copy)
        self._bridge = bridge

    @classmethod
    def open(cls, model: str, *, revision: str | None = None, **loading: Any) -> TransformerLensBackend:
        """Load a model by hub id, folder or embedded name; ``loading`` goes to `persona_lens.models.load`."""
        from transformer_lens.model_bridge import TransformerBridge

        loaded = load(model, revision, **loading)
        bridge = TransformerBridge.boot_transformers(
            loaded.source.location,
            hf_model=loaded.model,
            tokenizer=copy.deepcopy(loaded.tokenizer),  # it gives the tokenizer end and beginning tokens of its own
            dtype=loaded.model.dtype,
            device=loaded.model.device,
            trust_remote_code=bool(loading.get("trust_remote_code")),
        )
        return cls(bridge, loaded.tokenizer, loaded.source.id, loaded.source.identity)

    @classmethod
    def wrap(cls, bridge: Any, tokenizer: Any) -> TransformerLensBackend:
        """Use a TransformerBridge that is already there; its own hooks stay as they are."""
        tokenizer = tokenizer if tokenizer is not None else bridge.tokenizer
        if tokenizer is None:
            raise BackendError("this TransformerBridge holds no tokenizer; pass tokenizer=...")
        if getattr(bridge, "compatibility_mode", False):
            raise BackendError(
                "this TransformerBridge is in compatibility mode, which changes the residual stream; "
                "boot it anew without"
            )
        return cls(bridge, tokenizer, given_name(bridge.original_model), None)

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """For your own calls of the bridge without gradients.

        With them it is refused: PEFT cannot save adapters of the module once a bridge has taken it over.
        """
        if torch.is_grad_enabled():
            raise BackendError(
                "TransformerBridge changes the module it wraps, so adapters trained on it are saved under wrong names; "
                "train through the transformers or nnsight backend and use the result here. To run the bridge edited "
                "without training, do it inside torch.no_grad()"
            )

        return super().editing(edits)

    @contextmanager
    def attach(self, layers: Sequence[int], hook: BlockHook) -> Iterator[None]:
        """See `persona_lens.backend.hooked.HookedBackend.attach`; a hook point is given nothing beside the residual."""
        hooks = [(f"blocks.{layer}.hook_out", _bridge_hook(layer, hook)) for layer in layers]
        with self._bridge.hooks(fwd_hooks=hooks):
            yield


# Where a model keeps query, key and value (or gate and up projection) in one matrix, a bridge adds them one by one.
_SPLIT = re.compile(r"(?<!_original_component)\.(q|k|v|gate|in)\._original_component\.")


def _is_copy(parameter: str) -> bool:
    return _SPLIT.search(parameter) is not None


def _bridge_hook(layer: int, at_block: BlockHook) -> Any:
    def on_residual(h: Tensor, hook: Any) -> Tensor:  # TransformerLens passes its hook point by this name
        return at_block(layer, h, {})

    return on_residual

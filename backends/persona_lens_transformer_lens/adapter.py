"""Reads and edits the residual stream through the hooks of a TransformerLens TransformerBridge.

The bridge's hooks sit inside the Hugging Face module that it wraps, so that module's own ``generate`` runs under
them: the sampler and the end of a turn are the same as in the other backends.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import (
    BackendError,
    Edits,
    ForwardResult,
    Generation,
    ModelInfo,
    Read,
    Sampling,
    TokenBatch,
    Watch,
)
from persona_lens.backend.batches import context_of
from persona_lens.backend.blocks import (
    describe,
    find_base_weights,
    find_blocks,
    given_name,
    padding_id,
    vocabulary_size,
)
from persona_lens.backend.editing import TextHook, editing_blocks
from persona_lens.backend.hooked import BlockHook, HookedModel
from persona_lens.models import end_of_turn_ids, load


class TransformerLensBackend:
    """A TransformerBridge, hooked only while a call runs."""

    calls_at_once = 1

    def __init__(self, bridge: Any, tokenizer: Any, name: str, revision: str | None) -> None:
        self._bridge = bridge
        self.module = module = bridge.original_model
        self.tokenizer = tokenizer
        self.end_ids: tuple[int, ...] = end_of_turn_ids(tokenizer, getattr(module, "generation_config", None))
        backend = f"transformer-lens {version('transformer-lens')}, transformers {version('transformers')}"
        blocks = find_blocks(module)[1]
        self.info: ModelInfo = describe(module, blocks, name, revision, backend, _is_copy)
        self.context_length = context_of(module.config)
        self.base_weights = find_base_weights(module, blocks, _is_copy)
        self._hooked = HookedModel(
            module,
            self._attach,
            self.info.n_layers,
            self.info.d_model,
            self.end_ids,
            pad_id=padding_id(tokenizer, self.end_ids, vocabulary_size(module)),
        )

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

    @property
    def shares_prompts(self) -> bool:
        """See `persona_lens.backend.protocol.Backend.shares_prompts`."""
        return self._hooked.shares_prompts

    @property
    def sink_limits(self) -> tuple[float, ...]:
        """See `persona_lens.backend.sinks.SinkAware`."""
        return self._hooked.sink_limits

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.protocol.Backend.generate`."""
        return self._hooked.generate(prompts, sampling, edits, reads)

    def generate_watched(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Watch,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.streaming.WatchableBackend.generate_watched`."""
        return self._hooked.generate(prompts, sampling, edits, reads, watch)

    def forward(
        self,
        tokens: TokenBatch,
        edits: Edits = (),
        reads: Sequence[Read] = (),
        *,
        logprobs: bool = False,
    ) -> ForwardResult:
        """See `persona_lens.backend.protocol.Backend.forward`."""
        return self._hooked.forward(tokens, edits, reads, logprobs)

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

        def attach(layers: Sequence[int], hook: TextHook) -> AbstractContextManager[None]:
            return self._attach(layers, lambda layer, h: hook(layer, h, None))  # a hook point is given nothing more

        return editing_blocks(attach, edits, self)

    @contextmanager
    def _attach(self, layers: Sequence[int], hook: BlockHook) -> Iterator[None]:
        with self._bridge.hooks(
            fwd_hooks=[(f"blocks.{layer}.hook_out", _bridge_hook(layer, hook)) for layer in layers]
        ):
            yield


# Where a model keeps query, key and value (or gate and up projection) in one matrix, a bridge adds them one by one.
_SPLIT = re.compile(r"(?<!_original_component)\.(q|k|v|gate|in)\._original_component\.")


def _is_copy(parameter: str) -> bool:
    return _SPLIT.search(parameter) is not None


def _bridge_hook(layer: int, at_block: BlockHook) -> Any:
    def on_residual(h: Tensor, hook: Any) -> Tensor:  # TransformerLens passes its hook point by this name
        return at_block(layer, h)

    return on_residual

"""Reads and edits the residual stream of a model through nnsight traces.

The bodies of the traces are written out where they run, use only locals, and hand back nothing but reduced results,
because nnsight sends them elsewhere as source together with the names they read.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import (
    BackendError,
    Edit,
    ForwardResult,
    Generation,
    ModelInfo,
    Read,
    Sampling,
    TokenBatch,
)
from persona_lens.backend.blocks import describe, find_blocks, given_name, padding_id
from persona_lens.backend.edits import check_edits
from persona_lens.backend.hooked import editing_blocks, evaluating, forward_inputs, generation_config
from persona_lens.backend.intervention import Intervention
from persona_lens.backend.logprobs import response_logprobs
from persona_lens.backend.reads import check_reads
from persona_lens.backend.residual import residual_of, with_residual
from persona_lens.backend.sampling import RowSampler
from persona_lens.backend.tokens import PaddedTokens, cut_responses, pad_left
from persona_lens.models import ModelSource, end_of_turn_ids, load_model, load_tokenizer, pinned, resolve
from persona_lens_nnsight import remote
from persona_lens_nnsight.library import nnsight


class NNsightBackend:
    """A model wrapped by nnsight; the wrapper leaves the module itself unchanged.

    Args:
        model: The nnsight model.
        tokenizer: The model's own.
        name: What to call the model.
        revision: Commit or content id of its files; None where it is not known.
        key: The model's name on a server, where every trace is sent to; None runs them here.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, revision: str | None, key: str | None = None) -> None:
        self._model = model
        self._module = model._module
        self._key = key
        path, self._blocks = find_blocks(self._module)
        self._envoys = model.get(path)
        self._embedding = remote.embedding_envoy(model)
        self._head = remote.logits_envoy(model) if key is not None else None
        self._defaults = getattr(self._module, "generation_config", None)
        self._lock = threading.Lock()  # nnsight keeps the state of a run on the model
        self.tokenizer = tokenizer
        self.end_ids: tuple[int, ...] = end_of_turn_ids(tokenizer, self._defaults)
        self._pad_id = padding_id(tokenizer, self.end_ids)
        backend = f"nnsight {version('nnsight')}, transformers {version('transformers')}"
        info = describe(self._module, self._blocks, name, revision, backend)
        self.info: ModelInfo = info if key is None else remote.remote_info(info)

    @classmethod
    def open(
        cls, model: str, *, revision: str | None = None, on_server: bool = False, **loading: Any
    ) -> NNsightBackend:
        """Load a model by hub id, folder or embedded name.

        Args:
            model: Its name; a folder on a server must have the same path there.
            revision: Branch, tag or commit on the hub.
            on_server: Leave the weights to the NDIF server that nnsight is configured for.
            loading: For `persona_lens.models.load_model`; on a server only ``trust_remote_code``.
        """
        source = pinned(resolve(model, revision))
        if on_server:
            return cls._open_remote(source, revision, **loading)
        module, tokenizer = load_model(source, **loading), load_tokenizer(source)
        wrapped = nnsight.TransformersModel(module, tokenizer=tokenizer, task=remote.TASK)
        return cls(wrapped, tokenizer, source.id, source.identity)

    @classmethod
    def _open_remote(
        cls, source: ModelSource, revision: str | None, trust_remote_code: bool = False, **loading: Any
    ) -> NNsightBackend:
        for name, value in loading.items():
            if value not in ("auto", None):
                raise BackendError(f"{name} is the server's to choose for a remote model; leave it out")
        remote.register_travelling()
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        wrapped = remote.weightless(source, tokenizer, trust_remote_code)
        return cls(wrapped, tokenizer, source.id, source.identity, remote.model_key(wrapped, source, revision))

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any) -> NNsightBackend:
        """Use an nnsight model that is already there; its weights must be loaded."""
        tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise BackendError("this nnsight model holds no tokenizer; pass tokenizer=...")
        if any(parameter.is_meta for parameter in model._module.parameters()):
            raise BackendError("this nnsight model has no weights yet; load it with dispatch=True")
        return cls(model, tokenizer, given_name(model._module), None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.protocol.Backend.generate`."""
        check_edits(edits, self.info.n_layers, self.info.d_model, len(prompts))
        check_reads(reads, self.info.n_layers, self.info.d_model)
        sampling.check_rows(len(prompts))
        tokens = pad_left(TokenBatch.of(prompts), self._pad_id, self._device or "cpu")
        intervention = self._intervention(tokens, edits, reads, sampling.max_new_tokens)
        config = self._generation(generation_config(sampling, reads, self.end_ids, self._pad_id))
        sampler = RowSampler(sampling, self._device) if sampling.seeds else None
        with self._lock, torch.inference_mode(), evaluating(self._module), warnings.catch_warnings():
            # The loop over steps is open-ended on purpose; that it ends with the generation is no news.
            warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")
            ids, values = self._traced_generation(tokens, intervention, config, sampler)
        responses, ended = cut_responses(ids[:, tokens.ids.shape[1] :], self.end_ids, sampling.max_new_tokens)
        return Generation(responses, ended, _plain(values))

    def _traced_generation(
        self, tokens: PaddedTokens, intervention: Intervention, config: dict[str, Any], sampler: RowSampler | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        model, blocks, layers = self._model, self._envoys, intervention.layers
        embedding, head = self._embedding, self._head
        inputs = {"input_ids": tokens.ids, "attention_mask": tokens.attention.long()}
        with model.generate(backend=self._transport(), **config) as tracer:
            with tracer.invoke(inputs):
                for _step in tracer.iter[:]:
                    intervention.begin_pass(embedding.input)
                    for layer in layers:
                        output = blocks[layer].output
                        h = residual_of(output)
                        changed = intervention.block(layer, h)
                        if changed is not h:
                            blocks[layer].output = with_residual(output, changed)
                    if sampler is not None and head is not None:
                        head.output = sampler(head.output[:, -1]).unsqueeze(1)
                    elif sampler is not None:
                        result = model.output
                        result.logits = sampler(result.logits[:, -1]).unsqueeze(1)
            # In a block of its own: code after the steps does not run when every row ends early.
            with tracer.invoke():
                ids = nnsight.save(tracer.result)
                values = nnsight.save(intervention.results())
        return ids, values

    def forward(
        self,
        tokens: TokenBatch,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
        *,
        logprobs: bool = False,
    ) -> ForwardResult:
        """See `persona_lens.backend.protocol.Backend.forward`."""
        check_edits(edits, self.info.n_layers, self.info.d_model, len(tokens))
        check_reads(reads, self.info.n_layers, self.info.d_model)
        padded = pad_left(tokens, self._pad_id, self._device or "cpu")
        intervention = self._intervention(padded, edits, reads)
        if not logprobs and not reads:
            return ForwardResult()
        with self._lock, torch.inference_mode(), evaluating(self._module):
            values, chosen = self._traced_forward(padded, intervention, logprobs)
        return ForwardResult(_plain(values), chosen)

    def _traced_forward(
        self, tokens: PaddedTokens, intervention: Intervention, logprobs: bool
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...] | None]:
        model, blocks, embedding = self._model, self._envoys, self._embedding
        ids, response = tokens.ids, tokens.response
        layers = [layer for layer in intervention.layers if logprobs or layer <= intervention.deepest_read]
        with model.trace(forward_inputs(self._module, tokens), backend=self._transport()) as tracer:
            intervention.begin_pass(embedding.input)
            for layer in layers:
                output = blocks[layer].output
                h = residual_of(output)
                changed = intervention.block(layer, h)
                if changed is not h:
                    blocks[layer].output = with_residual(output, changed)
            values = nnsight.save(intervention.results())
            chosen = nnsight.save(response_logprobs(model.output.logits, ids, response) if logprobs else None)
            if not logprobs:
                tracer.stop()
        return values, chosen

    def editing(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """See `persona_lens.backend.protocol.Backend.editing`; acts on the plain module inside the wrapper."""
        if self._key is not None:
            raise BackendError("editing() needs the weights, which are on the server; open the model without remote")
        return editing_blocks(self._blocks, edits, self.info)

    @property
    def _device(self) -> torch.device | None:
        """Where token ids go and noise is drawn; None leaves that to the server."""
        return None if self._key is not None else self._module.device

    def _transport(self) -> Any:
        """What runs a trace; None is nnsight's own way, in this process."""
        return None if self._key is None else remote.transport(self._key, self._model)

    def _generation(self, config: Any) -> dict[str, Any]:
        """Arguments of ``generate``."""
        if self._key is None:
            return {"generation_config": config}
        return remote.plain_config(config, self._defaults)

    def _intervention(
        self, tokens: PaddedTokens, edits: Sequence[Edit], reads: Sequence[Read], max_new_tokens: int = 0
    ) -> Intervention:
        return Intervention(
            tokens,
            edits,
            reads,
            n_layers=self.info.n_layers,
            end_ids=self.end_ids,
            max_new_tokens=max_new_tokens,
        )


def _plain(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies made outside inference mode, so that a caller may train with them."""
    return {name: value.clone() for name, value in values.items()}

"""Reads and edits the residual stream of a model through nnsight traces.

The bodies of the traces are written out where they run, use only locals, and hand back nothing but reduced results,
because nnsight sends them elsewhere as source together with the names they read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from persona_lens.backend import (
    BackendError,
    Edit,
    ForwardResult,
    Generation,
    ModelInfo,
    Read,
    Sampling,
    TokenBatch,
    Watch,
)
from persona_lens.backend.batches import check_fits, context_of
from persona_lens.backend.blocks import (
    describe,
    find_base_weights,
    find_blocks,
    given_name,
    padding_id,
    require_reached,
    vocabulary_size,
)
from persona_lens.backend.editing import editing_blocks, hooking_texts
from persona_lens.backend.edits import Edits, as_edits, check_edits
from persona_lens.backend.hooked import (
    RunLock,
    deepest_layer,
    evaluating,
    forward_inputs,
    generation_config,
    hooking_blocks,
    stopping_criteria,
    watcher_of,
)
from persona_lens.backend.intervention import Intervention
from persona_lens.backend.reads import check_reads, copies
from persona_lens.backend.residual import residual_of, with_residual
from persona_lens.backend.sampling import RowSampler, response_logprobs
from persona_lens.backend.sinks import NORMS, depend_on_sinks, limits_from, probe
from persona_lens.backend.streaming import Watcher
from persona_lens.backend.tokens import PaddedTokens, cut_responses, pad_left
from persona_lens.models import end_of_turn_ids, load
from persona_lens_nnsight.envoys import embedding_envoy, reaching_blocks
from persona_lens_nnsight.library import nnsight

if TYPE_CHECKING:
    from persona_lens_nnsight.request import Request

TASK = "text-generation"


class NNsightBackend:
    """A model wrapped by nnsight; the wrapper leaves the module itself unchanged.

    Args:
        model: The nnsight model.
        tokenizer: The model's own.
        name: What to call the model.
        revision: Commit or content id of its files; None where it is not known.
    """

    shares_prompts = False  # a trace is one pass
    calls_at_once = 1

    def __init__(self, model: Any, tokenizer: Any, name: str, revision: str | None) -> None:
        self._model = model
        self.module = model._module
        path, self._blocks = find_blocks(self.module)
        self._envoys = model.get(path)
        self._embedding = embedding_envoy(model)
        self._head: Any = None  # where logits may be changed instead of in the model's output
        self._defaults = getattr(self.module, "generation_config", None)
        self._lock = RunLock()  # nnsight keeps the state of a run on the model
        self.tokenizer = tokenizer
        self.end_ids: tuple[int, ...] = end_of_turn_ids(tokenizer, self._defaults)
        self.context_length = context_of(self.module.config)
        self.base_weights = find_base_weights(self.module, self._blocks)
        self._vocabulary = vocabulary_size(self.module)
        self._pad_id = padding_id(tokenizer, self.end_ids, self._vocabulary)
        backend = f"nnsight {version('nnsight')}, transformers {version('transformers')}"
        self.info: ModelInfo = describe(self.module, self._blocks, name, revision, backend)

    @classmethod
    def open(cls, model: str, *, revision: str | None = None, **loading: Any) -> NNsightBackend:
        """Load a model by hub id, folder or embedded name; ``loading`` goes to `persona_lens.models.load`."""
        loaded = load(model, revision, **loading)
        wrapped = nnsight.TransformersModel(loaded.model, tokenizer=loaded.tokenizer, task=TASK)
        return cls(wrapped, loaded.tokenizer, loaded.source.id, loaded.source.identity)

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
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.protocol.Backend.generate`."""
        width = max(map(len, prompts), default=0) + sampling.max_new_tokens + 1
        request = self._request(as_edits(edits), reads, len(prompts), width)
        saved = self._capture_generation(prompts, sampling, as_edits(edits), reads, request)
        if request is not None:
            saved = request.send()
        return self._generation(saved, sampling)

    def generate_watched(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Watch,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.streaming.WatchableBackend.generate_watched`."""
        watcher = watcher_of(watch, len(prompts), self.info.n_layers, self.info.d_model)
        assert watcher is not None
        saved = self._capture_generation(prompts, sampling, as_edits(edits), reads, None, watcher)
        found = self._generation(saved, sampling)
        return Generation(*watcher.listener.cut(found.responses, found.ended), found.reads)

    def _generation(self, saved: dict[str, Any], sampling: Sampling) -> Generation:
        require_reached(saved["missed"])
        responses, ended = cut_responses(saved["ids"], self.end_ids, sampling.max_new_tokens)
        return Generation(responses, ended, copies(saved["values"]))

    def _capture_generation(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        request: Request | None,
        watcher: Watcher | None = None,
    ) -> dict[str, Any]:
        """Run a generation here, or leave it with the request, which the saved values come from then."""
        check_edits(edits, self.info.n_layers, self.info.d_model, len(prompts))
        check_reads(reads, self.info.n_layers, self.info.d_model)
        sampling.check_rows(len(prompts))
        check_fits(self.context_length, map(len, prompts), sampling.max_new_tokens)
        batch = TokenBatch.of(prompts)
        batch.check_vocabulary(self._vocabulary)
        tokens = pad_left(batch, self._pad_id, self._device or "cpu")
        room = sampling.max_new_tokens
        intervention = self._intervention(tokens, edits, reads, max_new_tokens=room, watcher=watcher)
        watched = watcher is not None
        config = self._arguments(generation_config(sampling, reads, self.end_ids, self._pad_id, watched=watched))
        if watched:  # called by the loop, in the thread of the caller, after the trace's own thread took the values
            config["stopping_criteria"] = stopping_criteria(watcher)
        sampler = RowSampler(sampling, self._device) if sampling.seeds else None
        with self._lock, torch.inference_mode(), evaluating(self.module), warnings.catch_warnings():
            # The loop over steps is open-ended on purpose; that it ends with the generation is no news.
            warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")
            # A hook costs less than a stop of the trace does, and a watch looks at every layer of every token.
            with hooking_blocks(self._blocks, intervention.only_watched, intervention.block), reaching_blocks():
                return self._traced_generation(tokens, intervention, config, sampler, request)

    def _traced_generation(
        self,
        tokens: PaddedTokens,
        intervention: Intervention,
        config: dict[str, Any],
        sampler: RowSampler | None,
        request: Request | None,
    ) -> dict[str, Any]:
        model, blocks, layers = self._model, self._envoys, intervention.read_or_edited
        embedding, head, width = self._embedding, self._head, tokens.ids.shape[1]
        inputs = {"input_ids": tokens.ids, "attention_mask": tokens.attention.long()}
        with model.generate(backend=request, **config) as tracer:
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
                ids = nnsight.save(tracer.result[:, width:].clone())
                missed = nnsight.save(intervention.missed)
                values = nnsight.save({} if missed else intervention.results())
        return {} if request is not None else {"ids": ids, "values": values, "missed": missed}

    def forward(
        self,
        tokens: TokenBatch,
        edits: Edits = (),
        reads: Sequence[Read] = (),
        *,
        logprobs: bool = False,
    ) -> ForwardResult:
        """See `persona_lens.backend.protocol.Backend.forward`."""
        request = self._request(as_edits(edits), reads, len(tokens), max(tokens.lengths))
        if not logprobs and not reads:
            check_edits(as_edits(edits), self.info.n_layers, self.info.d_model, len(tokens))
            return ForwardResult()
        saved = self._capture_forward(tokens, as_edits(edits), reads, logprobs, request)
        if request is not None:
            saved = request.send()
        require_reached(saved["missed"])
        return ForwardResult(copies(saved["values"]), saved["chosen"])

    def _capture_forward(
        self,
        tokens: TokenBatch,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        logprobs: bool,
        request: Request | None,
    ) -> dict[str, Any]:
        """As `_capture_generation`, for a pass over existing text."""
        check_edits(edits, self.info.n_layers, self.info.d_model, len(tokens))
        check_reads(reads, self.info.n_layers, self.info.d_model)
        check_fits(self.context_length, tokens.lengths)
        tokens.check_vocabulary(self._vocabulary)
        padded = pad_left(tokens, self._pad_id, self._device or "cpu")
        until = None if logprobs else deepest_layer(reads, self.info.n_layers)
        intervention = self._intervention(padded, edits, reads, until=until)
        with self._lock, torch.inference_mode(), evaluating(self.module), reaching_blocks():
            return self._traced_forward(padded, intervention, logprobs, request)

    def _traced_forward(
        self, tokens: PaddedTokens, intervention: Intervention, logprobs: bool, request: Request | None
    ) -> dict[str, Any]:
        model, blocks, embedding = self._model, self._envoys, self._embedding
        ids, response = tokens.ids, tokens.response
        layers = intervention.to_reach
        with model.trace(forward_inputs(self.module, tokens), backend=request) as tracer:
            intervention.begin_pass(embedding.input)
            for layer in layers:
                output = blocks[layer].output
                h = residual_of(output)
                changed = intervention.block(layer, h)
                if changed is not h:
                    blocks[layer].output = with_residual(output, changed)
            missed = nnsight.save(intervention.missed)
            values = nnsight.save({} if missed else intervention.results())
            chosen = nnsight.save(response_logprobs(model.output.logits, ids, response) if logprobs else None)
            if not logprobs:
                tracer.stop()
        return {} if request is not None else {"values": values, "chosen": chosen, "missed": missed}

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """See `persona_lens.backend.protocol.Backend.editing`; acts on the plain module inside the wrapper."""
        return editing_blocks(partial(hooking_texts, self._blocks), edits, self)

    @cached_property
    def sink_limits(self) -> tuple[float, ...]:
        """See `persona_lens.backend.sinks.SinkAware`; one small pass, or request."""
        return limits_from(self.forward(probe(self.module.config), (), NORMS).reads["norms"])

    @property
    def _device(self) -> torch.device | None:
        """Where token ids go and noise is drawn."""
        device: torch.device = self.module.device
        return device

    def _request(self, edits: Sequence[Edit], reads: Sequence[Read], rows: int, width: int) -> Request | None:
        """What takes a trace over so many rows, each so many tokens wide, elsewhere; None runs it here."""
        return None

    def _arguments(self, config: Any) -> dict[str, Any]:
        """Arguments of ``generate``."""
        return {"generation_config": config}

    def _intervention(
        self, tokens: PaddedTokens, edits: Sequence[Edit], reads: Sequence[Read], **run: Any
    ) -> Intervention:
        limits = self._known_limits() if depend_on_sinks(edits, reads) else None
        known: dict[str, Any] = {"n_layers": self.info.n_layers, "end_ids": self.end_ids, "sink_limits": limits}
        return Intervention(tokens, edits, reads, **known, **run)

    def _known_limits(self) -> tuple[float, ...] | None:
        return self.sink_limits

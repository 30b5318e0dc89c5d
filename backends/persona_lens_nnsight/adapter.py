"""Reads and edits the residual stream of a model through nnsight traces.

The bodies of the traces are written out where they run, use only locals, and hand back nothing but reduced results,
because nnsight sends them elsewhere as source together with the names they read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from persona_lens.backend import BackendError, Edit, ForwardResult, Generation, Read, Sampling, TokenBatch
from persona_lens.backend.blocks import given_name, require_reached
from persona_lens.backend.hooked import (
    HookedBackend,
    deepest_layer,
    evaluating,
    forward_inputs,
    generation_config,
    stopping_criteria,
)
from persona_lens.backend.intervention import Intervention
from persona_lens.backend.parts.asked import budgets_for, parts_for
from persona_lens.backend.sampling import RowSampler, response_logprobs
from persona_lens.backend.streaming import Watcher
from persona_lens.backend.tokens import PaddedTokens, cut_responses, pad_left
from persona_lens.backend.writing import residual_of, with_residual
from persona_lens.models import end_of_turn_ids, load
from persona_lens_nnsight.library import embedding_envoy, nnsight, reaching_blocks

if TYPE_CHECKING:
    from persona_lens_nnsight.request import Request

TASK = "text-generation"


class NNsightBackend(HookedBackend):
    """A model wrapped by nnsight; the wrapper leaves the module itself unchanged.

    Args:
        model: The nnsight model.
        tokenizer: The model's own.
        name: What to call the model.
        revision: Commit or content id of its files; None where it is not known.
    """

    libraries = ("nnsight", "transformers")

    def __init__(self, model: Any, tokenizer: Any, name: str, revision: str | None) -> None:
        self._defaults = getattr(model._module, "generation_config", None)
        super().__init__(model._module, tokenizer, end_of_turn_ids(tokenizer, self._defaults), name, revision)
        self.shares_prompts = False  # a trace is one pass
        self._model = model
        self._envoys = model.get(self.path)
        self._embedding = embedding_envoy(model)
        self._head: Any = None  # where logits may be changed instead of in the model's output

    @classmethod
    def open(cls, model: str, *, revision: str | None = None, **loading: Any) -> NNsightBackend:
        """Load a model by hub id, folder or embedded name; ``loading`` goes to `persona_lens.models.load`."""
        loaded = load(model, revision, **loading)
        # Its pipeline moves a model to the first GPU unless it is told a device; one spread over several it leaves.
        place = {} if hasattr(loaded.model, "hf_device_map") else {"device": loaded.model.device}
        wrapped = nnsight.TransformersModel(loaded.model, tokenizer=loaded.tokenizer, task=TASK, **place)
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

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        watcher: Watcher | None,
    ) -> Generation:
        width = max(map(len, prompts), default=0) + sampling.max_new_tokens + 1
        request = self._request(edits, reads, len(prompts), width)
        saved = _found(self._capture_generation(prompts, sampling, edits, reads, request, watcher), request)
        responses, ended = cut_responses(saved["ids"], self.end_ids, sampling.max_new_tokens)
        return Generation(responses, ended, saved["values"])

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
        tokens = self.padded_prompts(prompts, sampling, edits, reads)
        room = sampling.max_new_tokens
        intervention = self.intervention(tokens, edits, reads, max_new_tokens=room, watcher=watcher)
        watched = watcher is not None
        config = self._arguments(generation_config(sampling, reads, self.end_ids, self.pad_id, watched=watched))
        if watched:  # called by the loop, in the thread of the caller, after the trace's own thread took the values
            config["stopping_criteria"] = stopping_criteria(watcher)
        sampler = RowSampler(sampling, self.device, budgets_for(self.tokenizer, prompts, sampling))
        # A hook costs less than a stop of the trace does, and a watch looks at every layer of every token.
        hooks = self.attach(intervention.only_watched, lambda layer, h, _: intervention.block(layer, h))
        with self._tracing(), hooks:
            return self._traced_generation(tokens, intervention, config, sampler if sampler.acts else None, request)

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
                    fed = embedding.input
                    intervention.begin_pass(fed)
                    for layer in layers:
                        output = blocks[layer].output
                        h = residual_of(output)
                        changed = intervention.block(layer, h)
                        if changed is not h:
                            blocks[layer].output = with_residual(output, changed)
                    if sampler is not None and head is not None:
                        head.output = sampler(head.output[:, -1], fed[:, -1]).unsqueeze(1)
                    elif sampler is not None:
                        result = model.output
                        result.logits = sampler(result.logits[:, -1], fed[:, -1]).unsqueeze(1)
            # In a block of its own: code after the steps does not run when every row ends early.
            with tracer.invoke():
                ids = nnsight.save(tracer.result[:, width:].clone())
                missed = nnsight.save(intervention.missed)
                values = nnsight.save({} if missed else intervention.results())
        return {} if request is not None else {"ids": ids, "values": values, "missed": missed}

    def _forward(
        self, batch: TokenBatch, edits: Sequence[Edit], reads: Sequence[Read], logprobs: bool
    ) -> ForwardResult:
        request = self._request(edits, reads, len(batch), max(batch.lengths))
        saved = _found(self._capture_forward(batch, edits, reads, logprobs, request), request)
        return ForwardResult(saved["values"], saved["chosen"])

    def _capture_forward(
        self,
        batch: TokenBatch,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        logprobs: bool,
        request: Request | None,
    ) -> dict[str, Any]:
        """As `_capture_generation`, for a pass over existing text."""
        tokens = pad_left(batch, self.pad_id, self.device or "cpu", parts_for(self.tokenizer, edits, reads))
        until = None if logprobs else deepest_layer(reads, self.info.n_layers)
        intervention = self.intervention(tokens, edits, reads, until=until)
        model, blocks, layers, embedding = self._model, self._envoys, intervention.to_reach, self._embedding
        ids, response = tokens.ids, tokens.response
        with self._tracing(), model.trace(forward_inputs(self.module, tokens), backend=request) as tracer:
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

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        with self._lock, torch.inference_mode(), evaluating(self.module), warnings.catch_warnings(), reaching_blocks():
            # The loop over steps is open-ended on purpose; that it ends with the generation is no news.
            warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")
            yield

    def _request(self, edits: Sequence[Edit], reads: Sequence[Read], rows: int, width: int) -> Request | None:
        """What takes a trace over so many rows, each so many tokens wide, elsewhere; None runs it here."""
        return None

    def _arguments(self, config: Any) -> dict[str, Any]:
        """Arguments of ``generate``."""
        return {"generation_config": config}


def _found(saved: dict[str, Any], request: Request | None) -> dict[str, Any]:
    """What a trace saved, here or where the request takes it.

    Raises:
        UnsupportedModelError: If a block that was to be read or edited never ran in a pass.
    """
    saved = saved if request is None else request.send()
    require_reached(saved["missed"])
    # Copies made outside inference mode: a caller may train with them.
    return {**saved, "values": {name: value.clone() for name, value in saved["values"].items()}}

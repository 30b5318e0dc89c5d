"""Generation and forward passes over a Hugging Face module whose blocks can be hooked.

Shared by adapters whose library leaves such a module in reach: they differ only in how a hook gets to a block, which
is what they pass as ``attach``.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from persona_lens.backend.batches import batches_of_passes, can_run_prompts_once, check_fits, context_of, rows_at_once
from persona_lens.backend.blocks import require_reached, vocabulary_size
from persona_lens.backend.edits import Edit, Edits, as_edits, check_edits
from persona_lens.backend.intervention import Intervention
from persona_lens.backend.protocol import ForwardResult, Generation
from persona_lens.backend.reads import Read, ReadKind, check_reads
from persona_lens.backend.residual import residual_of, with_residual
from persona_lens.backend.sampling import RowSampler, continued_logprobs, response_logprobs
from persona_lens.backend.shared_prompts import SharedPrompts, attention_for_reading, can_share_prompts
from persona_lens.backend.sinks import NORMS, depend_on_sinks, limits_from, probe
from persona_lens.backend.streaming import Watch, Watcher
from persona_lens.backend.tokens import PaddedTokens, Sampling, TokenBatch, cut_responses, pad_left, pad_right
from persona_lens.core.errors import PersonaLensError


class BusyError(PersonaLensError):
    """The model was asked for something from inside its own generation."""


class RunLock:
    """A lock around a run. Other threads wait; the thread that holds it is told, where a plain lock would hang."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise BusyError(
                "the model is generating, and this callback asked it for something else; note what there is to do and "
                "do it once the generation is over"
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()


BlockHook = Callable[[int, Tensor], Tensor]
"""Takes a layer and its residual [batch, window, d_model], returns the residual to go on with."""


@runtime_checkable
class Attach(Protocol):
    """Hooks ``hook(layer, residual) -> residual`` at the output of the named blocks while the context is open."""

    def __call__(self, layers: Sequence[int], hook: BlockHook) -> AbstractContextManager[None]:
        """Open the context."""
        ...


@dataclass(frozen=True)
class HookedModel:
    """A Hugging Face causal language model and the way to hook its blocks.

    Attributes:
        model: The module whose ``generate`` and ``forward`` run.
        attach: See `Attach`.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        end_ids: Ids that end a turn.
        pad_id: Id to pad with; what it is does not matter, since padding is always masked by position.
    """

    model: Any
    attach: Attach
    n_layers: int
    d_model: int
    end_ids: tuple[int, ...]
    pad_id: int
    _lock: RunLock = field(default_factory=RunLock, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return torch.device(self.model.device)

    @property
    def shares_prompts(self) -> bool:
        """See `persona_lens.backend.protocol.Backend.shares_prompts`."""
        return can_share_prompts(self.model)

    @cached_property
    def sink_limits(self) -> tuple[float, ...]:
        """See `persona_lens.backend.sinks.SinkAware`."""
        found = self.forward(probe(self.model.config), (), NORMS, logprobs=False)
        return limits_from(found.reads["norms"])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Edits,
        reads: Sequence[Read],
        watch: Watch | None = None,
    ) -> Generation:
        """See `persona_lens.backend.protocol.Backend.generate`, and `generate_watched` in `backend.watching`."""
        edits = as_edits(edits)
        check_edits(edits, self.n_layers, self.d_model, len(prompts))
        check_reads(reads, self.n_layers, self.d_model)
        sampling.check_rows(len(prompts))
        check_fits(context_of(self.model.config), map(len, prompts), sampling.max_new_tokens)
        watcher = watcher_of(watch, len(prompts), self.n_layers, self.d_model)
        batch = TokenBatch.of(prompts)
        batch.check_vocabulary(vocabulary_size(self.model))
        tokens = pad_left(batch, self.pad_id, self.device)
        intervention = self._intervention(tokens, edits, reads, sampling.max_new_tokens, watcher)
        processors = LogitsProcessorList([_Sampler(RowSampler(sampling, self.device))] if sampling.seeds else [])
        config = generation_config(sampling, reads, self.end_ids, self.pad_id, watched=watch is not None)
        with self._running(intervention):
            ids = self.model.generate(
                input_ids=tokens.ids,
                attention_mask=tokens.attention.long(),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=stopping_criteria(watcher),
            )
        generated = ids[:, tokens.ids.shape[1] :]
        responses, ended = cut_responses(generated, self.end_ids, sampling.max_new_tokens)
        if watcher is not None:
            responses, ended = watcher.listener.cut(responses, ended)
        return Generation(responses, ended, results_of(intervention))

    def forward(self, batch: TokenBatch, edits: Edits, reads: Sequence[Read], logprobs: bool) -> ForwardResult:
        """See `persona_lens.backend.protocol.Backend.forward`."""
        edits = as_edits(edits)
        check_edits(edits, self.n_layers, self.d_model, len(batch))
        check_reads(reads, self.n_layers, self.d_model)
        batch.check_vocabulary(vocabulary_size(self.model))
        if not reads and not logprobs:
            return ForwardResult()
        check_fits(context_of(self.model.config), batch.lengths)
        if self.shares_prompts and can_run_prompts_once(batch, edits, reads):
            return self._forward_sharing(batch, reads, logprobs)
        tokens = pad_left(batch, self.pad_id, self.device)
        stop_at = None if logprobs else deepest_layer(reads, self.n_layers)
        intervention = self._intervention(tokens, edits, reads, until=stop_at)
        output = self._run(intervention, stop_at, forward_inputs(self.model, tokens))
        values = response_logprobs(output.logits, tokens.ids, tokens.response) if logprobs else None
        return ForwardResult(results_of(intervention), values)

    def _forward_sharing(self, batch: TokenBatch, reads: Sequence[Read], logprobs: bool) -> ForwardResult:
        """`forward` without edits: reads of prompts while the different prompts run, of responses after them."""
        of_response = [read for read in reads if read.kind is ReadKind.RESPONSE_MEAN]
        of_prompt = [read for read in reads if read.kind is not ReadKind.RESPONSE_MEAN]
        stop_at = None if logprobs else deepest_layer(reads, self.n_layers)
        shared = SharedPrompts(self.model, batch, self.pad_id, split=not of_prompt)
        if (beginning := shared.beginning_inputs()) is not None:
            self._run(self._intervention(shared.tokens, (), ()), stop_at, beginning)
        intervention = self._intervention(shared.tokens, (), of_prompt)
        begun = self._run(intervention, stop_at, shared.prompt_inputs())
        found = {name: value[shared.prompt_of] for name, value in results_of(intervention).items()}
        chosen: list[Tensor] = [torch.empty(0)] * len(batch)
        for read in of_response:
            layers = len(read.resolved_layers(self.n_layers))
            found[read.kind.value] = torch.full((len(batch), layers, self.d_model), torch.nan)
        pending = shared.continuations(batch, whole=bool(of_response)) if of_response or logprobs else []
        most = rows_at_once(self.device.type, max(map(len, batch.prompts)))
        lengths = [len(each.tokens) for each in pending]
        for numbers in batches_of_passes(lengths, most, self.device.type):
            together = [pending[number] for number in numbers]
            output = None
            if together[-1].tokens:  # the longest
                tokens = pad_right([each.tokens for each in together], self.pad_id, self.device)
                intervention = self._intervention(tokens, (), of_response)
                output = self._run(intervention, stop_at, shared.response_inputs(together, tokens))
                for name, value in results_of(intervention).items():
                    found[name][[each.rows[0] for each in together]] = value
            for position, each in enumerate(together if logprobs else ()):
                before = begun.logits[each.prompt, -1:]
                after = output.logits[position] if output is not None else before[:0]
                for row in each.rows:
                    chosen[row] = continued_logprobs(before, after, batch.responses[row])
        return ForwardResult(found, tuple(chosen) if logprobs else None)

    def _run(self, intervention: Intervention, stop_at: int | None, inputs: dict[str, Any]) -> Any:
        """The model's output, or None if the pass was stopped after a layer."""
        try:
            with self._running(intervention, stop_at), attention_for_reading(self.model):
                return self.model(**inputs)
        except _DeepestLayerReached:
            return None

    def _intervention(
        self,
        tokens: PaddedTokens,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        max_new_tokens: int = 0,
        watcher: Watcher | None = None,
        until: int | None = None,
    ) -> Intervention:
        return Intervention(
            tokens,
            edits,
            reads,
            n_layers=self.n_layers,
            end_ids=self.end_ids,
            max_new_tokens=max_new_tokens,
            sink_limits=self.sink_limits if depend_on_sinks(edits, reads) else None,
            watcher=watcher,
            until=until,
        )

    @contextmanager
    def _running(self, intervention: Intervention, stop_at: int | None = None) -> Iterator[None]:
        with self._lock, torch.inference_mode(), evaluating(self.model), self._intervening(intervention, stop_at):
            yield

    @contextmanager
    def _intervening(self, intervention: Intervention, stop_at: int | None) -> Iterator[None]:
        def at_block(layer: int, h: Tensor) -> Tensor:
            h = intervention.block(layer, h)
            if layer == stop_at:
                raise _DeepestLayerReached
            return h

        def before_pass(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            intervention.begin_pass(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

        layers = {*intervention.layers, *(() if stop_at is None else (stop_at,))}
        with self.attach(sorted(layers), at_block):
            handle = self.model.register_forward_pre_hook(before_pass, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()


def results_of(intervention: Intervention) -> dict[str, Tensor]:
    """What the reads of a finished run brought.

    Raises:
        UnsupportedModelError: If a block that was to be read or edited never ran in a pass.
    """
    require_reached(intervention.missed)
    return intervention.results()


def deepest_layer(reads: Sequence[Read], n_layers: int) -> int:
    """The last layer that any of the reads needs."""
    return max(read.resolved_layers(n_layers)[-1] for read in reads)


@contextmanager
def hooking_blocks(blocks: nn.ModuleList, layers: Sequence[int], hook: BlockHook) -> Iterator[None]:
    """`Attach` for plain PyTorch blocks; the hooks are gone afterwards, whatever happened inside."""
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(blocks[layer].register_forward_hook(_forward_hook(layer, hook)).remove)
        yield


def _forward_hook(layer: int, hook: BlockHook) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        h = residual_of(output)
        changed = hook(layer, h)
        return None if changed is h else with_residual(output, changed)

    return on_output


class _DeepestLayerReached(Exception):  # noqa: N818 - nothing went wrong
    """Ends a forward pass once nothing further is needed."""


class _Sampler(LogitsProcessor):
    def __init__(self, sampler: RowSampler) -> None:
        self.sampler = sampler

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.sampler(scores)


class _Delivering(StoppingCriteria):
    """Lets a watcher call back after each step: by then the loop has to wait for the device in any case."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return self.watcher.deliver().to(input_ids.device)


def stopping_criteria(watcher: Watcher | None) -> StoppingCriteriaList:
    """What ends rows of a generation beside its configuration: the callback of a watch."""
    return StoppingCriteriaList([] if watcher is None else [_Delivering(watcher)])


def watcher_of(watch: Watch | None, rows: int, n_layers: int, d_model: int) -> Watcher | None:
    """What carries out a watch of so many rows.

    Raises:
        ReadError: If the watch does not fit a model of that size.
    """
    if watch is None:
        return None
    check_reads([watch.read], n_layers, d_model)
    return Watcher(watch, rows, n_layers)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode and without the generation defaults of the model's files, and put all back as it was.

    ``generate`` takes what its configuration leaves open (suppressed tokens, beams, a number of sequences) from the
    model's own, so that has to be neutral too.
    """
    training = [module for module in model.modules() if module.training]
    defaults = getattr(model, "generation_config", None)
    for module in training:
        module.training = False
    model.generation_config = GenerationConfig()  # type: ignore[assignment, no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = defaults  # type: ignore[assignment]
        for module in training:
            module.training = True


def generation_config(
    sampling: Sampling, reads: Sequence[Read], end_ids: Sequence[int], pad_id: int, *, watched: bool = False
) -> GenerationConfig:
    """Greedy decoding; the noise that makes it sampling is in the logits.

    One step more is run where a read or a watch needs the response: the last token of a response that is cut at its
    limit has an activation only once the model has run over it.
    """
    needs_last_token = watched or any(read.kind not in (ReadKind.PROMPT_MEAN, ReadKind.PROMPT_LAST) for read in reads)
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens + needs_last_token,
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
        use_cache=sampling.use_cache,
        return_dict_in_generate=False,
    )


def forward_inputs(model: nn.Module, tokens: PaddedTokens) -> dict[str, Any]:
    """Arguments of a plain forward pass over a padded batch, as far as the model's signature has them.

    Positions are given since models count padding otherwise; the vocabulary projection is limited to the positions that
    predict a response token.
    """
    accepted = inspect.signature(model.forward).parameters
    width = tokens.ids.shape[1]
    longest_response = int(tokens.response.sum(dim=1).max())
    inputs: dict[str, Any] = {
        "input_ids": tokens.ids,
        "attention_mask": tokens.attention.long(),
        "position_ids": tokens.position_ids,
        "use_cache": False,
        "logits_to_keep": min(longest_response + 1, width),
    }
    return {name: value for name, value in inputs.items() if name in accepted}

"""`HookedBackend`: generation and forward passes over a Hugging Face module whose blocks can be hooked.

Adapters whose library leaves such a module in reach derive from it: they differ in how a hook gets to a block.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from persona_lens.backend.batches import (
    batches_of_passes,
    can_run_prompts_once,
    check_fits,
    check_request,
    rows_at_once,
)
from persona_lens.backend.blocks import (
    context_of,
    describe,
    find_base_weights,
    find_blocks,
    padding_id,
    require_reached,
    running_device,
    vocabulary_size,
)
from persona_lens.backend.editing import BlockHook, editing_blocks, hooking_blocks
from persona_lens.backend.edits import Edit, Edits, as_edits
from persona_lens.backend.intervention import Intervention
from persona_lens.backend.parts.asked import budgets_for, parts_for
from persona_lens.backend.protocol import ForwardResult, Generation
from persona_lens.backend.reads import OF_RESPONSES, Read, ReadKind, check_reads, need_last_token
from persona_lens.backend.sampling import RowSampler, brought, continued_logprobs, response_logprobs
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


class HookedBackend:
    """A Hugging Face causal language model whose blocks can be hooked: a whole backend.

    An adapter derives from it. It says how a model is opened and, where that is not by PyTorch's own hooks, how a hook
    gets to a block: see `attach`. Nothing about the module is changed outside a call.

    Attributes:
        libraries: Distributions whose versions `info` names.
        module: The module whose ``generate`` and ``forward`` run.
        path: Dotted path of its decoder blocks.
        blocks: Them.

    Args:
        module: The module.
        tokenizer: The model's own.
        end_ids: Ids that end a turn, see `persona_lens.models.end_of_turn_ids`.
        name: What to call the model.
        revision: Commit or content id of its files; None where it is not known.
        is_copy: As `persona_lens.backend.blocks.weights_digest` takes it.
    """

    libraries: ClassVar[tuple[str, ...]] = ("transformers",)
    calls_at_once = 1

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        end_ids: Sequence[int],
        name: str,
        revision: str | None = None,
        is_copy: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.module = module
        self.path, self.blocks = find_blocks(module)
        self.tokenizer = tokenizer
        self.end_ids = tuple(end_ids)
        libraries = ", ".join(f"{each} {version(each)}" for each in self.libraries)
        self.info = describe(module, self.blocks, name, revision, libraries, is_copy)
        self.context_length = context_of(module.config)
        self.base_weights = find_base_weights(module, self.blocks, is_copy)
        self.shares_prompts = can_share_prompts(module)
        self.pad_id = padding_id(tokenizer, self.end_ids, vocabulary_size(module))
        self._lock = RunLock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.info.in_short}>"

    def attach(self, layers: Sequence[int], hook: BlockHook) -> AbstractContextManager[None]:
        """Hooks at the output of the named blocks while the context is open."""
        return hooking_blocks(self.blocks, layers, hook)

    @property
    def device(self) -> torch.device | None:
        """Where token ids go and noise is drawn; None leaves it to the model."""
        return running_device(self.module)

    @cached_property
    def sink_limits(self) -> tuple[float, ...]:
        """See `persona_lens.backend.sinks.sink_limits`; measured by one small pass."""
        return limits_from(self.forward(probe(self.module.config), (), NORMS).reads["norms"])

    def known_limits(self) -> tuple[float, ...] | None:
        """`sink_limits`, where interventions may have them measured."""
        return self.sink_limits

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, edits: Edits = (), reads: Sequence[Read] = ()
    ) -> Generation:
        """See `persona_lens.backend.protocol.Backend.generate`."""
        return self._generate(prompts, sampling, as_edits(edits), reads, None)

    def generate_watched(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Watch,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.streaming.WatchableBackend.generate_watched`."""
        check_reads([watch.read], self.info.n_layers, self.info.d_model)
        watch.refuse_top()
        watcher = Watcher(watch, prompts, self.info.n_layers)
        found = self._generate(prompts, sampling, as_edits(edits), reads, watcher)
        return Generation(*watcher.listener.cut(found.responses, found.ended), found.reads)

    def forward(
        self, tokens: TokenBatch, edits: Edits = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        """See `persona_lens.backend.protocol.Backend.forward`."""
        edits = as_edits(edits)
        check_request(self.info, vocabulary_size(self.module), tokens, edits, reads)
        if not reads and not logprobs:
            return ForwardResult()
        check_fits(self.context_length, tokens.lengths)
        return self._forward(tokens, edits, reads, logprobs)

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """See `persona_lens.backend.protocol.Backend.editing`."""
        return editing_blocks(self.attach, edits, self)

    def padded_prompts(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, edits: Sequence[Edit], reads: Sequence[Read]
    ) -> PaddedTokens:
        """The prompts of a generation as the model takes them; raises unless all that is asked for fits."""
        checked = self.checked_prompts(prompts, sampling, edits, reads)
        return pad_left(checked, self.pad_id, self.device or "cpu", parts_for(self.tokenizer, edits, reads))

    def checked_prompts(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, edits: Sequence[Edit], reads: Sequence[Read]
    ) -> TokenBatch:
        """The same as they are."""
        tokens = TokenBatch.of(prompts)
        check_request(self.info, vocabulary_size(self.module), tokens, edits, reads)
        sampling.check_rows(len(prompts))
        check_fits(self.context_length, tokens.lengths, sampling.max_new_tokens)
        return tokens

    def intervention(
        self, tokens: PaddedTokens, edits: Sequence[Edit], reads: Sequence[Read], **run: Any
    ) -> Intervention:
        """What carries out edits and reads over a batch; ``run`` as `Intervention` takes it."""
        limits = self.known_limits() if depend_on_sinks(edits, reads) else None
        known: dict[str, Any] = {"n_layers": self.info.n_layers, "end_ids": self.end_ids, "sink_limits": limits}
        return Intervention(tokens, edits, reads, **known, **run)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        watcher: Watcher | None,
    ) -> Generation:
        tokens = self.padded_prompts(prompts, sampling, edits, reads)
        intervention = self.intervention(tokens, edits, reads, max_new_tokens=sampling.max_new_tokens, watcher=watcher)
        sampler = RowSampler(sampling, self.device, budgets_for(self.tokenizer, prompts, sampling))
        processors = LogitsProcessorList([lambda ids, scores: sampler(scores, ids[:, -1])] if sampler.acts else [])
        config = generation_config(sampling, reads, self.end_ids, self.pad_id, watched=watcher is not None)
        with self._running(intervention):
            ids = self.module.generate(
                input_ids=tokens.ids,
                attention_mask=tokens.attention.long(),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=stopping_criteria(watcher),
            )
        generated = ids[:, tokens.ids.shape[1] :]
        responses, ended = cut_responses(generated, self.end_ids, sampling.max_new_tokens)
        return Generation(responses, ended, results_of(intervention))

    def _forward(
        self, batch: TokenBatch, edits: Sequence[Edit], reads: Sequence[Read], logprobs: bool
    ) -> ForwardResult:
        if self.shares_prompts and can_run_prompts_once(batch, edits, reads):
            return self._forward_sharing(batch, reads, logprobs)
        tokens = pad_left(batch, self.pad_id, self.device or "cpu", parts_for(self.tokenizer, edits, reads))
        stop_at = None if logprobs else deepest_layer(reads, self.info.n_layers)
        intervention = self.intervention(tokens, edits, reads, until=stop_at)
        output = self._run(intervention, stop_at, forward_inputs(self.module, tokens))
        values = response_logprobs(output.logits, tokens.ids, tokens.response) if logprobs else None
        return ForwardResult(results_of(intervention), values)

    def _forward_sharing(self, batch: TokenBatch, reads: Sequence[Read], logprobs: bool) -> ForwardResult:
        """`forward` without edits: reads of prompts while the different prompts run, of responses after them."""
        device = running_device(self.module)
        of_response = [read for read in reads if read.kind in OF_RESPONSES]
        of_prompt = [read for read in reads if read.kind not in OF_RESPONSES]
        stop_at = None if logprobs else deepest_layer(reads, self.info.n_layers)
        shared = SharedPrompts(self.module, batch, self.pad_id, split=not of_prompt)
        if (beginning := shared.beginning_inputs()) is not None:
            self._run(self.intervention(shared.tokens, (), ()), stop_at, beginning)
        intervention = self.intervention(shared.tokens, (), of_prompt)
        begun = self._run(intervention, stop_at, shared.prompt_inputs())
        found = {name: value[shared.prompt_of] for name, value in results_of(intervention).items()}
        chosen: list[Tensor] = []
        rows: list[int] = []  # that they are of
        for read in of_response:
            layers = len(read.resolved_layers(self.info.n_layers))
            width = () if read.kind is ReadKind.RESPONSE_NORM else (self.info.d_model,)
            found[read.kind.value] = torch.full((len(batch), layers, *width), torch.nan)
        parts = parts_for(self.tokenizer, reads=of_response)
        pending = shared.continuations(batch, whole=bool(of_response)) if of_response or logprobs else []
        most = rows_at_once(device.type, max(map(len, batch.prompts)))
        lengths = [len(each.tokens) for each in pending]
        for numbers in batches_of_passes(lengths, most, device.type):
            together = [pending[number] for number in numbers]
            output = None
            if together[-1].tokens:  # the longest
                before = [batch.prompts[each.rows[0]] for each in together]
                tokens = pad_right([each.tokens for each in together], self.pad_id, device, parts, before)
                intervention = self.intervention(tokens, (), of_response)
                output = self._run(intervention, stop_at, shared.response_inputs(together, tokens))
                for name, value in results_of(intervention).items():
                    found[name][[each.rows[0] for each in together]] = value
            if logprobs:
                last = [begun.logits[each.prompt, -1:] for each in together]
                after = last if output is None else output.logits
                pairs = [(place, row) for place, each in enumerate(together) for row in each.rows]
                chosen.append(continued_logprobs([(last[n], after[n], batch.responses[row]) for n, row in pairs]))
                rows += [row for _, row in pairs]
        values = dict(zip(rows, brought(chosen, [len(batch.responses[row]) for row in rows]), strict=True))
        told = tuple(values.get(row, torch.empty(0)) for row in range(len(batch)))
        return ForwardResult(found, told if logprobs else None)

    def _run(self, intervention: Intervention, stop_at: int | None, inputs: dict[str, Any]) -> Any:
        """The model's output, or None if the pass was stopped after a layer."""
        try:
            with self._running(intervention, stop_at), attention_for_reading(self.module):
                return self.module(**inputs)
        except _DeepestLayerReached:
            return None

    @contextmanager
    def running(self, layers: Iterable[int], at_block: BlockHook) -> Iterator[None]:
        """While open the module may run, alone, hooked at these layers and as it is for inference."""
        with self._lock, torch.inference_mode(), evaluating(self.module), self.attach(sorted(layers), at_block):
            yield

    @contextmanager
    def _running(self, intervention: Intervention, stop_at: int | None = None) -> Iterator[None]:
        def at_block(layer: int, h: Tensor, _: Mapping[str, Any]) -> Tensor:
            h = intervention.block(layer, h)
            if layer == stop_at:
                raise _DeepestLayerReached
            return h

        def before_pass(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            intervention.begin_pass(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

        layers = {*intervention.layers, *(() if stop_at is None else (stop_at,))}
        with self.running(layers, at_block):
            handle = self.module.register_forward_pre_hook(before_pass, with_kwargs=True)
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


class _DeepestLayerReached(Exception):  # noqa: N818 - nothing went wrong
    """Ends a forward pass once nothing further is needed."""


def stopping_criteria(watcher: Watcher | None) -> StoppingCriteriaList:
    """What ends rows of a generation beside its configuration: the callback of a watch.

    It is called after each step: by then the loop has to wait for the device in any case.
    """
    return StoppingCriteriaList([] if watcher is None else [lambda ids, *_, **__: watcher.deliver().to(ids.device)])


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

    One step more is run where a read or a watch needs the response.
    """
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens + (watched or need_last_token(reads)),
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

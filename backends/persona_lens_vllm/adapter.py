"""Reads and edits the residual stream in the workers of a vLLM engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

from transformers import GenerationConfig

from persona_lens.backend import (
    BackendError,
    Edit,
    Edits,
    ForwardResult,
    Generation,
    Read,
    Sampling,
    TokenBatch,
    Watch,
    as_edits,
)
from persona_lens.backend.arrivals import replay
from persona_lens.backend.batches import check_fits, check_request
from persona_lens.backend.blocks import recorded_base
from persona_lens.backend.edits import edits_of_rows
from persona_lens.backend.packed.run import PackedBackend, edits_of_text
from persona_lens.backend.parts.asked import budgets_for, limited_for, parts_for
from persona_lens.backend.reads import need_last_token, need_prompts
from persona_lens.backend.sinks import NORMS, depend_on_sinks, limits_from, probe
from persona_lens.backend.streaming import Listener
from persona_lens.backend.tokens import TokenIds
from persona_lens.models import end_of_turn_ids, load_tokenizer, pinned, resolve
from persona_lens_vllm.call import Run, noises_of
from persona_lens_vllm.engine import Engine
from persona_lens_vllm.facts import facts_of
from persona_lens_vllm.opening import folder_of, require_ours, start_engine

_CALLS = 8  # that run together: as many batches as an engine needs to be full while others end


class VllmBackend(PackedBackend):
    """A vLLM engine whose workers read and edit.

    Calls from several threads run together, in whatever batches the engine makes of their rows.

    Attributes:
        engine: The engine.

    Args:
        llm: vLLM's ``LLM``, made with the worker extension and the logits processor of this package.
        tokenizer: The model's own.
        name: What to call the model.
        revision: Commit or content id of its files; None where it is not known.
    """

    calls_at_once = _CALLS

    def __init__(self, llm: Any, tokenizer: Any, name: str, revision: str | None = None) -> None:
        config = llm.llm_engine.vllm_config
        require_ours(config)
        self.engine = Engine(llm)
        self.tokenizer = tokenizer
        self._config = config.model_config.hf_config
        generation: Any = GenerationConfig
        self.end_ids = end_of_turn_ids(tokenizer, generation(**config.model_config.try_get_generation_config()))
        # One token more than is kept is generated where the last one is read.
        self.context_length = int(config.model_config.max_model_len) - 1
        self.shares_prompts = bool(config.cache_config.enable_prefix_caching)
        self._vocabulary = int(config.model_config.get_vocab_size())
        folder = folder_of(config.model_config)
        self.base_weights = None if folder is None else recorded_base(folder)
        self.info = facts_of(config, name, revision)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.info.in_short}>"

    @classmethod
    def open(
        cls,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        **options: Any,
    ) -> VllmBackend:
        """Start an engine for a model's hub id, folder or embedded name.

        Args:
            model: The model.
            revision: Branch, tag or commit of a hub model.
            dtype: As `persona_lens.models.resolve_dtype` takes it.
            trust_remote_code: Run code that the model's repository brings.
            chat_template: The text of a chat template instead of the tokenizer's.
            options: Of vLLM's ``LLM``.

        Raises:
            BackendError: If the engine does not start.
            ModelError: If there is no such model.
        """
        source = pinned(resolve(model, revision))
        if source.base is not None:
            raise BackendError(
                f"{source.id} is an adapter, and vLLM is given whole models here: merge it into its base (PEFT's "
                "merge_and_unload, then save_pretrained), or use the transformers backend"
            )
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, chat_template=chat_template)
        llm = start_engine(source.location, source.revision, dtype, trust_remote_code, **options)
        return cls(llm, tokenizer, source.id, source.identity)

    @classmethod
    def wrap(cls, llm: Any, tokenizer: Any) -> VllmBackend:
        """Use an ``LLM`` that is already there.

        Raises:
            BackendError: If it was made without what reads and edits, or holds no tokenizer and none is given.
        """
        config = llm.llm_engine.vllm_config.model_config
        if tokenizer is None and not config.skip_tokenizer_init:
            tokenizer = llm.get_tokenizer()
        if tokenizer is None:
            raise BackendError("this LLM holds no tokenizer; pass tokenizer=...")
        return cls(llm, tokenizer, str(config.model).rstrip("/").rpartition("/")[2], config.revision)

    @cached_property
    def sink_limits(self) -> tuple[float, ...]:
        """See `persona_lens.backend.sinks.sink_limits`; measured by one small pass."""
        return limits_from(self.forward(probe(self._config), (), NORMS).reads["norms"])

    def forward(
        self, tokens: TokenBatch, edits: Edits = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        """See `persona_lens.backend.protocol.Backend.forward`."""
        edits = as_edits(edits)
        check_request(self.info, self._vocabulary, tokens, edits, reads)
        if not reads and not logprobs:
            return ForwardResult()
        check_fits(self.context_length, tokens.lengths)
        return self._forward(tokens, edits, reads, logprobs, anew=need_prompts(reads))

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """Not possible: vLLM's modules compute no gradients.

        Raises:
            BackendError: Always.
        """
        raise BackendError(
            "vLLM runs a model of its own, without gradients, that cannot be trained; train through the transformers "
            "backend, and open what comes of it here"
        )

    def _run(self, tokens: TokenBatch, edits: Sequence[Edit], reads: Sequence[Read], **more: Any) -> Run:
        limits = self.sink_limits if depend_on_sinks(edits, reads) else None
        known: dict[str, Any] = {"n_layers": self.info.n_layers, "end_ids": self.end_ids, "sink_limits": limits}
        known["parts"] = parts_for(self.tokenizer, edits, reads)
        return Run(self.engine, tokens, edits, reads, **known, **more)

    def _forward(
        self, tokens: TokenBatch, edits: Sequence[Edit], reads: Sequence[Read], logprobs: bool, *, anew: bool
    ) -> ForwardResult:
        """`forward`, from the first token of each row or from a beginning that is in the cache."""
        run = self._run(tokens, edits, reads, scored=tokens.responses if logprobs else None)
        run.over_text(anew=anew)
        # Such a beginning may reach into a response; what was wanted of it is computed anew.
        again = [] if anew else run.missing()
        run.check(tokens.lengths, partly=again)
        found, scored = run.reads(tokens.lengths), list(run.logprobs() or ())
        for row in again:
            some = edits_of_rows(edits, row, row + 1, tokens.lengths)
            alone = self._forward(tokens.rows(row, row + 1), some, reads, logprobs, anew=True)
            for name, value in alone.reads.items():
                found[name][row] = value[0]
            scored[row : row + 1] = alone.logprobs or ()
        return ForwardResult(found, tuple(scored) if logprobs else None)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        watch: Watch | None,
    ) -> Generation:
        tokens = TokenBatch.of(prompts)
        check_request(self.info, self._vocabulary, tokens, edits, reads)
        sampling.check_rows(len(tokens))
        check_fits(self.context_length, tokens.lengths, sampling.max_new_tokens)
        if not sampling.use_cache:
            if watch is not None:
                watch.refuse_top()
            made = self._uncached(tokens, sampling, edits, reads if watch is None else ())
            return made if watch is None else self._replayed(tokens, made, edits, reads, watch)
        more = watch is not None or need_last_token(reads)
        limited = limited_for(self.tokenizer, sampling.thinking_budget)
        run = self._run(tokens, edits, reads, room=sampling.max_new_tokens, watch=watch, limited=limited)
        with run.open() as job:
            job.add(
                tokens.prompts,
                run.salts,
                noises_of(sampling, len(tokens)),
                streamed=watch is not None,
                max_tokens=sampling.max_new_tokens + more,
                stop_token_ids=list(self.end_ids),
                logprobs=run.top,
                prompt_logprobs=run.top if run.top_of_prompts else None,
                skip_reading_prefix_cache=watch is not None or need_prompts(reads),
            )
            job.run(None if watch is None else run.tell)
        return run.generation(more=more, forward=self.forward)

    def _uncached(
        self, tokens: TokenBatch, sampling: Sampling, edits: Sequence[Edit], reads: Sequence[Read]
    ) -> Generation:
        """Token by token, each from the whole text before it: what `Sampling.use_cache` is there to check."""
        responses: list[TokenIds] = [()] * len(tokens)
        ended = [False] * len(tokens)
        budgets = budgets_for(self.tokenizer, tokens.prompts, sampling)
        for step in range(sampling.max_new_tokens):
            rows = [row for row, over in enumerate(ended) if not over]
            if not rows:
                break
            text = TokenBatch.of(tokens.prompts, responses)
            run = self._run(text, edits_of_text(edits, text), ())
            job = run.over_text(anew=True, noises=noises_of(sampling, len(tokens), before=step))
            for row in rows:
                (token,) = job.tokens[row]
                if budgets:
                    forced = budgets[row].forced
                    token = token if forced is None else forced
                    budgets[row].take(token)
                ended[row] = token in self.end_ids
                if not ended[row]:
                    responses[row] = (*responses[row], token)
        text = TokenBatch.of(tokens.prompts, responses)
        found = self.forward(text, edits_of_text(edits, text), reads)
        return Generation(tuple(responses), tuple(ended), found.reads)

    def _replayed(
        self, tokens: TokenBatch, made: Generation, edits: Sequence[Edit], reads: Sequence[Read], watch: Watch
    ) -> Generation:
        """A generation told of once it is over."""
        listener, text = Listener(watch, tokens.prompts), TokenBatch.of(tokens.prompts, made.responses)
        found = self.forward(text, edits_of_text(edits, text), [watch.read]).reads[watch.read.kind]
        replay(listener, text, found)
        responses, ended = listener.cut(made.responses, made.ended)
        text = TokenBatch.of(tokens.prompts, responses)
        return Generation(responses, ended, self.forward(text, edits_of_text(edits, text), reads).reads)

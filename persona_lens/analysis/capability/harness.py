"""Any backend as a model of EleutherAI's lm-evaluation-harness, so that all its tasks run on it.

Text becomes token ids as in the harness's own model for Hugging Face, so that the numbers are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from logging import LogRecord
from typing import Any
from unittest.mock import patch

import jinja2
from lm_eval import evaluator
from lm_eval.api import task
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.capability.scoring import Continuation, EditedModel, Wanted
from persona_lens.backend import Backend, Edits, Positions, as_edits
from persona_lens.backend.batches import context_length
from persona_lens.backend.tokens import TokenIds
from persona_lens.core.progress import Progress, no_progress
from persona_lens.runs.rollouts import row_seed

DEFAULT_CONTEXT = 2048  # tokens, where nothing says how many the model takes; the harness assumes the same
DEFAULT_NEW_TOKENS = 256  # of a task that names no limit; the harness's own

# Settings of generation that leave it as it is at these values, and are refused at others.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_p": (0, None),
    "top_k": (0, None),
    "use_cache": (True,),
}
ONLY_SAMPLING = ("top_p", "top_k", "min_p")  # say nothing where decoding is greedy


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Without what the harness says beside us: its bar, git where there is no repository, a note on tasks in files."""
    logger, silent = task.eval_logger, patch.object(task, "tqdm", partial(task.tqdm, disable=True))
    logger.addFilter(_worth_saying)
    try:
        with silent, patch.object(evaluator, "get_git_commit_hash", lambda: None):
            yield
    finally:
        logger.removeFilter(_worth_saying)


def _worth_saying(record: LogRecord) -> bool:
    return "Custom kwargs can be passed" not in record.getMessage()


class BackendLM(TemplateLM):  # type: ignore[misc]  # the harness carries no types
    """A backend behind the model interface of the harness (`lm_eval.api.model.LM`).

    Contexts that are too long lose their beginning. The backend also runs the last token of a text, which the harness's
    own model leaves out; so the longest input is one token shorter here.

    Args:
        backend: The model.
        edits: Go to every call.
        batch_size: Rows that run at once at most; fewer where memory runs out.
        max_length: Tokens of a context and what follows it at most; by default what the model takes.
        add_bos_token: Whether contexts begin with the tokenizer's first token; None leaves that to the tokenizer.
        seed: Base of the seeds of sampled rows.
        progress: Told what is done.

    Raises:
        AnalysisError: If an edit is made for one batch, or a number is out of range.
    """

    backend = "causal"  # the harness's word for a decoder-only model

    def __init__(
        self,
        backend: Backend,
        *,
        edits: Edits = (),
        batch_size: int = 64,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise AnalysisError(f"the batch size must be at least 1, got {batch_size}")
        self.edits = as_edits(edits)
        for edit in self.edits:
            if not isinstance(edit.positions, Positions) or not isinstance(edit.coefficient, int | float | None):
                raise AnalysisError("an edit with a value for each row fits one batch only; give one for all rows")
        self.model = EditedModel(backend, self.edits, batch_size, progress)
        self.info = backend.info
        self.tokenizer = backend.tokenizer
        self.total_length = max_length or context_length(backend) or DEFAULT_CONTEXT
        self.add_bos_token = add_bos_token
        self.seed = seed
        self.progress = progress
        if self.total_length < 2:
            raise AnalysisError(f"max_length must be at least 2, got {max_length}")

    @property
    def max_length(self) -> int:
        """Tokens of an input at most; the token that follows it is not one of them."""
        return self.total_length - 1

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        if self.tokenizer.eos_token_id is not None:
            return int(self.tokenizer.eos_token_id)
        if self.model.backend.end_ids:
            return self.model.backend.end_ids[0]
        raise AnalysisError(f"the tokenizer of {self.info.model} knows no token that ends a text")

    @property
    def prefix_token_id(self) -> int:
        """The id that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer in its caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness puts down about the model."""
        return {"model_info": asdict(self.info), "edits": [edit.content_hash for edit in self.edits]}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, without its system message where the template refuses one.

        Raises:
            AnalysisError: If the model has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise AnalysisError(f"{self.info.model} has no chat template; measure it without apply_chat_template")
        render: Any = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return str(render(chat_history))
        except jinja2.TemplateError:
            return str(render([message for message in chat_history if message["role"] != "system"]))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids of a text; no second first token where the text brings one, as chat templates do."""
        chosen = add_special_tokens if add_special_tokens is not None else self.add_bos_token
        if add_special_tokens is None and string.startswith(str(self.tokenizer.decode([self.prefix_token_id]))):
            chosen = False
        options: dict[str, Any] = {} if chosen is None else {"add_special_tokens": chosen}
        encode: Any = self.tokenizer.encode
        return list(encode(string, **options))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation, and whether greedy decoding writes exactly that."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **others: object
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, tokens) for _, context, tokens in requests]
        found = self.model.logprobs(rows)
        flags = self.model.greedy_flags(rows, found)
        answers = [(sum(values), flag) for values, flag in zip(found, flags, strict=True)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _row(self, context: Sequence[int], tokens: Sequence[int]) -> Continuation:
        if not tokens:
            raise AnalysisError(
                "a continuation has no tokens of its own: together with its context it is encoded as the context "
                f"alone, which ends in {self.tokenizer.decode(list(context[-20:]))!r}"
            )
        if len(tokens) >= self.total_length:
            raise AnalysisError(
                f"a continuation of {len(tokens):,} tokens does not fit the model's {self.total_length:,} with a "
                f"token before it; it begins {self.tokenizer.decode(list(tokens[:20]))!r}"
            )
        return Continuation(tuple(context[-(self.total_length - len(tokens)) :]), tuple(tokens))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text, in windows that each predict what the one before left."""
        windows = [list(self._windows(*request.args)) for request in requests]
        rows = [row for each in windows for row in each]
        found = iter(self.model.logprobs(rows))
        totals = [float(sum(sum(next(found)) for _ in each)) for each in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Iterator[Continuation]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        for context, tokens in map(make_disjoint_window, windows):
            yield self._row(context, tokens)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string, the end of its turn, or the length limit.

        A backend knows no stop strings: it generates to the end of the turn, and the text is cut afterwards.

        Raises:
            AnalysisError: If a task asks for a kind of generation that backends do not have.
        """
        asked = [(str(context), dict(options)) for context, options in (request.args for request in requests)]
        settings = [self._settings(options) for _, options in asked]
        before: Counter[str] = Counter()
        rows = []
        for (context, _), (new, temperature, top_p, _) in zip(asked, settings, strict=True):
            seed = row_seed(self.seed, context, before[context])
            rows.append(Wanted(self._prompt(context, new), new, temperature, top_p, seed))
            before[context] += 1
        texts = [""] * len(asked)
        done = 0
        for batch in self.model.generated(rows):
            for index, ids, _ in batch:
                texts[index] = self._text(ids, settings[index][3])
                self.cache_hook.add_partial("generate_until", asked[index], texts[index])
            done += len(batch)
            self.progress(done, len(asked), "generating")
        return texts

    def _settings(self, options: dict[str, Any]) -> tuple[int, float, float, list[str]]:
        """New tokens at most, temperature, nucleus and stop strings."""
        given = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
        new, until = int(given.pop("max_gen_toks")), list(given.pop("until"))
        sampled = bool(given.pop("do_sample"))
        temperature, top_p = float(given.pop("temperature", 0) or 0), float(given.pop("top_p", None) or 1)
        if sampled and temperature <= 0:
            raise AnalysisError(f"sampling (do_sample) needs a temperature above 0; the task has {options!r}")
        for name, value in given.items():
            if value in NEUTRAL.get(name, ()) or (name in ONLY_SAMPLING and not sampled):
                continue
            raise AnalysisError(
                f"backends do not generate with {name}={value!r}, which the task asks for; they take until, "
                "max_gen_toks, do_sample, temperature and top_p"
            )
        return new, temperature if sampled else 0.0, top_p if sampled else 1.0, until

    def _prompt(self, context: str, new: int) -> TokenIds:
        room = self.total_length - new
        if room < 1:
            raise AnalysisError(f"{new:,} new tokens leave no room for a context in the model's {self.total_length:,}")
        return tuple((self.tok_encode(context) or [self.prefix_token_id])[-room:])

    def _text(self, ids: TokenIds, until: Sequence[str]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        end = self.tokenizer.decode([self.eot_token_id])
        return str(postprocess_generated_text(str(text), [*until, str(end)], None))

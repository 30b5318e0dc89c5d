"""A judge that is a chat model run through a backend: the expectation over the digits of its number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from persona_lens.backend import Backend, TokenBatch
from persona_lens.backend.batches import context_length, forward_rows
from persona_lens.core.progress import Progress, no_progress
from persona_lens.judging.llm import COHERENCE, fill_rubric
from persona_lens.judging.protocol import EMPTY, Exchange, Judgement, NumberTokens, Score, expected_number
from persona_lens.runs.cost import Work, reading_work
from persona_lens.traits import Trait

if TYPE_CHECKING:
    from persona_lens.models import ChatFormat

TOGETHER = 16  # exchanges; their rubrics begin alike, and that beginning is computed once
MAX_TOKENS = 8192  # of a prompt, where nothing says what the model takes


class LocalJudge:
    """Scores by the probabilities that a model gives to every number from 0 to 100.

    Args:
        backend: The judging model; it runs without edits.
        chat: Its chat format.
        trait: Gives the rubric.
        coherence: Whether to ask for coherence too.
        prefill: Words that the judge's answer begins with, such as ``Score: ``. Small models need them to come to the
            number; but then they cannot refuse.
        max_tokens: A response whose prompt has more tokens gets no score. A model that takes fewer has the last word;
            without a number it is what the model takes, or `MAX_TOKENS` where nothing says how many those are.
    """

    def __init__(
        self,
        backend: Backend,
        chat: ChatFormat,
        trait: Trait,
        *,
        coherence: bool = True,
        prefill: str = "",
        max_tokens: int | None = None,
    ) -> None:
        self.backend = backend
        self.chat = chat
        self.trait = trait
        self.rubrics = (trait.judge_rubric, COHERENCE) if coherence else (trait.judge_rubric,)
        self.prefill = prefill
        added: Any = chat.tokenizer.get_added_vocab()
        self._marks = (*chat.tokenizer.all_special_tokens, *added)
        self._numbers = NumberTokens(chat.encode_answer)
        context = context_length(backend)
        room = None if context is None else context - max(map(len, self._numbers.sequences))
        self.max_tokens = min((limit for limit in (max_tokens, room) if limit is not None), default=MAX_TOKENS)

    @property
    def pieces_at_once(self) -> int:
        """See `persona_lens.judging.Judge.pieces_at_once`."""
        return self.backend.calls_at_once

    def describe(self) -> dict[str, Any]:
        """See `persona_lens.judging.Judge.describe`."""
        return {
            "judge": "local",
            "model": asdict(self.backend.info),
            "chat": self.chat.digest,
            "trait": self.trait.content_hash(),
            "coherence": len(self.rubrics) > 1,
            "prefill": self.prefill,
            "max_tokens": self.max_tokens,
        }

    def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        """See `persona_lens.judging.Judge.pieces`."""
        order = sorted(range(len(exchanges)), key=lambda i: (len(exchanges[i].response), i))
        return [order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)]

    def judge(self, exchanges: Sequence[Exchange], progress: Progress = no_progress) -> list[Judgement]:
        """See `persona_lens.judging.Judge.judge`."""
        scores = [self._scores(rubric, exchanges) for rubric in self.rubrics]
        progress(len(exchanges), len(exchanges), "judging")
        return [Judgement(each[0], each[1] if len(each) > 1 else None) for each in zip(*scores, strict=True)]

    def _scores(self, rubric: str, exchanges: Sequence[Exchange]) -> list[Score]:
        prompts = [self._prompt(rubric, exchange) for exchange in exchanges]
        reasons = [self._reason(exchange, prompt) for exchange, prompt in zip(exchanges, prompts, strict=True)]
        found = iter(self._of_prompts([p for p, reason in zip(prompts, reasons, strict=True) if reason is None]))
        return [next(found) if reason is None else Score(None, reason) for reason in reasons]

    def _reason(self, exchange: Exchange, prompt: tuple[int, ...]) -> str | None:
        """Why there is nothing to ask."""
        if not exchange.response.strip():
            return EMPTY
        if len(prompt) > self.max_tokens:
            return f"the judge's prompt has {len(prompt):,} tokens, more than {self.max_tokens:,}"
        return None

    def work(self, exchanges: Sequence[Exchange]) -> Work:
        """See `persona_lens.judging.PlannedJudge.work`."""
        return reading_work("judging", self.backend, self.passes(exchanges), logprobs=True)

    def passes(self, exchanges: Sequence[Exchange]) -> Iterator[TokenBatch]:
        """What `judge` runs the model over."""
        for piece in self.pieces(exchanges):
            for rubric in self.rubrics:
                asked = [(exchanges[i], self._prompt(rubric, exchanges[i])) for i in piece]
                prompts = [prompt for exchange, prompt in asked if self._reason(exchange, prompt) is None]
                if prompts:
                    yield self._tokens(prompts)

    def _prompt(self, rubric: str, exchange: Exchange) -> tuple[int, ...]:
        begun = self.chat.encode_answer(self.prefill) if self.prefill else []
        return (*self.chat.encode(None, fill_rubric(rubric, exchange, self._marks)), *begun)

    def _tokens(self, prompts: Sequence[tuple[int, ...]]) -> TokenBatch:
        sequences = self._numbers.sequences
        return TokenBatch.of([p for p in prompts for _ in sequences], [ids for _ in prompts for ids in sequences])

    def _of_prompts(self, prompts: Sequence[tuple[int, ...]]) -> list[Score]:
        if not prompts:
            return []
        result = forward_rows(self.backend, self._tokens(prompts), logprobs=True)
        rows = [values.tolist() for values in result.logprobs or ()]
        each = len(self._numbers.sequences)
        return [
            expected_number(self._numbers.distribution(rows[start : start + each]))
            for start in range(0, len(rows), each)
        ]

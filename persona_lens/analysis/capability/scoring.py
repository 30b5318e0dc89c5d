"""`EditedModel`: log-likelihoods of continuations, and responses, in batches under edits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from persona_lens.analysis import AnalysisError
from persona_lens.backend import Backend, Edit, ForwardResult, Generation, Sampling, TokenBatch
from persona_lens.backend.batches import batches_by_length, forward_plan, forward_rows, generate_rows, tokens_at_once
from persona_lens.backend.tokens import TokenIds
from persona_lens.core.progress import Progress, no_progress
from persona_lens.core.threads import in_threads

Found = TypeVar("Found")
MAX_TOKENS = 32768  # of a batch that generates, responses included


@dataclass(frozen=True)
class Wanted:
    """One response to generate.

    Attributes:
        prompt: Token ids.
        max_new_tokens: Length limit.
        temperature: 0 is greedy.
        top_p: Nucleus.
        seed: Of the row.
    """

    prompt: TokenIds
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


# Probabilities this close are not told apart: two batches of one text round differently, in 16 bits most of all.
MARGIN = 0.01

Prefix = tuple[TokenIds, TokenIds]
"""A context and the beginning of a continuation."""


@dataclass(frozen=True)
class Continuation:
    """A text and what may follow it.

    Attributes:
        context: Token ids before, at least one.
        tokens: Token ids of the continuation, at least one.
    """

    context: TokenIds
    tokens: TokenIds


@dataclass(frozen=True)
class EditedModel:
    """A model that scores and generates any number of rows, under the same edits throughout.

    Attributes:
        backend: The model.
        edits: Go to every call.
        max_rows: Rows that run at once at most; fewer where memory runs out.
        progress: Told what is done.
    """

    backend: Backend
    edits: Sequence[Edit] = ()
    max_rows: int = 64
    progress: Progress = no_progress

    def generated(self, asked: Sequence[Wanted]) -> Iterator[list[tuple[int, TokenIds, bool]]]:
        """Generate responses, those that are sampled alike together, in batches of like length.

        Yields:
            Batch by batch: for each row its place in ``asked``, the response's token ids, and whether its turn ended.
        """
        alike: dict[tuple[int, float, float], list[int]] = {}
        for place, each in enumerate(asked):
            alike.setdefault((each.max_new_tokens, each.temperature, each.top_p), []).append(place)
        batches = [
            [group[number] for number in batch]
            for (new, _, _), group in alike.items()
            for batch in batches_by_length([len(asked[i].prompt) + new for i in group], self.max_rows, MAX_TOKENS)
        ]
        for rows, found in self._each(lambda rows: self._responses([asked[row] for row in rows]), batches):
            yield list(zip(rows, found.responses, found.ended, strict=True))

    def _responses(self, asked: Sequence[Wanted]) -> Generation:
        """The responses of one batch, all of whose rows are sampled alike."""
        first = asked[0]
        seeds = tuple(each.seed for each in asked) if first.temperature else None
        sampling = Sampling(first.max_new_tokens, first.temperature, first.top_p, seeds)
        return generate_rows(self.backend, [each.prompt for each in asked], sampling, self.edits)

    def _each(
        self, run: Callable[[list[int]], Found], batches: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], Found]]:
        """Each batch and what was found for it, as many at a time as the backend takes."""
        return in_threads(run, batches, self.backend.calls_at_once, in_order=True)

    def logprobs(self, rows: Sequence[Continuation]) -> list[list[float]]:
        """The log-probability in nats of every token of each continuation."""
        if not rows:
            return []
        tokens = TokenBatch.of([row.context for row in rows], [row.tokens for row in rows])
        found: list[list[float]] = [[] for _ in rows]
        done = 0

        def run(batch: list[int]) -> ForwardResult:
            return forward_rows(self.backend, tokens.chosen(batch), self.edits, logprobs=True)

        for batch, result in self._each(run, forward_plan(self.backend, tokens, self.edits, max_rows=self.max_rows)):
            for index, value in zip(batch, result.logprobs or (), strict=True):
                found[index] = value.tolist()
            done += len(batch)
            self.progress(done, len(rows), "log-likelihoods")
        return found

    def greedy_flags(self, rows: Sequence[Continuation], logprobs: Sequence[Sequence[float]]) -> list[bool]:
        """Whether greedy decoding after each context writes exactly the continuation.

        Args:
            rows: The continuations.
            logprobs: Theirs, from `logprobs`.

        Raises:
            AnalysisError: If a continuation goes on after a token that ends the model's turn, where generation stops,
                and the log-probabilities leave the question open.
        """
        flags = flags_from_logprobs(rows, logprobs)
        # One generation decides all that may follow the same context.
        together: dict[TokenIds, list[int]] = {}
        for index, flag in enumerate(flags):
            if flag is None:
                together.setdefault(rows[index].context, []).append(index)
                self._check_end(rows[index])
        contexts = list(together)
        longest = [max(len(rows[index].tokens) for index in indices) for indices in together.values()]
        lengths = [len(context) + new for context, new in zip(contexts, longest, strict=True)]
        done = 0

        def run(batch: list[int]) -> Generation:
            sampling = Sampling(max(longest[number] for number in batch))
            return generate_rows(self.backend, [contexts[number] for number in batch], sampling, self.edits)

        batches = batches_by_length(lengths, self.max_rows, tokens_at_once(self.backend.info.device))
        for batch, found in self._each(run, batches):
            for number, response, ended in zip(batch, found.responses, found.ended, strict=True):
                for index in together[contexts[number]]:
                    flags[index] = self._is_written(rows[index], response, ended)
            done += len(batch)
            self.progress(done, len(contexts), "greedy continuations")
        return [bool(flag) for flag in flags]

    def _check_end(self, row: Continuation) -> None:
        if set(row.tokens[:-1]) & set(self.backend.end_ids):
            raise AnalysisError(
                "a continuation goes on after an end-of-turn token, so whether it is what the model would write cannot "
                f"be told: {self.backend.tokenizer.decode(list(row.tokens))!r}"
            )

    def _is_written(self, row: Continuation, response: TokenIds, ended: bool) -> bool:
        """Whether the continuation is how the response to its context begins."""
        ends = self.backend.end_ids
        if row.tokens[-1] not in ends:
            return response[: len(row.tokens)] == row.tokens
        if not ended or response != row.tokens[:-1]:
            return False
        # Which of several tokens ended the turn is not told: the likeliest of them.
        likely = self.logprobs([Continuation(row.context, (*response, end)) for end in ends])
        return row.tokens[-1] == max(zip(likely, ends, strict=True), key=lambda each: each[0][-1])[1]


def flags_from_logprobs(rows: Sequence[Continuation], logprobs: Sequence[Sequence[float]]) -> list[bool | None]:
    """What the log-probabilities alone say about `greedy_flags`; None where they leave it open."""
    known: dict[Prefix, dict[int, float]] = {}
    for row, values in zip(rows, logprobs, strict=True):
        for place, (token, value) in enumerate(zip(row.tokens, values, strict=True)):
            known.setdefault((row.context, row.tokens[:place]), {})[token] = math.exp(value)
    return [
        _flag([_is_likeliest(t, known[row.context, row.tokens[:i]]) for i, t in enumerate(row.tokens)]) for row in rows
    ]


def _is_likeliest(token: int, known: dict[int, float]) -> bool | None:
    own, others = known[token], [p for other, p in known.items() if other != token]
    if any(other > own + MARGIN for other in others):
        return False
    unknown = 1 - own - sum(others)  # no token that was not asked for has more
    return True if own > max([unknown, *others]) + MARGIN else None


def _flag(tokens: Sequence[bool | None]) -> bool | None:
    if False in tokens:
        return False
    return None if None in tokens else True

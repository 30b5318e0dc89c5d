"""Log-likelihoods of continuations, and responses, in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from persona_lens.analysis import AnalysisError
from persona_lens.backend import Backend, Edit, Sampling, TokenBatch
from persona_lens.backend.batches import batches_by_length, forward_plan, forward_rows, generate_rows, tokens_at_once
from persona_lens.backend.tokens import TokenIds
from persona_lens.core.progress import Progress, no_progress

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


def generated(
    backend: Backend, asked: Sequence[Wanted], edits: Sequence[Edit] = (), *, max_rows: int = 64
) -> Iterator[list[tuple[int, TokenIds, bool]]]:
    """Generate responses, those that are sampled alike together, in batches of like length.

    Args:
        backend: The model.
        asked: What to generate.
        edits: Applied throughout.
        max_rows: Rows that run at once at most; fewer where memory runs out.

    Yields:
        Batch by batch: for each row its place in ``asked``, the response's token ids, and whether its turn ended.
    """
    alike: dict[tuple[int, float, float], list[int]] = {}
    for place, each in enumerate(asked):
        alike.setdefault((each.max_new_tokens, each.temperature, each.top_p), []).append(place)
    for (new, temperature, top_p), group in alike.items():
        for batch in batches_by_length([len(asked[i].prompt) + new for i in group], max_rows, MAX_TOKENS):
            rows = [group[number] for number in batch]
            seeds = tuple(asked[row].seed for row in rows) if temperature else None
            sampling = Sampling(new, temperature, top_p, seeds)
            found = generate_rows(backend, [asked[row].prompt for row in rows], sampling, edits)
            yield list(zip(rows, found.responses, found.ended, strict=True))


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


def continuation_logprobs(
    backend: Backend,
    rows: Sequence[Continuation],
    edits: Sequence[Edit] = (),
    *,
    max_rows: int = 64,
    progress: Progress = no_progress,
) -> list[list[float]]:
    """The log-probability in nats of every token of each continuation.

    Args:
        backend: The model.
        rows: What to score.
        edits: Applied throughout.
        max_rows: Rows that run at once at most; fewer where memory runs out.
        progress: Told how many rows are done.
    """
    if not rows:
        return []
    tokens = TokenBatch.of([row.context for row in rows], [row.tokens for row in rows])
    found: list[list[float]] = [[] for _ in rows]
    done = 0
    for batch in forward_plan(backend, tokens, edits, max_rows=max_rows):
        values = forward_rows(backend, tokens.chosen(batch), edits, logprobs=True).logprobs or ()
        for index, value in zip(batch, values, strict=True):
            found[index] = value.tolist()
        done += len(batch)
        progress(done, len(rows), "log-likelihoods")
    return found


def greedy_flags(
    backend: Backend,
    rows: Sequence[Continuation],
    logprobs: Sequence[Sequence[float]],
    edits: Sequence[Edit] = (),
    *,
    max_rows: int = 64,
    progress: Progress = no_progress,
) -> list[bool]:
    """Whether greedy decoding after each context writes exactly the continuation.

    Args:
        backend: The model.
        rows: The continuations.
        logprobs: From `continuation_logprobs` for the same rows.
        edits: Those that the log-probabilities were found under.
        max_rows: Rows that run at once at most.
        progress: Told after how many contexts it was generated, of those where that was needed.

    Raises:
        AnalysisError: If a continuation goes on after a token that ends the model's turn, where generation stops,
            and the log-probabilities leave the question open.
    """
    flags = flags_from_logprobs(rows, logprobs)
    pending = [index for index, flag in enumerate(flags) if flag is None]
    for index in pending:
        if set(rows[index].tokens[:-1]) & set(backend.end_ids):
            raise AnalysisError(
                "a continuation goes on after an end-of-turn token, so whether it is what the model would write cannot "
                f"be told: {backend.tokenizer.decode(list(rows[index].tokens))!r}"
            )
    # One generation decides all that may follow the same context.
    together: dict[TokenIds, list[int]] = {}
    for index in pending:
        together.setdefault(rows[index].context, []).append(index)
    contexts = list(together)
    longest = [max(len(rows[index].tokens) for index in together[context]) for context in contexts]
    lengths = [len(context) + new for context, new in zip(contexts, longest, strict=True)]
    done = 0
    for batch in batches_by_length(lengths, max_rows, tokens_at_once(backend.info.device)):
        sampling = Sampling(max(longest[number] for number in batch))
        found = generate_rows(backend, [contexts[number] for number in batch], sampling, edits)
        for number, response, ended in zip(batch, found.responses, found.ended, strict=True):
            for index in together[contexts[number]]:
                flags[index] = _is_written(rows[index], response, ended, backend, edits)
        done += len(batch)
        progress(done, len(contexts), "greedy continuations")
    return [bool(flag) for flag in flags]


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


def _is_written(row: Continuation, response: TokenIds, ended: bool, backend: Backend, edits: Sequence[Edit]) -> bool:
    """Whether the continuation is how the response to its context begins."""
    if row.tokens[-1] not in backend.end_ids:
        return response[: len(row.tokens)] == row.tokens
    # Which of several tokens ended the turn is not told.
    return ended and response == row.tokens[:-1] and _same_end(backend, row, edits)


def _same_end(backend: Backend, row: Continuation, edits: Sequence[Edit]) -> bool:
    """Whether the row's last token is the likeliest of all that end a turn."""
    ends = backend.end_ids
    rows = [Continuation(row.context, (*row.tokens[:-1], end)) for end in ends]
    values = [each[-1] for each in continuation_logprobs(backend, rows, edits)]
    return ends[values.index(max(values))] == row.tokens[-1]

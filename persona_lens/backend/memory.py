"""Batches of a size that fits: rows are cut into batches, and one that runs out of memory is halved and tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from persona_lens.backend.batches import batches_by_prompt, batches_of_passes, can_run_prompts_once
from persona_lens.backend.context import check_fits, context_length
from persona_lens.backend.edits import Edit
from persona_lens.backend.protocol import Backend, ForwardResult, Generation
from persona_lens.backend.reads import Read
from persona_lens.backend.remote import RequestTooLargeError
from persona_lens.backend.tokens import Sampling, TokenBatch, TokenError
from persona_lens.errors import PersonaLensError

Result = TypeVar("Result")


class OutOfMemoryError(PersonaLensError):
    """A single row does not fit into memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on any device, or that a server takes no request of that size."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, RequestTooLargeError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def halving(run: Callable[[int, int], Result], rows: int) -> Iterator[Result]:
    """Run rows ``0`` to ``rows``, in as few pieces as memory allows.

    Args:
        run: Runs the rows from its first argument to its second.
        rows: How many there are.

    Raises:
        OutOfMemoryError: If one row alone does not fit.
    """
    pending = [(0, rows)]
    while pending:
        start, stop = pending.pop()
        try:
            result = run(start, stop)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if stop - start == 1 and isinstance(error, RequestTooLargeError):
                raise
            if stop - start == 1:
                raise OutOfMemoryError(
                    "one row alone runs out of memory; use a shorter text, fewer new tokens, or a smaller dtype"
                ) from error
            middle = (start + stop) // 2
            pending += [(middle, stop), (start, middle)]
        else:
            yield result
            continue
        # Outside the handler: the traceback that kept the failed run's tensors alive is gone by now.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def generate_rows(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    edits: Sequence[Edit] = (),
    reads: Sequence[Read] = (),
) -> Iterator[Generation]:
    """`Backend.generate`, in pieces when the batch does not fit; the pieces come in the order of the rows."""
    lengths = [len(prompt) for prompt in prompts]
    return halving(
        lambda start, stop: backend.generate(
            prompts[start:stop], sampling.rows(start, stop), _edits_of(edits, start, stop, lengths), reads
        ),
        len(prompts),
    )


def forward_rows(
    backend: Backend,
    tokens: TokenBatch,
    edits: Sequence[Edit] = (),
    reads: Sequence[Read] = (),
    *,
    logprobs: bool = False,
) -> Iterator[ForwardResult]:
    """`Backend.forward`, in pieces when the batch does not fit; the pieces come in the order of the rows."""
    return halving(
        lambda start, stop: backend.forward(
            tokens.rows(start, stop), _edits_of(edits, start, stop, tokens.lengths), reads, logprobs=logprobs
        ),
        len(tokens),
    )


def _edits_of(edits: Sequence[Edit], start: int, stop: int, lengths: Sequence[int]) -> list[Edit]:
    return [edit.rows(start, stop, max(lengths[start:stop])) for edit in edits]


def forward_batches(
    backend: Backend,
    tokens: TokenBatch,
    reads: Sequence[Read] = (),
    *,
    logprobs: bool = False,
    max_rows: int = 256,
    max_tokens: int | None = None,
) -> Iterator[tuple[list[int], ForwardResult]]:
    """Read any number of texts, in batches of like length; memory does not grow with their number.

    Args:
        backend: The model.
        tokens: The texts.
        reads: What to bring back.
        logprobs: Whether to bring back log-probabilities of the responses.
        max_rows: Texts whose results come together at most; fewer run at once where they are long.
        max_tokens: Tokens of a batch at most, padding included; by default what the device is fast at.

    Yields:
        The indices of some texts and what was found for them; every text once. Texts of like length come together,
        or, where many texts begin with the same prompts and the backend computes such a prompt once, those of a prompt.

    Raises:
        ContextError: Before anything runs, if a text does not fit the model.
    """
    check_fits(context_length(backend), tokens.lengths)
    if not reads and not logprobs:
        raise TokenError("nothing is asked for: give reads, or logprobs=True")
    for batch in forward_plan(backend, tokens, (), reads, max_rows=max_rows, max_tokens=max_tokens):
        chosen = TokenBatch(tuple(tokens.prompts[i] for i in batch), tuple(tokens.responses[i] for i in batch))
        start = 0
        for result in forward_rows(backend, chosen, (), reads, logprobs=logprobs):
            rows = _rows_in(result)
            yield batch[start : start + rows], result
            start += rows


def forward_plan(
    backend: Backend,
    tokens: TokenBatch,
    edits: Sequence[Edit] = (),
    reads: Sequence[Read] = (),
    *,
    max_rows: int = 256,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """Which texts run together in a forward pass (arguments as for `forward_batches`, and the edits to run under).

    Returns:
        Indices of each batch's texts; every index once.
    """
    if backend.shares_prompts and can_run_prompts_once(tokens, edits, reads):
        return batches_by_prompt(tokens, max_rows, max_tokens)
    return batches_of_passes(tokens.lengths, max_rows, backend.info.device, max_tokens)


def _rows_in(result: ForwardResult) -> int:
    return len(result.logprobs) if result.logprobs is not None else len(next(iter(result.reads.values())))

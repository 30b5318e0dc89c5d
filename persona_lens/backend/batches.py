"""Which rows run together: alike in length, within memory and the model's context; a batch too large is halved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from persona_lens.backend.edits import Edit, check_edits, edits_of_rows
from persona_lens.backend.parts.asked import check_limited
from persona_lens.backend.protocol import Backend, ForwardResult, Generation, ModelInfo, RequestTooLargeError
from persona_lens.backend.reads import OF_RESPONSES, PER_ROW, Read, check_reads, need_prompts
from persona_lens.backend.tokens import Sampling, TokenBatch, TokenError
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.threads import in_threads

MAX_TOKENS = 16384  # of a batch, where nothing else limits it
SHORTEST_BEGINNING = 32  # tokens that all prompts begin with; less is not worth a pass of its own


def tokens_at_once(device: str) -> int:
    """Tokens that a forward pass should run over at most, padding included: CPUs get slower beyond some 2,000."""
    return 2048 if device.startswith("cpu") else MAX_TOKENS


def tokens_of_pass(device: str) -> int:
    """How many tokens take as long as what a forward pass takes beside its tokens: loading weights, starting kernels.

    Measured on two cores; that of other devices is an estimate from the time that they take for one token.
    """
    return 64 if device.startswith("cpu") else 512


def rows_at_once(device: str, prompt_tokens: int) -> int:
    """Rows that should follow a prompt computed once in one pass: each takes a copy of the prompt's keys and values."""
    return max(1, (MAX_TOKENS if device.startswith("cpu") else 4 * MAX_TOKENS) // max(1, prompt_tokens))


def batches_by_length(lengths: Sequence[int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """Cut rows into few batches of like length, for generating.

    Args:
        lengths: Tokens of each row.
        max_rows: Rows of a batch at most.
        max_tokens: Tokens of a batch at most, padding included; a longer row gets a batch of its own.

    Returns:
        Row indices of each batch, shortest rows first; every index once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        open_batch = batches[-1] if batches else []
        if open_batch and len(open_batch) < max_rows and lengths[index] * (len(open_batch) + 1) <= max_tokens:
            open_batch.append(index)
        else:
            batches.append([index])
    return batches


def batches_of_passes(
    lengths: Sequence[int], max_rows: int, device: str, max_tokens: int | None = None
) -> list[list[int]]:
    """Cut rows into batches of like length that forward passes over them take the least time for.

    Args:
        lengths: Tokens of each row.
        max_rows: Rows of a batch at most.
        device: Where the model runs.
        max_tokens: Tokens of a batch at most, padding included; a longer row gets a batch of its own. By default what
            the device is fast at.

    Returns:
        Row indices of each batch, shortest rows first; every index once.
    """
    max_tokens, each_pass = max_tokens or tokens_at_once(device), tokens_of_pass(device)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    least, last_batch = [0], [0]  # for the first n rows: tokens to compute, and how many rows the last batch has
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        most = max(1, min(stop, max_rows, max_tokens // max(1, longest)))
        tokens, rows = min((least[stop - rows] + rows * longest + each_pass, rows) for rows in range(1, most + 1))
        least.append(tokens)
        last_batch.append(rows)
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[stop - last_batch[stop] : stop])
        stop -= last_batch[stop]
    return batches[::-1]


def can_run_prompts_once(tokens: TokenBatch, edits: Sequence[Edit], reads: Sequence[Read]) -> bool:
    """Whether a backend that shares prompts computes those of these rows only once: they repeat enough for it to pay.

    Edits keep it from that, and reads of every token.
    """
    return not edits and all(read.kind in PER_ROW for read in reads) and 2 * len(set(tokens.prompts)) <= len(tokens)


def common_beginning(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all prompts begin with, if a pass of its own pays; a token of each prompt is always left."""
    if len(prompts) < 2:
        return ()
    first, last = min(prompts), max(prompts)  # what these two share, all between them share
    shortest = min(map(len, prompts)) - 1
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), shortest)
    common = min(common, shortest)
    return first[:common] if common >= SHORTEST_BEGINNING else ()


def tokens_to_run(
    backend: Backend,
    tokens: TokenBatch,
    edits: Sequence[Edit] = (),
    reads: Sequence[Read] = (),
    *,
    logprobs: bool = False,
) -> int:
    """Tokens that `Backend.forward` runs over, padding left out; what it computes once for several rows counts once."""
    if not (backend.shares_prompts and can_run_prompts_once(tokens, edits, reads)):
        return sum(tokens.lengths)
    prompts = set(tokens.prompts)
    beginning = 0 if need_prompts(reads) else len(common_beginning(list(prompts)))
    rest = max(map(len, prompts)) - beginning
    found = beginning + sum(min(len(prompt), rest) for prompt in prompts)
    if any(read.kind in OF_RESPONSES for read in reads):
        return found + sum(map(len, tokens.responses))
    # For log-probabilities the last token of a response need not run, and those that differ in no other run once.
    pairs = {(prompt, said[:-1]) for prompt, said in zip(tokens.prompts, tokens.responses, strict=True)}
    return found + (sum(len(begun) for _, begun in pairs) if logprobs else 0)


def batches_by_prompt(tokens: TokenBatch, max_rows: int, max_tokens: int | None = None) -> list[list[int]]:
    """Cut rows into batches that hold few different prompts.

    Args:
        tokens: The rows.
        max_rows: Rows of a batch at most.
        max_tokens: Tokens of a batch at most, its different prompts and its responses each padded to the longest; a
            longer row gets a batch of its own. By default only the prompts are bounded, whose keys and values stay in
            memory all the while: a backend that shares prompts cuts the responses by itself.

    Returns:
        Row indices of each batch, shortest prompts first; every index once.
    """
    prompts, responses = tokens.prompts, tokens.responses
    order = sorted(range(len(tokens)), key=lambda i: (len(prompts[i]), prompts[i], len(responses[i]), i))
    batches: list[list[int]] = []
    different: set[tuple[int, ...]] = set()
    longest = 0
    for index in order:
        together, longest_together = different | {prompts[index]}, max(longest, len(responses[index]))
        rows = len(batches[-1]) + 1 if batches else 1
        # Prompts come in order of length, so that this row's is the longest.
        needed = len(together) * len(prompts[index]) + (rows * longest_together if max_tokens else 0)
        if batches and rows <= max_rows and needed <= (max_tokens or MAX_TOKENS):
            batches[-1].append(index)
            different, longest = together, longest_together
        else:
            batches.append([index])
            different, longest = {prompts[index]}, len(responses[index])
    return batches


Result = TypeVar("Result")


class OutOfMemoryError(PersonaLensError):
    """A single row does not fit into memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on any device, or that a server takes no request of that size."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, RequestTooLargeError)):
        return True
    text = str(error).lower()
    said = (
        "out of memory",
        "can't allocate memory",
        "cublas_status_alloc_failed",
    )  # cuBLAS has a name of its own for it
    return isinstance(error, RuntimeError) and any(each in text for each in said)


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
) -> Generation:
    """`Backend.generate`, in pieces when the batch does not fit.

    Raises:
        TokenError: If thinking is to be limited, and the model never thinks, or its backend does not see to it.
    """
    lengths = [len(prompt) for prompt in prompts]

    def run(start: int, stop: int) -> Generation:
        some = edits_of_rows(edits, start, stop, lengths)
        return backend.generate(prompts[start:stop], sampling.rows(start, stop), some, reads)

    found = Generation.joined(halving(run, len(prompts)))
    check_limited(backend.tokenizer, prompts, sampling, found.responses)
    return found


def forward_rows(
    backend: Backend,
    tokens: TokenBatch,
    edits: Sequence[Edit] = (),
    reads: Sequence[Read] = (),
    *,
    logprobs: bool = False,
) -> ForwardResult:
    """`Backend.forward`, in pieces when the batch does not fit."""

    def run(start: int, stop: int) -> ForwardResult:
        some = edits_of_rows(edits, start, stop, tokens.lengths)
        return backend.forward(tokens.rows(start, stop), some, reads, logprobs=logprobs)

    return ForwardResult.joined(halving(run, len(tokens)))


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

    As many batches run at once as the backend takes.

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
    plan = forward_plan(backend, tokens, (), reads, max_rows=max_rows, max_tokens=max_tokens)

    def run(batch: list[int]) -> ForwardResult:
        return forward_rows(backend, tokens.chosen(batch), (), reads, logprobs=logprobs)

    yield from in_threads(run, plan, backend.calls_at_once, in_order=True)


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


UNLIMITED = 10**9  # tokenizers that know no limit name a number beyond this


class ContextError(PersonaLensError):
    """A text that is longer than the model takes."""


def context_length(backend: Backend) -> int | None:
    """Tokens of a prompt and its response together at most; None where nothing says so, or there is no limit.

    Backends may say it in an attribute of this name, as those of this package do; of others the tokenizer is asked.
    """
    limit = getattr(backend.tokenizer, "model_max_length", None)
    found: int | None = getattr(
        backend, "context_length", int(limit) if limit is not None and limit < UNLIMITED else None
    )
    return found


def check_request(
    info: ModelInfo, vocabulary: int, tokens: TokenBatch, edits: Sequence[Edit], reads: Sequence[Read]
) -> None:
    """Raise unless edits, reads and tokens fit a model that knows so many token ids, and the edits the batch."""
    check_edits(edits, info.n_layers, info.d_model, len(tokens), max(tokens.lengths))
    check_reads(reads, info.n_layers, info.d_model)
    tokens.check_vocabulary(vocabulary)


def check_fits(limit: int | None, lengths: Iterable[int], new: int = 0) -> None:
    """Raise unless every text fits: beyond a model's context it fails, or runs and writes nonsense.

    Args:
        limit: Tokens that the model takes, as `context_length` tells them; None for any number.
        lengths: Tokens of each text.
        new: Tokens that are to be generated behind each.

    Raises:
        ContextError: Naming the longest text and the limit.
    """
    longest = max(lengths, default=0)
    if limit is None or longest + new <= limit:
        return
    if new:
        raise ContextError(
            f"the longest prompt has {longest:,} tokens and {new:,} new ones are asked for, but the model takes "
            f"{limit:,} together; ask for fewer new tokens, or shorten the prompt"
        )
    raise ContextError(f"the longest text has {longest:,} tokens, but the model takes {limit:,}; shorten it")

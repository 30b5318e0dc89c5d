"""Which rows run together: batches of rows that are alike in length, or that begin with the same prompts.

A generation runs the model once a token whatever the number of its rows, so it takes as many as there is room for. A
pass over existing text takes as long as its tokens, padding included, so there less padding is worth more passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from persona_lens.backend.edits import Edit
from persona_lens.backend.reads import Read, only_means
from persona_lens.backend.tokens import TokenBatch

MAX_TOKENS = 16384  # of a batch, where nothing else limits it


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


def repeats_prompts(tokens: TokenBatch) -> bool:
    """Whether the rows repeat their prompts enough for computing each only once to pay."""
    return 2 * len(set(tokens.prompts)) <= len(tokens)


def can_run_prompts_once(tokens: TokenBatch, edits: Sequence[Edit], reads: Sequence[Read]) -> bool:
    """Whether a backend that shares prompts computes those of these rows only once."""
    return not edits and only_means(reads) and repeats_prompts(tokens)


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

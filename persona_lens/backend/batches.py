"""Which rows run together: batches of rows that are alike in length, or that begin with the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

from persona_lens.backend.tokens import TokenBatch

MAX_TOKENS = 16384  # of a batch, where nothing else limits it


def tokens_at_once(device: str) -> int:
    """Tokens that a forward pass should run over at most, padding included: CPUs get slower beyond some 2,000."""
    return 2048 if device.startswith("cpu") else MAX_TOKENS


def rows_at_once(device: str, prompt_tokens: int) -> int:
    """Rows that should follow a prompt computed once in one pass: each takes a copy of the prompt's keys and values."""
    return max(1, (MAX_TOKENS if device.startswith("cpu") else 4 * MAX_TOKENS) // max(1, prompt_tokens))


def batches_by_length(lengths: Sequence[int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """Cut rows into batches of like length, so that little of a batch is padding.

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


def repeats_prompts(tokens: TokenBatch) -> bool:
    """Whether the rows repeat their prompts enough for computing each only once to pay."""
    return 2 * len(set(tokens.prompts)) <= len(tokens)


def batches_by_prompt(tokens: TokenBatch, max_rows: int, max_tokens: int) -> list[list[int]]:
    """Cut rows into batches that hold few different prompts.

    Args:
        tokens: The rows.
        max_rows: Rows of a batch at most.
        max_tokens: Tokens of a batch at most, its different prompts and its responses each padded to the longest; a
            longer row gets a batch of its own.

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
        needed = len(together) * len(prompts[index]) + rows * longest_together
        if batches and rows <= max_rows and needed <= max_tokens:
            batches[-1].append(index)
            different, longest = together, longest_together
        else:
            batches.append([index])
            different, longest = {prompts[index]}, len(responses[index])
    return batches

"""Cutting rows into batches: every row once, within the limits, and alike."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.backend import TokenBatch
from persona_lens.backend.batches import (
    batches_by_length,
    batches_by_prompt,
    batches_of_passes,
    can_run_prompts_once,
    tokens_at_once,
    tokens_of_pass,
)

ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=3), st.integers(0, 40)), min_size=1, max_size=60
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 16), st.integers(1, 2000))
def test_batches_by_length_hold_every_row_once_within_the_limits(
    lengths: list[int], max_rows: int, max_tokens: int
) -> None:
    batches = batches_by_length(lengths, max_rows, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 0 < len(batch) <= max_rows
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= max_tokens
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(lengths)
    assert batches == batches_by_length(lengths, max_rows, max_tokens)


def cost(batches: list[list[int]], lengths: list[int], device: str) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) + tokens_of_pass(device) for batch in batches)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 900), max_size=8), st.integers(1, 8), st.sampled_from(["cpu", "cuda:0"]))
def test_no_other_batches_of_passes_take_less(lengths: list[int], max_rows: int, device: str) -> None:
    batches = batches_of_passes(lengths, max_rows, device)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    ordered = sorted(lengths)
    assert [lengths[i] for batch in batches for i in batch] == ordered

    def fits(batch: list[int]) -> bool:
        return len(batch) <= max_rows and len(batch) * lengths[batch[-1]] <= tokens_at_once(device)

    assert all(fits(batch) or len(batch) == 1 for batch in batches)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for cuts in range(2 ** max(0, len(lengths) - 1)):
        other, start = list[list[int]](), 0
        for stop in range(1, len(order) + 1):
            if stop == len(order) or cuts >> (stop - 1) & 1:
                other.append(order[start:stop])
                start = stop
        if all(fits(batch) or len(batch) == 1 for batch in other):
            assert cost(batches, lengths, device) <= cost(other, lengths, device)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 16), st.integers(1, 2000))
def test_batches_of_passes_keep_a_given_limit_and_beat_few_batches(
    lengths: list[int], max_rows: int, max_tokens: int
) -> None:
    batches = batches_of_passes(lengths, max_rows, "cpu", max_tokens)
    assert all(len(b) == 1 or (len(b) * lengths[b[-1]] <= max_tokens and len(b) <= max_rows) for b in batches)
    assert cost(batches, lengths, "cpu") <= cost(batches_by_length(lengths, max_rows, max_tokens), lengths, "cpu")


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(1, 16), st.none() | st.integers(1, 300))
def test_batches_by_prompt_hold_every_row_once_within_the_limits(
    rows: list[tuple[list[int], int]], max_rows: int, max_tokens: int | None
) -> None:
    tokens = TokenBatch.of([prompt for prompt, _ in rows], [[7] * length for _, length in rows])
    batches = batches_by_prompt(tokens, max_rows, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    for batch in batches:
        prompts = {tokens.prompts[i] for i in batch}
        padded = len(prompts) * max(map(len, prompts)) + len(batch) * max(len(tokens.responses[i]) for i in batch)
        assert 0 < len(batch) <= max_rows
        assert max_tokens is None or len(batch) == 1 or padded <= max_tokens
    of_rows = [tokens.prompts[i] for batch in batches for i in batch]
    changes = sum(a != b for a, b in pairwise(of_rows))
    assert changes == len(set(of_rows)) - 1  # rows of a prompt stand together


def test_by_default_the_prompts_bound_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_lens.backend.batches.MAX_TOKENS", 25)
    tokens = TokenBatch.of([[row // 2] * 10 for row in range(8)], [[7] * 500] * 8)
    assert batches_by_prompt(tokens, 64) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_when_prompts_are_worth_sharing() -> None:
    assert can_run_prompts_once(TokenBatch.of([[1], [1], [2], [2]]), (), ())
    assert not can_run_prompts_once(TokenBatch.of([[1], [1], [2]]), (), ())
    assert not can_run_prompts_once(TokenBatch.of([[1]]), (), ())

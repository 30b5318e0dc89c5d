"""Batches that do not fit are halved: the same results in the same order, each row with its own settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.backend import (
    Backend,
    Edit,
    ForwardResult,
    Generation,
    Positions,
    Read,
    ReadKind,
    Sampling,
    TokenBatch,
)
from persona_lens.backend.batches import OutOfMemoryError, forward_rows, generate_rows, halving, is_out_of_memory
from tests.backends.fixtures import Delegating, assert_close, direction, encode, tiny_backend

pytestmark = pytest.mark.cuda


class SmallMemory(Delegating):
    """A backend that runs out of memory above so many rows."""

    def __init__(self, inner: Backend, rows: int) -> None:
        super().__init__(inner)
        self.rows = rows
        self.calls: list[int] = []

    def _check(self, rows: int) -> None:
        self.calls.append(rows)
        if rows > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def generate(self, prompts: Any, sampling: Sampling, edits: Any = (), reads: Any = ()) -> Generation:
        self._check(len(prompts))
        return super().generate(prompts, sampling, edits, reads)

    def forward(self, tokens: TokenBatch, edits: Any = (), reads: Any = (), *, logprobs: bool = False) -> ForwardResult:
        self._check(len(tokens))
        return super().forward(tokens, edits, reads, logprobs=logprobs)


PROMPTS = encode("one", "two and a half", "three", "four is more", "five!")
RESPONSES = encode(" a", " bb", " ccc", " d", " and so on")
N = len(PROMPTS)
EVERYTHING = (*Read.means(), Read(ReadKind.ACTIVATIONS), Read(ReadKind.NORMS))


def row_edits(width: int) -> list[Edit]:
    """A coefficient for each row, and a mask that names other tokens in each."""
    mask = torch.zeros(N, width, dtype=torch.bool)
    for row in range(N):
        mask[row, -1 - row % 3] = True
    return [
        Edit.add(1, direction(), torch.linspace(-2, 2, N)),
        Edit.add(0, direction(1), torch.linspace(3, 1, N), mask),
        Edit.cap(2, direction(2), 0.5, Positions.PROMPT),
    ]


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_a_halved_generation_equals_the_whole(rows: int) -> None:
    backend = tiny_backend("transformers")
    edits = row_edits(max(map(len, PROMPTS)))
    sampling = Sampling(5, 1.0, 0.9, seeds=(3, 1, 4, 15, 9))
    whole = backend.generate(PROMPTS, sampling, edits, EVERYTHING)
    small = SmallMemory(backend, rows)
    found = generate_rows(small, PROMPTS, sampling, edits, EVERYTHING)
    assert (found.responses, found.ended) == (whole.responses, whole.ended)
    assert_close(found.reads, whole.reads)
    assert small.calls[0] == N
    assert sum(call for call in small.calls if call <= rows) == N


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_a_halved_forward_equals_the_whole(rows: int) -> None:
    backend = tiny_backend("transformers")
    text = TokenBatch.of(PROMPTS, RESPONSES)
    edits = row_edits(max(text.lengths))
    whole = backend.forward(text, edits, EVERYTHING, logprobs=True)
    small = SmallMemory(backend, rows)
    found = forward_rows(small, text, edits, EVERYTHING, logprobs=True)
    assert_close(found.reads, whole.reads)
    assert found.logprobs is not None
    assert whole.logprobs is not None
    assert len(found.logprobs) == N
    for mine, theirs in zip(found.logprobs, whole.logprobs, strict=True):
        assert_close(mine, theirs)


def test_one_row_too_large_is_an_error_that_says_what_to_do() -> None:
    small = SmallMemory(tiny_backend("transformers"), 0)
    with pytest.raises(OutOfMemoryError, match="one row alone runs out of memory; use a shorter text, fewer new"):
        generate_rows(small, PROMPTS, Sampling(2))
    assert small.calls == [5, 2, 1]


def test_rows_before_the_one_that_is_too_large_are_not_lost() -> None:
    def run(start: int, stop: int) -> list[int]:
        if start <= 3 < stop:
            raise torch.OutOfMemoryError("row 3")
        return list(range(start, stop))

    pieces = halving(run, 5)
    assert [next(pieces), next(pieces)] == [[0, 1], [2]]
    with pytest.raises(OutOfMemoryError):
        next(pieces)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_halving_runs_every_row_once_in_order(rows: int, fits: int) -> None:
    def run(start: int, stop: int) -> list[int]:
        if stop - start > fits:
            raise MemoryError
        return list(range(start, stop))

    assert [row for piece in halving(run, rows) for row in piece] == list(range(rows))


def test_another_error_comes_out_as_it_is_and_nothing_is_tried_again() -> None:
    calls: list[int] = []

    def run(start: int, stop: int) -> None:
        calls.append(stop - start)
        raise ValueError("not about memory")

    with pytest.raises(ValueError, match="not about memory"):
        list(halving(run, 8))
    assert calls == [8]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 10 bytes"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory

"""Requests that wait together are answered together."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

pytest.importorskip("inspect_ai", reason="needs the extra inspect")

import anyio

from persona_lens.analysis.capability.inspect_model import BatchQueue


def test_what_waits_is_answered_together_and_in_order() -> None:
    batches: list[list[int]] = []

    def run(batch: Sequence[int]) -> list[int]:
        batches.append(list(batch))
        return [number * 2 for number in batch]

    queue: BatchQueue[int, int] = BatchQueue(run, 4)
    answers: dict[int, int] = {}

    async def ask(number: int) -> None:
        answers[number] = await queue.answer(number)

    async def ask_all(numbers: range) -> None:
        async with anyio.create_task_group() as group:
            for number in numbers:
                group.start_soon(ask, number)

    anyio.run(ask_all, range(10))
    assert answers == {number: number * 2 for number in range(10)}
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    anyio.run(ask_all, range(20, 22))  # a later evaluation has an event loop of its own
    assert batches[3:] == [[20, 21]]


def test_a_failing_batch_fails_its_own_requests_only() -> None:
    def run(batch: Sequence[int]) -> list[int]:
        return [10 // number for number in batch]

    queue: BatchQueue[int, int] = BatchQueue(run, 1)
    with pytest.raises(ZeroDivisionError):
        anyio.run(queue.answer, 0)
    assert anyio.run(queue.answer, 5) == 2


def test_a_request_that_is_cancelled_while_it_waits_is_not_run() -> None:
    seen: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def run(batch: Sequence[str]) -> Sequence[str]:
        begun.set()
        go_on.wait(10)
        seen.extend(batch)
        return batch

    async def main() -> None:
        queue: BatchQueue[str, str] = BatchQueue(run, 1)
        async with anyio.create_task_group() as group:
            group.start_soon(queue.answer, "first")
            while not begun.is_set():
                await anyio.sleep(0.001)
            with anyio.move_on_after(0.01):
                await queue.answer("second")
            group.start_soon(queue.answer, "third")
            go_on.set()

    anyio.run(main)
    assert seen == ["first", "third"]

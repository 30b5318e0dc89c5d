"""Requests that wait together are answered together."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from persona_lens.analysis.capability.scoring import BatchQueue


def test_what_waits_is_answered_together_and_in_order() -> None:
    batches: list[list[int]] = []

    def run(batch: Sequence[int]) -> list[int]:
        batches.append(list(batch))
        return [number * 2 for number in batch]

    queue: BatchQueue[int, int] = BatchQueue(run, 4)
    answers = [queue.submit(number) for number in range(10)]
    assert [each.result(10) for each in answers] == [number * 2 for number in range(10)]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    queue.close()
    assert queue.submit(5).result(10) == 10  # a closed queue starts again
    queue.close()


def test_a_failing_batch_fails_its_own_requests_only() -> None:
    def run(batch: Sequence[int]) -> list[int]:
        return [10 // number for number in batch]

    queue: BatchQueue[int, int] = BatchQueue(run, 1)
    first, second = queue.submit(0), queue.submit(5)
    with pytest.raises(ZeroDivisionError):
        first.result(10)
    assert second.result(10) == 2
    queue.close()


def test_a_request_that_is_cancelled_while_it_waits_is_not_run() -> None:
    seen: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def run(batch: Sequence[str]) -> Sequence[str]:
        begun.set()
        go_on.wait(10)
        seen.extend(batch)
        return batch

    queue: BatchQueue[str, str] = BatchQueue(run, 1)
    queue.submit("first")
    assert begun.wait(10)
    assert queue.submit("second").cancel()
    last = queue.submit("third")
    go_on.set()
    last.result(10)
    queue.close()
    assert seen == ["first", "third"]

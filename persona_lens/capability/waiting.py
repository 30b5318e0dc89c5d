"""Requests that arrive one by one from many tasks, answered in batches by one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

LULL = 0.05  # seconds without a further request after which a batch that is not full runs


@dataclass(frozen=True)
class _Waiting(Generic[Asked, Answer]):
    request: Asked
    future: Future[Answer]


class BatchQueue(Generic[Asked, Answer]):
    """Collects what waits into batches and runs them, one at a time, in a thread of its own.

    Args:
        run: Answers a batch; one answer a request, in their order.
        size: Requests of a batch at most.
    """

    def __init__(self, run: Callable[[Sequence[Asked]], Sequence[Answer]], size: int) -> None:
        self._run = run
        self._size = size
        self._queue: SimpleQueue[_Waiting[Asked, Answer] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, request: Asked) -> Future[Answer]:
        """Put a request into the queue; one that is cancelled before its turn is never run."""
        future: Future[Answer] = Future()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="persona-lens batches", daemon=True)
                self._thread.start()
            self._queue.put(_Waiting(request, future))
        return future

    def close(self) -> None:
        """Answer what waits, and end the thread; a later request starts another."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._queue.put(None)
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, last = [first], False
            while len(batch) < self._size and not last:
                try:
                    following = self._queue.get(timeout=LULL)
                except Empty:
                    break
                if following is None:
                    last = True
                else:
                    batch.append(following)
            self._answer([each for each in batch if each.future.set_running_or_notify_cancel()])
            if last:
                return

    def _answer(self, batch: Sequence[_Waiting[Asked, Answer]]) -> None:
        if not batch:
            return
        try:
            answers = self._run([each.request for each in batch])
        except BaseException as error:  # noqa: BLE001 - it is raised where the answer is awaited
            for each in batch:
                each.future.set_exception(error)
            return
        for each, answer in zip(batch, answers, strict=True):
            each.future.set_result(answer)

"""`Replies`: runs the replies of requests in threads, and brings what they say to the event loop as it comes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

from persona_lens.backend import StopGeneration
from persona_lens.serve.admission import Admission
from persona_lens.serve.metrics import Metrics
from persona_lens.serve.workbench import Answer, Begun, Planned, Said, Workbench

News: TypeAlias = tuple[int, Begun | Said | Answer]
"""The number of a reply among those of its request, and what is new of it."""


class Replies:
    """Runs replies.

    Args:
        workbench: Who gives them.
        waiting: Requests that may wait.
    """

    def __init__(self, workbench: Workbench, waiting: int) -> None:
        self._workbench = workbench
        self.admission = Admission(workbench.rows, waiting)
        self.metrics = Metrics(self.admission)
        self._pool = ThreadPoolExecutor(workbench.rows, thread_name_prefix="persona-lens-reply")

    async def of(self, planned: Sequence[Planned]) -> AsyncGenerator[News, None]:
        """The replies of one request, in whatever order they come; whoever goes away ends those that run.

        Raises:
            BusyError: If too many requests wait.
            Exception: What ended one of them.
        """
        self.admission.check()
        loop, began = asyncio.get_running_loop(), time.monotonic()
        # A client that reads slowly lets no more pile up here than its own replies, whose length is bounded.
        news: asyncio.Queue[News | BaseException] = asyncio.Queue()
        gone = threading.Event()

        def tell(number: int, what: Begun | Said | Answer) -> None:
            if gone.is_set():
                raise StopGeneration
            loop.call_soon_threadsafe(news.put_nowait, (number, what))

        async def give(number: int, each: Planned) -> None:
            async with self.admission.place(news):
                running = loop.run_in_executor(
                    self._pool,
                    lambda: self._workbench.answer(
                        each, lambda begun: tell(number, begun), lambda said: tell(number, said)
                    ),
                )
                try:
                    answer = await asyncio.shield(running)
                except asyncio.CancelledError:
                    await asyncio.wait([running])  # its place is free once it has ended, at the next step
                    raise
            news.put_nowait((number, answer))

        tasks = [asyncio.create_task(give(number, each)) for number, each in enumerate(planned)]
        for task in tasks:
            task.add_done_callback(lambda task: _failed(task, news))
        left = len(planned)
        try:
            while left:
                found = await news.get()
                if isinstance(found, BaseException):
                    raise found
                self._count(found, began)
                left -= isinstance(found[1], Answer)
                yield found
        finally:
            gone.set()
            for task in tasks:
                task.cancel()

    def _count(self, news: News, began: float) -> None:
        seconds = time.monotonic() - began
        if isinstance(news[1], Said):
            self.metrics.tokens.inc()
        elif isinstance(news[1], Begun):
            self.metrics.first.observe(seconds)
        else:
            self.metrics.whole.observe(seconds)

    def close(self) -> None:
        """Let the threads go once what runs has ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _failed(task: asyncio.Task[None], news: asyncio.Queue[News | BaseException]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        news.put_nowait(error)


@dataclass
class Gathered:
    """What a request's replies said, gathered.

    Attributes:
        begun: Of each.
        said: Of each.
        answers: Of each.
    """

    begun: dict[int, Begun]
    said: dict[int, list[Said]]
    answers: dict[int, Answer]


async def gathered(replies: Replies, planned: Sequence[Planned]) -> Gathered:
    """All of a request's replies, once they are over."""
    found = Gathered({}, {number: [] for number in range(len(planned))}, {})
    async with aclosing(replies.of(planned)) as news:
        async for number, what in news:
            if isinstance(what, Begun):
                found.begun[number] = what
            elif isinstance(what, Said):
                found.said[number].append(what)
            else:
                found.answers[number] = what
    return found

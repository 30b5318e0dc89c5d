"""`Admission`: which replies run, which wait, and when there are too many: in turn by request, not by reply."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class BusyError(Exception):
    """Too many requests wait already."""


class Admission:
    """Lets so many replies run at once; those of a request that asks for many do not hold up others.

    Used in one event loop.

    Args:
        rows: Replies that run at once.
        waiting: Requests that may wait.

    Attributes:
        running: Replies that run.
    """

    def __init__(self, rows: int, waiting: int) -> None:
        self._rows, self._most = rows, waiting
        self.running = 0
        self._turns: OrderedDict[object, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Requests of which a reply waits."""
        return len(self._turns)

    def check(self) -> None:
        """Raise `BusyError` if no further request may wait."""
        if self.running >= self._rows and self.waiting >= self._most:
            raise BusyError

    @asynccontextmanager
    async def place(self, request: object) -> AsyncIterator[None]:
        """A place for one reply of a request, once it is its turn."""
        if self.running < self._rows and not self._turns:
            self.running += 1
        else:
            await self._turn(request)
        try:
            yield
        finally:
            self.running -= 1
            self._next()

    async def _turn(self, request: object) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.setdefault(request, deque()).append(mine)
        try:
            await mine  # whoever sets it has counted this reply as running
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.running -= 1
                self._next()
            else:
                self._forget(request, mine)
            raise

    def _forget(self, request: object, mine: asyncio.Future[None]) -> None:
        queue = self._turns.get(request)
        if queue is not None and mine in queue:
            queue.remove(mine)
            if not queue:
                del self._turns[request]

    def _next(self) -> None:
        while self._turns and self.running < self._rows:
            request, queue = next(iter(self._turns.items()))
            following = queue.popleft()
            if queue:
                self._turns.move_to_end(request)
            else:
                del self._turns[request]
            if not following.done():
                self.running += 1
                following.set_result(None)

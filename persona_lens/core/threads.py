"""Work that several threads do, as much at once as may run; and one that they take turns at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol, TypeVar

Given = TypeVar("Given")
Done = TypeVar("Done")


def in_threads(
    work: Callable[[Given], Done], given: Iterable[Given], at_once: int, *, in_order: bool = False
) -> Iterator[tuple[Given, Done]]:
    """Do something with everything that is given, several at a time.

    Args:
        work: What to do; called from other threads if several run at once.
        given: Taken one by one, as there is room.
        at_once: How many run at the same time; 1 leaves all to this thread.
        in_order: Whether results come in the order of what is given, and not as they are done. No more than twice as
            many as run at once are held until it is their turn.

    Yields:
        What was given, and its result.

    Raises:
        Exception: The first that ``work`` raised; the results of what was running then are still yielded, in order
            those before the first that failed.
    """
    if at_once == 1:
        yield from ((each, work(each)) for each in given)
        return
    results: SimpleQueue[tuple[int, Given, list[Done], BaseException | None]] = SimpleQueue()

    def run(number: int, each: Given) -> None:
        try:
            results.put((number, each, [work(each)], None))
        except BaseException as error:  # noqa: BLE001 - raised again where the results are taken
            results.put((number, each, [], error))

    coming, done = enumerate(given), False
    held: dict[int, tuple[Given, Done]] = {}
    running = turn = 0
    first_error: BaseException | None = None
    while True:
        while not done and first_error is None and running < at_once and len(held) < at_once:
            if (following := next(coming, None)) is None:
                done = True
                break
            # Daemons: an interrupted program does not wait for answers that nobody will read.
            threading.Thread(target=run, args=following, daemon=True).start()
            running += 1
        if not running:
            break
        number, each, found, error = results.get()
        running -= 1
        first_error = first_error or error
        for result in found:
            if in_order:
                held[number] = each, result
            else:
                yield each, result
        while turn in held:
            yield held.pop(turn)
            turn += 1
    if first_error is not None:
        raise first_error


class Waiter(Protocol):
    """Who waits for news of steps."""

    @property
    def news(self) -> int:
        """Grows whenever there is something new."""
        ...

    def is_over(self) -> bool:
        """Whether there will be nothing new any more."""
        ...


class Turns:
    """Steps of a work that several threads wait for: whoever waits runs the next one.

    So the work needs no thread that runs by itself, and could be left behind.

    Args:
        carry_out: Runs a step; by default in the thread whose turn it is. Whatever interrupts it, it must not return
            before the step has ended.
    """

    def __init__(self, carry_out: Callable[[Callable[[], None]], None] = lambda step: step()) -> None:
        self._carry_out = carry_out
        self._turn = threading.Condition()
        self._busy = False
        self._waiting = 0  # threads that have something to say in between; steps let them go first

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While open no step runs."""
        with self._turn:
            self._waiting += 1
            try:
                self._turn.wait_for(lambda: not self._busy)
                self._busy = True
            except BaseException:  # an interruption: whoever let this thread go first need not any more
                self._turn.notify_all()
                raise
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            self._release()

    def run_for(
        self, waiter: Waiter, step: Callable[[], Callable[[], None]], after: Callable[[], None] | None = None
    ) -> None:
        """Run steps, or hear of those of others, until there is nothing to wait for.

        Args:
            waiter: Who waits.
            step: Runs one, and returns what makes its news known; to all that it brings news at once.
            after: Called in this thread whenever there may be news.
        """
        seen = waiter.news
        while self.step_for(waiter, seen, step):
            seen = waiter.news
            if after is not None:
                after()

    def step_for(self, waiter: Waiter, seen: int, step: Callable[[], Callable[[], None]]) -> bool:
        """Run a step, unless somebody else's brings the waiter something new after ``seen`` news.

        Returns:
            Whether there may be something new; False once nothing is and nothing will be.
        """

        def heard() -> bool:
            return waiter.news != seen or waiter.is_over()

        with self._turn:
            self._turn.wait_for(lambda: heard() or (not self._busy and not self._waiting))
            if heard():
                return waiter.news != seen
            self._busy = True

        def run() -> None:
            tell = step()
            with self._turn:
                tell()

        try:
            self._carry_out(run)
        finally:
            self._release()
        return True

    def _release(self) -> None:
        with self._turn:
            self._busy = False
            self._turn.notify_all()


class OneThread:
    """A thread that runs what others give it, one thing after another.

    Each thread that calls torch has a team of threads of its own, and these stand in each other's way: what many
    threads take turns at is better run by one.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def __call__(self, work: Callable[[], None]) -> None:
        """Run it, and wait until it has ended, whatever interrupts this thread meanwhile."""
        running = self._pool.submit(work)
        try:
            running.result()
        finally:
            wait([running])

"""Work that several threads do, as much at once as may run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

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

"""`Pieces`: the parts of a long run, several of them at a time if wanted, saved in order as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from queue import SimpleQueue
from typing import Any

from persona_lens.runs import RunFolder

Row = Mapping[str, Any]
WAITING = "waiting"


class Pieces:
    """Pieces of known sizes whose rows go into one JSONL file, in the order of the pieces.

    A piece that is done before one in front of it is kept in a file of its own until its turn, so that nothing that is
    done is ever done again, and the finished folder is the same in whatever order the pieces came.

    Args:
        folder: Where to save; None keeps everything in memory.
        name: The JSONL file.
        sizes: Rows of each piece.
    """

    def __init__(self, folder: RunFolder | None, name: str, sizes: Sequence[int]) -> None:
        self._folder = folder
        self._name = name
        self._sizes = tuple(sizes)
        self.rows: dict[int, list[Row]] = {}
        self._saved = 0
        if folder is not None:
            self._load(folder)

    @property
    def done(self) -> int:
        """Rows done so far."""
        return sum(map(len, self.rows.values()))

    def run(
        self, work: Callable[[int], list[Row]], *, at_once: int = 1, report: Callable[[int], None] = lambda done: None
    ) -> list[Row]:
        """Do what is not done yet.

        Args:
            work: Does a piece and returns its rows; called from other threads if several run at once.
            at_once: How many pieces run at the same time.
            report: Told the number of rows done, at the start and after each piece.

        Returns:
            All rows, in the order of the pieces.

        Raises:
            Exception: The first that ``work`` raised; what was running then is still finished and saved.
        """
        report(self.done)
        missing = [number for number in range(len(self._sizes)) if number not in self.rows]
        finished = _in_threads(work, missing, at_once) if at_once > 1 else ((n, work(n)) for n in missing)
        for number, rows in finished:
            self.rows[number] = rows
            self._save(number)
            report(self.done)
        return [row for number in range(len(self._sizes)) for row in self.rows[number]]

    def _load(self, folder: RunFolder) -> None:
        rows = folder.rows(self._name, self._sizes)
        stops = list(accumulate(self._sizes))
        self._saved = sum(stop <= len(rows) for stop in stops)
        for number in range(self._saved):
            self.rows[number] = list(rows[stops[number] - self._sizes[number] : stops[number]])
        for number in range(len(self._sizes)):
            waiting = self._waiting(number)
            if number < self._saved:
                folder.remove(waiting)
            elif len(kept := folder.rows(waiting)) == self._sizes[number]:
                self.rows[number] = list(kept)
        self._append()

    def _save(self, number: int) -> None:
        if self._folder is None:
            return
        if number != self._saved:
            self._folder.write_lines(self._waiting(number), self.rows[number])
        self._append()

    def _append(self) -> None:
        """Move the pieces whose turn it is into the file."""
        assert self._folder is not None
        while self._saved < len(self._sizes) and self._saved in self.rows:
            number = self._saved
            self._folder.append(self._name, self.rows[number])
            self._saved += 1
            self._folder.remove(self._waiting(number))

    def _waiting(self, number: int) -> str:
        return f"{WAITING}/{self._name}-{number:05d}"


def _in_threads(
    work: Callable[[int], list[Row]], numbers: Sequence[int], at_once: int
) -> Iterator[tuple[int, list[Row]]]:
    """Yield results as they come; after an error, those of what was running, and then raise it."""
    results: SimpleQueue[tuple[int, list[Row] | None, BaseException | None]] = SimpleQueue()

    def run(number: int) -> None:
        try:
            results.put((number, work(number), None))
        except BaseException as error:  # noqa: BLE001 - raised again where the results are taken
            results.put((number, None, error))

    pending, running = list(numbers)[::-1], 0
    first_error: BaseException | None = None
    while running or (pending and first_error is None):
        while pending and running < at_once and first_error is None:
            # Daemons: an interrupted program does not wait for answers that nobody will read.
            threading.Thread(target=run, args=(pending.pop(),), daemon=True).start()
            running += 1
        number, rows, error = results.get()
        running -= 1
        first_error = first_error or error
        if rows is not None:
            yield number, rows
    if first_error is not None:
        raise first_error

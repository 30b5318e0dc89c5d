"""`Window`: rows of a dataset that are looked at together, so that those of like length can run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from persona_lens.screening.datasets import Dataset, GivenRow


@dataclass(frozen=True)
class Window:
    """Rows that follow each other.

    Attributes:
        dataset: Which dataset they are of, from 0.
        number: Which window of the dataset it is, from 0.
        name: The dataset's name.
        rows: The rows, bad ones too.
    """

    dataset: int
    number: int
    name: str
    rows: tuple[GivenRow, ...]


def windows_of(datasets: Sequence[Dataset], size: int, start: tuple[int, int] = (0, 0)) -> Iterator[Window]:
    """Cut datasets into windows, the same ones however often it is asked.

    Args:
        datasets: In their order.
        size: Rows of a window.
        start: Dataset and window to begin with; what is before is read past, not encoded.
    """
    for number in range(start[0], len(datasets)):
        dataset = datasets[number]
        rows = iter(dataset)
        window = start[1] if number == start[0] else 0
        if window:
            next(islice(rows, window * size - 1, None), None)
        while taken := tuple(islice(rows, size)):
            yield Window(number, window, dataset.name, taken)
            window += 1

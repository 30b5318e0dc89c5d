"""`Excerpt`: what a row says, for people and judges; found again in the datasets once it is known which rows matter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from persona_lens.screening.datasets import Dataset

Key = tuple[int, int]
"""Dataset and row."""


@dataclass(frozen=True)
class Excerpt:
    """What a row says.

    Attributes:
        id: The row's id.
        prompt: The last message before the answer.
        response: The last answer.
    """

    id: str
    prompt: str
    response: str


def excerpts_of(datasets: Sequence[Dataset], wanted: Collection[Key]) -> dict[Key, Excerpt]:
    """Read some rows again; each dataset is read no further than its last one."""
    found: dict[Key, Excerpt] = {}
    for number, dataset in enumerate(datasets):
        own = {row for each, row in wanted if each == number}
        for row in dataset if own else ():
            if row.number in own and row.messages is not None:
                *_, asked, said = row.messages
                found[number, row.number] = Excerpt(row.id, asked["content"], said["content"])
            own.discard(row.number)
            if not own:
                break
    return found

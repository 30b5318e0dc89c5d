"""`Slots`: keys and values of rows that come and go between steps, kept where a Hugging Face model reads them.

All rows end at the same column, wherever they began. One that comes is put before the column that is next; where one
left, the last takes its place. So a step is one pass over one token of every row, and copies nothing but what it adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Room is made for some at a time: what is moved for each would be moved all the time.
COLUMNS = 256
ROWS = 4


class Slots:
    """The rows' keys and values.

    Attributes:
        lengths: Tokens of each row.
        stop: One past the last column of every row.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.stop = 0
        self._layers: list[_SlotLayer] = []

    @property
    def start(self) -> int:
        """The first column that any row has."""
        return self.stop - max(self.lengths, default=0)

    def join(self, begun: Cache, lengths: Sequence[int]) -> None:
        """Take rows in whose tokens have run in a pass of their own.

        Args:
            begun: Their keys and values, padded on the left.
            lengths: Tokens of each.
        """
        given: list[Any] = list(begun.layers)
        self._layers = self._layers or [_SlotLayer(self) for _ in given]
        first = len(self.lengths)
        self._settle(max(self.stop, *lengths), first + len(lengths))
        for slot, layer in zip(self._layers, given, strict=True):
            slot.take((layer.keys, layer.values), first, lengths)
        self.lengths += lengths

    def leave(self, rows: Iterable[int]) -> None:
        """Forget rows, the last first: each is replaced by the one that is the last by then."""
        for row in sorted(rows, reverse=True):
            last = len(self.lengths) - 1
            for layer in self._layers if row != last else ():
                layer.move(last, row)
            self.lengths[row] = self.lengths[last]
            self.lengths.pop()
        if not self.lengths:  # what was needed at the busiest time need not be kept
            self._layers, self.stop = [], 0

    def inputs(self, tokens: Sequence[int], device: torch.device) -> dict[str, Any]:
        """Arguments of a pass over one more token of every row."""
        if self.stop == self._layers[0].columns:
            self._settle(self.stop - self.start, len(self.lengths))
        width = self.stop - self.start + 1
        # One transfer, that need not be waited for.
        ids, lengths = torch.tensor([list(tokens), self.lengths]).to(device, non_blocking=True).unsqueeze(-1)
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(width, device=device) >= width - 1 - lengths).long(),
            "position_ids": lengths,
            "past_key_values": Cache(layers=list(self._layers)),
            "use_cache": True,
        }

    def advance(self) -> None:
        """That pass is over."""
        self.stop += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _settle(self, stop: int, rows: int) -> None:
        """Let the rows end at another column, and have room for so many."""
        for layer in self._layers:
            layer.settle(stop, rows)
        self.stop = stop


class _SlotLayer(DynamicLayer):
    """One layer's keys and values, each [rows, heads, columns, width] with room for more."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = slots
        self._kept: list[Tensor] = []
        self.columns = 0

    def settle(self, stop: int, rows: int) -> None:
        """See `Slots`; nothing is moved where there is room and the rows stay where they are."""
        slots = self._slots
        if self._kept and stop == slots.stop and stop < self.columns and rows <= len(self._kept[0]):
            return
        width, self.columns = slots.stop - slots.start, _up(stop + COLUMNS // 2, COLUMNS)
        for number, kept in enumerate(self._kept):
            room = kept.new_zeros(_up(rows, ROWS), kept.shape[1], self.columns, kept.shape[3])
            there = len(slots.lengths)
            room[:there, :, stop - width : stop] = kept[:there, :, slots.start : slots.stop]
            self._kept[number] = room

    def take(
        self, given: Sequence[Float[Tensor, "rows heads tokens width"]], first: int, lengths: Sequence[int]
    ) -> None:
        """Put new rows behind those that are there."""
        if not self._kept:
            rows = _up(len(lengths), ROWS)
            self._kept = [each.new_zeros(rows, each.shape[1], self.columns, each.shape[3]) for each in given]
            self.is_initialized = True
        stop = self._slots.stop
        for kept, new in zip(self._kept, given, strict=True):
            for row, (each, length) in enumerate(zip(new, lengths, strict=True), start=first):
                kept[row, :, : stop - length] = 0  # what stands before a row is weighted by 0, and has to be numbers
                kept[row, :, stop - length : stop] = each[:, each.shape[1] - length :]

    def move(self, source: int, target: int) -> None:
        """Put a row in another's place."""
        for kept in self._kept:
            kept[target, :, : self._slots.stop] = kept[source, :, : self._slots.stop]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add a token of every row; what all of them have."""
        start, stop, rows = self._slots.start, self._slots.stop, len(key_states)
        for kept, new in zip(self._kept, (key_states, value_states), strict=True):
            kept[:rows, :, stop : stop + 1] = new
        keys, values = (kept[:rows, :, start : stop + 1] for kept in self._kept)
        return keys, values

    def get_seq_length(self) -> int:
        """Columns that any row has."""
        return self._slots.stop - self._slots.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns are attended to, and which is the first."""
        return self.get_seq_length() + query_length, 0


def _up(number: int, step: int) -> int:
    """The next multiple of a step."""
    return -(-number // step) * step

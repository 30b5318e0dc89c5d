"""`PackedParts`: which tokens are thinking and which answer, where a pass holds any tokens of any rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from persona_lens.backend.parts.masks import stepped

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, UInt8
    from torch import Tensor

    from persona_lens.backend.parts import GivenParts

_COLUMNS = 256  # room is made for so many tokens at a time


class PackedParts:
    """What is known of every row's tokens: those that were handed over, and those that have run since.

    It is kept where the model runs, which alone knows the ids of new tokens; nothing waits for it.

    Args:
        given: The rows as they are handed over.
        prompts: Tokens of each row's prompt.
        texts: Tokens of each row that are handed over.
    """

    def __init__(self, given: GivenParts, prompts: Int[Tensor, " rows"], texts: Int[Tensor, " rows"]) -> None:
        plain = given.plain(max(map(len, given.kinds)), left=False)
        self._texts = texts
        self._kinds, self._states = plain.pop("begun"), plain.pop("states")
        self._automaton = plain
        self._moved = False

    def begin_pass(
        self,
        rows: Int[Tensor, " tokens"],
        at: Int[Tensor, " tokens"],
        fresh: Bool[Tensor, " tokens"],
        ids: Int[Tensor, " tokens"],
        there: tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"], Int[Tensor, " tokens"]],
    ) -> None:
        """Take the tokens of a pass; arguments as `persona_lens.backend.packed.masks.PackedMasks.begin_pass`.

        Args:
            rows: Each token's row, on the CPU.
            at: Its position in its row, on the CPU.
            fresh: Whether it was not there before, on the CPU.
            ids: The tokens.
            there: Where the ids are, rows and positions once more, and how far behind the prompt they are.
        """
        if not self._moved:
            self._kinds, self._states = self._kinds.to(ids.device), self._states.to(ids.device)
            self._automaton = {name: value.to(ids.device) for name, value in self._automaton.items()}
            self._moved = True
        more = int(at.max()) + 1 - self._kinds.shape[1] if len(at) else 0
        if more > 0:
            self._kinds = torch.nn.functional.pad(self._kinds, (0, max(more, _COLUMNS)))
        index = (fresh & (at >= self._texts[rows])).nonzero().flatten()
        while len(index):  # once, unless rows begin anew: the first new token of each row, then the next
            first = torch.full_like(self._texts, int(at[index].max())).scatter_reduce(0, rows[index], at[index], "amin")
            now = at[index] == first[rows[index]]
            self._take(rows[index[now]], at[index[now]], ids, index[now])
            index = index[~now]
        self._rows, self._at, after = there
        self._is_response = after >= 0

    def _take(self, rows: Tensor, at: Tensor, ids: Tensor, places: Tensor) -> None:
        rows, at, places = torch.stack((rows, at, places)).to(ids.device, non_blocking=True)
        states, kinds = stepped(self._automaton, self._states[rows], ids[places])
        self._states[rows], self._kinds[rows, at] = states, kinds

    @property
    def here(self) -> UInt8[Tensor, " tokens"]:
        """What each token of this pass is."""
        return self._kinds[self._rows, self._at]

    def mask(self, part: int, span: tuple[int, int | None] | None) -> Bool[Tensor, " tokens"]:
        """Which tokens of this pass are of a part, or of so many of it, counted from 0 in each row."""
        mask = (self.here == part) & self._is_response
        if span is None:
            return mask
        start, stop = span
        index = self.index(part)
        mask = mask & (index >= start)
        return mask if stop is None else mask & (index < stop)

    def index(self, part: int) -> Int[Tensor, " tokens"]:
        """Number of each token of this pass among those of its row that are of a part."""
        return ((self._kinds == part).cumsum(dim=1) - 1)[self._rows, self._at]

    def counted(self, mask: Bool[Tensor, " tokens"], fresh: Bool[Tensor, " tokens"]) -> Int[Tensor, " rows"]:
        """How many tokens of a mask were not there before, row by row."""
        counts = torch.zeros(len(self._texts), dtype=torch.long, device=mask.device)
        new = mask & fresh.to(mask.device, non_blocking=True)
        return counts.index_add_(0, self._rows, new.long())

    def kinds(self) -> UInt8[Tensor, "rows tokens"]:
        """What all of them are, on the CPU."""
        return self._kinds.cpu()

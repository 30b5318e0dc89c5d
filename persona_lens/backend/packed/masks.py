"""`PackedMasks`: which token of a pass is what, where passes hold any tokens of any rows; and a tally of what was done.

Runs where the model runs, see `persona_lens.backend.packed.intervention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from persona_lens.backend.packed.call import PackedCall
from persona_lens.backend.packed.parts import PackedParts
from persona_lens.backend.parts.masks import PARTS, part_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
    from torch import Tensor

_FURTHEST = 2**40  # no text goes so far


def moved(vectors: Sequence[Int[Tensor, " any"]], device: torch.device) -> Sequence[Int[Tensor, " any"]]:
    """The same on a device, by one transfer that need not be waited for."""
    if device.type == "cpu":
        return vectors
    together, sizes = torch.cat(list(vectors)).to(device, non_blocking=True), [len(vector) for vector in vectors]
    found: Sequence[Tensor] = together.split(sizes)  # type: ignore[no-untyped-call]
    return found


@dataclass
class Tallies:
    """What was done, to be compared with what had to be done.

    Attributes:
        began: The first position of each row that was computed; -1 for a row that never ran.
        computed: One past the last.
        passes: Passes with a token of the call.
        tokens: Tokens in them, those that were computed again included.
        blocks: For each layer that is read or edited, the tokens that its block ran over.
        edited: For each edit, how many different positions of each row it was made at.
        kinds: What each token of each row is, a value of `persona_lens.backend.parts.machine.Part`, where that matters;
            zero behind the last.
    """

    began: Int[Tensor, " rows"]
    computed: Int[Tensor, " rows"]
    passes: int = 0
    tokens: int = 0
    blocks: dict[int, int] = field(default_factory=dict)
    edited: dict[int, Int[Tensor, " rows"]] = field(default_factory=dict)
    kinds: UInt8[Tensor, "rows tokens"] | None = None


class PackedMasks:
    """Which token of a pass is what. Rows and positions are known on the CPU; ids only where the model runs."""

    def __init__(self, call: PackedCall) -> None:
        self._call = call
        self._prompts, self._texts = torch.tensor(call.prompts), torch.tensor(call.texts)
        self._ends = torch.tensor(call.end_ids, dtype=torch.long)
        self._parts = None if call.parts is None else PackedParts(call.parts, self._prompts, self._texts)
        self._over: Tensor | None = None  # where each row's response ended; where the ids are
        nobody = torch.zeros_like(self._prompts)
        self.tallies = Tallies(nobody - 1, nobody)
        self.device = torch.device("cpu")

    def begin_pass(self, rows: Int[Tensor, " tokens"], at: Int[Tensor, " tokens"], ids: Int[Tensor, " tokens"]) -> None:
        """Tell which tokens the coming pass is about.

        Args:
            rows: Each token's row, on the CPU.
            at: Its position in its row, on the CPU.
            ids: The tokens.
        """
        done = self.tallies
        self.device = ids.device
        prompt = self._prompts[rows]
        self.rows, self.at, self._after = rows, at, at - prompt
        fresh = at >= done.computed[rows]
        new = done.began[rows] < 0
        done.began = done.began.scatter_reduce(0, rows[new], at[new], "amin", include_self=False)
        done.computed = done.computed.scatter_reduce(0, rows, at + 1, "amax")
        done.passes, done.tokens = done.passes + 1, done.tokens + len(rows)
        self.fresh, stop = fresh, self._texts[rows] + self._call.room
        is_prompt = self._after < 0
        kinds = {
            "prompt": fresh & is_prompt,
            "response": fresh & ~is_prompt & (at < stop),
            "last": fresh & (self._after == -1),
        }
        indices = [mask.nonzero().flatten() for mask in kinds.values()]
        self._rows_there, self._at_there, self._after_there, *there = moved(
            [rows, at, self._after, *indices, *(rows[index] for index in indices)], ids.device
        )
        self.first = (self._at_there == 0).unsqueeze(1)
        self._of = dict(zip(kinds, zip(there[:3], there[3:], strict=True), strict=True))
        self._without_ends(ids)
        if self._parts is not None:
            self._parts.begin_pass(rows, at, fresh, ids, (self._rows_there, self._at_there, self._after_there))
        self._of |= self._parts_of_response()
        self._where: dict[object, tuple[Tensor | None, Tensor]] = {}

    def _without_ends(self, ids: Tensor) -> None:
        """Leave out ends of turns that were generated and what follows; there is a row beyond the last for them."""
        index, rows = self._of["response"]
        if len(self._ends) and len(index) and self._call.room:
            if self._over is None:
                self._over = torch.full(self._prompts.shape, _FURTHEST, device=self.device)
                self._ends = self._ends.to(self.device)
            at = self._at_there[index]
            ends = at.masked_fill(~torch.isin(ids[index], self._ends), _FURTHEST)
            self._over = self._over.scatter_reduce(0, rows, ends, "amin")
            self._of["response"] = index, rows.masked_fill(at >= self._over[rows], len(self._prompts))

    def _parts_of_response(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Thinking and answer; tokens of the other part are of the row beyond the last."""
        index, rows = self._of["response"]
        if self._parts is None:
            return {"answer": (index, rows)}
        here, nobody = self._parts.here[index], len(self._prompts)
        return {name: (index, rows.masked_fill(here != part, nobody)) for name, part in PARTS.items()}

    def of_kind(self, kind: str) -> tuple[Int[Tensor, " some"], Int[Tensor, " some"]]:
        """Places in this pass, and rows, of tokens that were not there before: ``prompt``, ``response``, ``last``.

        The row of tokens that end a response, and of those after them, is one beyond the last.
        """
        return self._of[kind]

    def everything(self) -> tuple[Int[Tensor, " some"], Int[Tensor, " some"], Int[Tensor, " some"]]:
        """Places, rows and positions of all of them."""
        places, rows = (torch.cat(parts) for parts in zip(self._of["prompt"], self._of["response"], strict=True))
        return places, rows, self._at_there[places]

    def touches(self, positions: str | Tensor) -> bool:
        """Whether an edit at these positions can change anything in this pass."""
        if not isinstance(positions, str):
            return bool((self.at < self._texts[self.rows]).any())
        return positions != "prompt" or bool((self._after < 0).any())

    def where(
        self, positions: str | Tensor, span: tuple[int, int | None] | None = None
    ) -> Bool[Tensor, "tokens 1"] | None:
        """The positions, or their part from ``start`` to ``stop``, as a mask over this pass; None for all."""
        return self._located(positions, span)[0]

    def _located(self, positions: str | Tensor, span: tuple[int, int | None] | None) -> tuple[Tensor | None, Tensor]:
        """`where`, and how many new positions of each row are among them; once a pass, however many edits ask."""
        key = (positions if isinstance(positions, str) else id(positions), span)
        if key not in self._where and (part := self._part(positions)) is not None and self._parts is not None:
            chosen = self._parts.mask(part, span)
            self._where[key] = chosen.unsqueeze(1), self._parts.counted(chosen, self.fresh)
        if key not in self._where:
            mask = self.mask(positions, span)
            made = self.rows[self.fresh if mask is None else self.fresh & mask]
            counts = torch.bincount(made, minlength=len(self._prompts))
            there = None
            if mask is not None and not bool(mask.all()):  # in most passes it is, so that layers have less to do
                there = mask.unsqueeze(1).to(self.device, non_blocking=True)
            self._where[key] = there, counts
        return self._where[key]

    def _part(self, positions: str | Tensor) -> int | None:
        """The part that positions are of, where that depends on the ids."""
        part = part_of(positions) if isinstance(positions, str) else None
        if self._parts is None and part == PARTS["thinking"]:
            raise ValueError("nothing says which tokens are thinking: give the call its parts")
        return None if self._parts is None else part

    def mask(
        self, positions: str | Tensor, span: tuple[int, int | None] | None = None
    ) -> Bool[Tensor, " tokens"] | None:
        """The same on the CPU, for each token."""
        if not isinstance(positions, str):
            width, left = positions.shape[1], self._texts[self.rows] - self.at
            given = positions.cpu()[self.rows, (width - left).clamp(0, width - 1)]
            return self._cut(given & (left > 0), positions, span)
        if positions == "all" and span is None:
            return None
        index = self._index(positions, self.at, self._after)
        inside = (self._after < 0) if positions == "prompt" else (index >= 0)
        return self._cut(inside, positions, span)

    def _cut(self, mask: Tensor, positions: str | Tensor, span: tuple[int, int | None] | None) -> Tensor:
        if span is None:
            return mask
        index, length = self._index(positions, self.at, self._after), self._prompts[self.rows]
        start, stop = span
        mask = mask & (index >= (start if start >= 0 else length + start))
        return mask if stop is None else mask & (index < (stop if stop >= 0 else length + stop))

    @staticmethod
    def _index(positions: str | Tensor, at: Tensor, after: Tensor) -> Int[Tensor, " tokens"]:
        """Number of each token among those of its row that are of a kind; negative before the first of them."""
        shift = {"response": 0, "answer": 0, "generating": 1}.get(positions) if isinstance(positions, str) else None
        return at if shift is None else after + shift

    def index(self, positions: str | Tensor) -> Int[Tensor, "tokens 1"]:
        """The same where the model runs."""
        if (part := self._part(positions)) is not None and self._parts is not None:
            return self._parts.index(part).unsqueeze(1)
        return self._index(positions, self._at_there, self._after_there).unsqueeze(1)

    def by_row(self, values: Float[Tensor, "rows k"]) -> Float[Tensor, "tokens k"]:
        """What an edit gives for each row, for each token of this pass."""
        return values if len(values) == 1 else values[self._rows_there]

    def tally(self, edit: int, positions: str | Tensor, span: tuple[int, int | None] | None) -> None:
        """Count the new positions that an edit was just made at, where these are known."""
        self.tallies.edited[edit] = self.tallies.edited.get(edit, 0) + self._located(positions, span)[1]

    def settled(self) -> Tallies:
        """All that was done, on the CPU."""
        edited = {number: made.cpu() for number, made in self.tallies.edited.items()}
        return replace(self.tallies, edited=edited, kinds=None if self._parts is None else self._parts.kinds())

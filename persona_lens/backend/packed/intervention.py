"""Edits and reads where a pass holds any tokens of any rows one behind another, as those of serving engines do.

The counterpart of `intervention` for batches without padding, whose rows begin, wait, are computed in parts, are thrown
out and computed again, and end as the engine sees fit. What a row brings does not depend on that: every position is
read once, and sums are exact, so that no order of additions shows.

Runs where the model runs, see `writing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from persona_lens.backend.intervention import TokenValues
from persona_lens.backend.packed.call import PackedCall
from persona_lens.backend.packed.parts import PackedParts
from persona_lens.backend.parts.masks import PARTS, part_of
from persona_lens.backend.writing import Writer, sinks_among

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
    from torch import Tensor


# Sums are of whole multiples of 2**-28, which a float64 adds exactly up to 2**25: in residuals of common size, far
# beyond any text. What is larger is added as exactly as a float64 does.
_STEPS = 2.0**28
_FURTHEST = 2**40  # no text goes so far


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
        self.first = self._there((at == 0).unsqueeze(1))
        self._of: dict[str, tuple[Tensor, Tensor]] = {}
        for kind, mask in (
            ("prompt", fresh & is_prompt),
            ("response", fresh & ~is_prompt & (at < stop)),
            ("last", fresh & (self._after == -1)),
        ):
            index = mask.nonzero().flatten()
            self._of[kind] = self._there(index), self._there(rows[index])
        self._without_ends(ids)
        if self._parts is not None:
            self._parts.begin_pass(rows, at, fresh, ids)
        self._of |= self._parts_of_response()
        self._where: dict[object, tuple[Tensor | None, Tensor]] = {}
        self._rows_there: Tensor | None = None

    def _without_ends(self, ids: Tensor) -> None:
        """Leave out ends of turns that were generated and what follows; there is a row beyond the last for them."""
        index, rows = self._of["response"]
        if len(self._ends) and len(index) and self._call.room:
            if self._over is None:
                self._over = torch.full(self._prompts.shape, _FURTHEST, device=self.device)
            at = self._there(self.at)[index]
            ends = at.masked_fill(~torch.isin(ids[index], self._ends.to(self.device)), _FURTHEST)
            self._over = self._over.scatter_reduce(0, rows, ends, "amin")
            self._of["response"] = index, rows.masked_fill(at >= self._over[rows], len(self._prompts))

    def _parts_of_response(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Thinking and answer; tokens of the other part are of the row beyond the last."""
        index, rows = self._of["response"]
        if self._parts is None:
            return {"answer": (index, rows)}
        here, nobody = self._parts.here[index], len(self._prompts)
        return {name: (index, rows.masked_fill(here != part, nobody)) for name, part in PARTS.items()}

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def of_kind(self, kind: str) -> tuple[Int[Tensor, " some"], Int[Tensor, " some"]]:
        """Places in this pass, and rows, of tokens that were not there before: ``prompt``, ``response``, ``last``.

        The row of tokens that end a response, and of those after them, is one beyond the last.
        """
        return self._of[kind]

    def everything(self) -> tuple[Int[Tensor, " some"], Int[Tensor, " some"], Int[Tensor, " some"]]:
        """Places, rows and positions of all of them."""
        places, rows = (torch.cat(parts) for parts in zip(self._of["prompt"], self._of["response"], strict=True))
        return places, rows, self._there(self.at)[places]

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
            self._where[key] = None if mask is None else self._there(mask.unsqueeze(1)), counts
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
        index = self._index(positions)
        inside = (self._after < 0) if positions == "prompt" else (index >= 0)
        return self._cut(inside, positions, span)

    def _cut(self, mask: Tensor, positions: str | Tensor, span: tuple[int, int | None] | None) -> Tensor:
        if span is None:
            return mask
        index, length, (start, stop) = self._index(positions), self._prompts[self.rows], span
        mask = mask & (index >= (start if start >= 0 else length + start))
        return mask if stop is None else mask & (index < (stop if stop >= 0 else length + stop))

    def _index(self, positions: str | Tensor) -> Int[Tensor, " tokens"]:
        """Number of each token among those of its row that are of a kind; negative before the first of them."""
        shift = {"response": 0, "answer": 0, "generating": 1}.get(positions) if isinstance(positions, str) else None
        return self.at if shift is None else self._after + shift

    def index(self, positions: str | Tensor) -> Int[Tensor, "tokens 1"]:
        """The same where the model runs."""
        if (part := self._part(positions)) is not None and self._parts is not None:
            return self._parts.index(part).unsqueeze(1)
        return self._there(self._index(positions).unsqueeze(1))

    def by_row(self, values: Float[Tensor, "rows 1"]) -> Float[Tensor, "tokens 1"]:
        """What an edit gives for each row, for each token of this pass."""
        if len(values) == 1:
            return values
        if self._rows_there is None:
            self._rows_there = self._there(self.rows)
        return values[self._rows_there]

    def tally(self, edit: int, positions: str | Tensor, span: tuple[int, int | None] | None) -> None:
        """Count the new positions that an edit was just made at, where these are known."""
        self.tallies.edited[edit] = self.tallies.edited.get(edit, 0) + self._located(positions, span)[1]

    def settled(self) -> Tallies:
        """All that was done, on the CPU."""
        edited = {number: made.cpu() for number, made in self.tallies.edited.items()}
        return replace(self.tallies, edited=edited, kinds=None if self._parts is None else self._parts.kinds())


class PackedIntervention:
    """Carries out a call: tell it of each pass, and give it each block's residual.

    Args:
        call: What to do.
    """

    def __init__(self, call: PackedCall) -> None:
        self.call = call
        self.masks = PackedMasks(call)
        self._edits = call.edits
        self._writer = Writer(call.edits)
        means = [read for read in call.reads if read["per_row"]]
        tokens = [read for read in call.reads if not read["per_row"]]
        rows = len(call.prompts)
        self._readers: list[_MeanReader | _TokenReader] = [_MeanReader(read, rows) for read in means]
        self._readers += map(_TokenReader, tokens)
        self._watcher = _TokenReader(call.watched) if call.watched is not None else None
        reading = (reader.layers for reader in self._all)
        self.layers = tuple(sorted(self._writer.layers.union(*reading)))
        self.masks.tallies.blocks = dict.fromkeys(self.layers, 0)

    def begin_pass(self, rows: Int[Tensor, " tokens"], at: Int[Tensor, " tokens"], ids: Int[Tensor, " tokens"]) -> None:
        """See `PackedMasks.begin_pass`."""
        self.masks.begin_pass(rows, at, ids)
        for reader in self._all:
            reader.begin_pass(self.masks)

    def block(self, layer: int, h: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """The output of block ``layer`` over this pass's tokens after its edits; reads are taken on the way."""
        sinks, packed = None, h.unsqueeze(1)
        if self._asks_for_sinks(layer):  # as edits find the residual, for reads too
            sinks = sinks_among(layer, packed, self.call.sink_limits, self.masks.first)
        if layer in self._writer.layers:
            written = self._writer.block(layer, packed, self.masks, sinks)
            h = h if written is packed else written.squeeze(1)  # the same where nothing is to be changed
        self.masks.tallies.blocks[layer] += len(h)
        for number in self._writer.at.get(layer, ()):
            self.masks.tally(number, self._edits[number]["positions"], self._edits[number]["span"])
        for reader in self._all:
            if layer in reader.layers:
                reader.take(layer, h, self.masks, sinks)
        return h

    def _asks_for_sinks(self, layer: int) -> bool:
        """Whether it depends on them what is done in this pass, as it does not in most: few have tokens of a prompt."""
        if layer in self._writer.leaving_out:
            return True
        means = (each for each in self._readers if isinstance(each, _MeanReader) and layer in each.layers)
        return any(each.leaves_out_sinks and each.has_tokens(self.masks) for each in means)

    @property
    def _all(self) -> list[_MeanReader | _TokenReader]:
        return self._readers if self._watcher is None else [*self._readers, self._watcher]

    def watched(self) -> dict[str, Tensor]:
        """What was watched since this was last asked, see `aligned`; empty for nothing, and where no layer is."""
        return {} if self._watcher is None else self._watcher.taken()

    def results(self) -> dict[str, dict[str, Tensor]]:
        """What the reads brought, by the name of their kind.

        Reductions of a row are under ``value``, with the tokens that they are of under ``counts``; the values of tokens
        are as `aligned` takes them.
        """
        return {reader.kind: reader.taken() for reader in self._readers}


class _MeanReader:
    """Exact sums of one reduction, on each layer's own device."""

    def __init__(self, read: dict[str, Any], rows: int) -> None:
        self.kind: str = read["kind"]
        self.layers: tuple[int, ...] = read["layers"]
        self.leaves_out_sinks = not read["sinks"]
        self._of = "last" if self.kind == "prompt_last" else self.kind.partition("_")[0]
        self._rows = rows
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}

    def begin_pass(self, masks: PackedMasks) -> None:
        if not self.leaves_out_sinks:
            self._count(-1, masks.of_kind(self._of)[1])

    def has_tokens(self, masks: PackedMasks) -> bool:
        """Whether there is anything to take in this pass."""
        return len(masks.of_kind(self._of)[0]) > 0

    def _count(self, layer: int, rows: Tensor) -> None:
        if layer not in self._counts:
            self._counts[layer] = torch.zeros(self._rows + 1, dtype=torch.long, device=rows.device)
        self._counts[layer].index_add_(0, rows, torch.ones_like(rows))

    def take(self, layer: int, h: Tensor, masks: PackedMasks, sinks: Tensor | None) -> None:
        if layer not in self._sums:
            width = 1 if self.kind == "response_norm" else h.shape[1]
            kind = torch.float32 if self._of == "last" else torch.float64
            self._sums[layer] = torch.zeros(self._rows + 1, width, dtype=kind, device=h.device)
        places, rows = masks.of_kind(self._of)
        if not len(places):
            return
        places, rows = places.to(h.device), rows.to(h.device)
        fresh = h if len(places) == len(h) else h[places]
        if self.kind == "response_norm":
            fresh = fresh.float().norm(dim=-1, keepdim=True)
        if self.leaves_out_sinks and sinks is not None:
            rows = rows.masked_fill(sinks[places, 0], self._rows)
            self._count(layer, rows)
        if self._of == "last":
            self._sums[layer][rows] = fresh.float()
        else:
            self._sums[layer].index_add_(0, rows, (fresh.double() * _STEPS).round_())

    def taken(self) -> dict[str, Tensor]:
        empty = torch.zeros(self._rows + 1, dtype=torch.long)
        counts = [self._counts.get(layer, self._counts.get(-1, empty)).cpu() for layer in self.layers]
        counted = torch.stack(counts, dim=1)[:-1]
        width = max((each.shape[1] for each in self._sums.values()), default=1)
        nothing = torch.zeros(self._rows + 1, width)
        values = []
        for number, layer in enumerate(self.layers):
            total = self._sums.get(layer, nothing)[:-1]
            tokens = counted[:, number, None].to(total.device)
            mean = total if self._of == "last" else total / _STEPS / tokens
            values.append(torch.where(tokens > 0, mean, torch.nan).float().cpu())  # a mean over nothing is NaN
        stacked = torch.stack(values, dim=1)
        return {"value": stacked.squeeze(-1) if self.kind == "response_norm" else stacked, "counts": counted}


class _TokenReader(TokenValues):
    """Its tokens are of whichever rows a pass holds."""

    def __init__(self, read: dict[str, Any]) -> None:
        super().__init__(read)
        self._whose: list[tuple[Tensor, Tensor]] = []

    def begin_pass(self, masks: PackedMasks) -> None:
        self._places, rows, at = masks.everything()
        self._whose.append((rows, at))

    def take(self, layer: int, h: Tensor, masks: PackedMasks, sinks: Tensor | None) -> None:
        self.keep(layer, h[self._places.to(h.device)])

    def taken(self) -> dict[str, Tensor]:
        # Nothing too where a block was skipped in some pass, or failed: values have no place then. The tallies tell.
        if not self._whose or any(len(kept) != len(self._whose) for kept in self._kept.values()):
            return {}
        rows, at = torch.stack([torch.cat(parts) for parts in zip(*self._whose, strict=True)]).cpu()
        layers = [torch.cat(kept) for kept in self._kept.values()]
        if self.kind == "activations":  # as much as may just fit once
            values = torch.stack([layer.cpu() for layer in layers], dim=1)
        else:  # for a watch this is asked at every step: the device is waited for once
            values = torch.stack([layer.to(layers[0].device) for layer in layers], dim=1).cpu()
        self._whose, self._kept = [], {layer: [] for layer in self.layers}
        return {"value": values, "rows": rows, "at": at}


def aligned(
    found: Mapping[str, Tensor], lengths: Sequence[int], k: int, n_layers: int
) -> Float[Tensor, "rows layers width k"]:
    """The values of tokens as a read brings them: padded on the left with NaN to those of the longest row.

    Args:
        found: ``value`` [tokens, layers, k], and each one's row and position, ``rows`` and ``at``; empty for none.
        lengths: Tokens of each row.
        k: Values of a token at each layer.
        n_layers: How many layers were read.
    """
    width = max(lengths)
    out = torch.full((len(lengths), n_layers, width, k), torch.nan)
    if found:
        length = torch.tensor([*lengths, 0])[found["rows"]]
        mine = found["at"] < length
        rows, at = found["rows"][mine], (width - length + found["at"])[mine]
        out[rows, :, at] = found["value"][mine]
    return out

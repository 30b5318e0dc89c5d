"""Edits and reads where a pass holds any tokens of any rows one behind another, as those of serving engines do.

The counterpart of `intervention` for batches without padding, whose rows begin, wait, are computed in parts, are thrown
out and computed again, and end as the engine sees fit. What a row brings does not depend on that: every position is
read once, and sums are exact, so that no order of additions shows.

Runs where the model runs, see `writing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from persona_lens.backend.intervention import TokenValues
from persona_lens.backend.packed.call import PackedCall
from persona_lens.backend.packed.masks import PackedMasks
from persona_lens.backend.writing import Writer, sinks_among

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


# Sums are of whole multiples of 2**-28, which a float64 adds exactly up to 2**25: in residuals of common size, far
# beyond any text. What is larger is added as exactly as a float64 does.
_STEPS = 2.0**28
NO_FLOAT64 = ("mps",)  # kinds of devices that have none, whose sums are made on the CPU


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
            device = torch.device("cpu") if h.device.type in NO_FLOAT64 else h.device
            self._sums[layer] = torch.zeros(self._rows + 1, width, dtype=kind, device=device)
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
        total = self._sums[layer]
        fresh, rows = fresh.to(total.device), rows.to(total.device)
        if self._of == "last":
            total[rows] = fresh.float()
        else:
            total.index_add_(0, rows, (fresh.double() * _STEPS).round_())

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

"""Carries out the edits and reads of one batch while a model runs over it, block by block.

This is the part that all adapters share. An adapter only has to call `Intervention.begin_pass` before each forward pass
and `Intervention.block` at each block's output, in whatever way its library lets it.

Runs where the model runs, see `writing`: edits and reads are held as plain data, and at run time the code uses nothing
but torch and `writing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from persona_lens.backend.parts.masks import part_of
from persona_lens.backend.writing import TokenMasks, Writer, sinks_among

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from persona_lens.backend.edits import Edit
    from persona_lens.backend.reads import Read
    from persona_lens.backend.streaming import Watcher
    from persona_lens.backend.tokens import PaddedTokens


class Intervention:
    """Edits and reads of one batch, with the state they need as a generation goes on.

    Args:
        tokens: The padded batch: existing text, or the prompts of a generation.
        edits: Applied in the order given where several meet at a layer.
        reads: Taken after the edits of the layer.
        n_layers: Number of blocks of the model.
        end_ids: Token ids that end a response; they are not part of it.
        max_new_tokens: Responses are read up to this many tokens, whatever the loop runs beyond.
        sink_limits: For each layer the length beyond which a residual is that of an attention sink, see
            `persona_lens.backend.sinks`; None takes the first token of each text alone for one.
        watcher: Told of every pass, after the edits; only where the model runs in this process.
        until: Layer after which passes over existing text are stopped; None where they run to the end.
    """

    def __init__(
        self,
        tokens: PaddedTokens,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
        *,
        n_layers: int,
        end_ids: Sequence[int] = (),
        max_new_tokens: int = 0,
        sink_limits: Sequence[float] | None = None,
        watcher: Watcher | None = None,
        until: int | None = None,
    ) -> None:
        self.masks = TokenMasks(tokens, end_ids, max_new_tokens)
        self._writer = Writer([_detached(edit.plain()) for edit in edits])
        self._readers = _readers([read.plain(n_layers) for read in reads])
        self._watcher = watcher
        self._watched = frozenset(watcher.layers if watcher is not None else ())
        reading = {layer for reader in self._readers for layer in reader.layers}
        leaving_out = (reader.layers for reader in self._readers if reader.leaves_out_sinks)
        self._leaving_out = self._writer.leaving_out.union(*leaving_out)
        of_new = (each.layers for each in self._readers if each.leaves_out_sinks and each.of_lengths)
        self._leaving_out_new = self._writer.leaving_out.union(*of_new)  # means leave out tokens of the prompt alone
        self._sink_limits = sink_limits
        self.read_or_edited = tuple(sorted(reading | self._writer.layers))
        self.only_watched = tuple(sorted(self._watched.difference(self.read_or_edited)))
        self.to_reach = tuple(layer for layer in self.layers if until is None or layer <= until)
        self._reached: set[int] | None = None  # in the pass that runs; None before the first
        self._missed: set[int] = set()

    @property
    def layers(self) -> tuple[int, ...]:
        """Where `block` has something to do, ascending."""
        return tuple(sorted(self.read_or_edited + self.only_watched))

    def begin_pass(self, ids: Int[Tensor, "batch window"]) -> None:
        """Tell which token ids the coming forward pass runs over (with a KV cache, only the newest)."""
        if self._reached is not None:
            self._missed.update(self.missed)
        self._reached = set()
        self.masks.begin_pass(ids)
        if self._watcher is not None:
            self._watcher.begin_pass(ids, self.masks)

    def block(self, layer: int, h: Float[Tensor, "batch window d_model"]) -> Float[Tensor, "batch window d_model"]:
        """The output of block ``layer`` after its edits; reads are taken on the way."""
        if self._reached is not None:
            self._reached.add(layer)
        sinks = None
        leaving_out = self._leaving_out_new if self.masks.decoding else self._leaving_out
        if layer in leaving_out:  # as the layer's edits find the residual, for its reads too
            sinks = sinks_among(layer, h, self._sink_limits, self.masks.first[:, -self.masks.window :])
        h = self._writer.block(layer, h, self.masks, sinks)
        for reader in self._readers:
            if layer in reader.layers:
                reader.take(layer, h, self.masks, sinks)
        if self._watcher is not None and layer in self._watched:
            self._watcher.take(layer, h, self.masks)
        return h

    @property
    def missed(self) -> tuple[int, ...]:
        """Layers that were to be read or edited and did not run in some pass, the last one included, ascending."""
        return tuple(sorted(self._missed | set(self.to_reach).difference(self._reached or ())))

    def results(self) -> dict[str, Tensor]:
        """What the reads brought, by the name of their kind; shapes as `Read` says."""
        if self.missed:  # whoever can say it in words asks first
            raise RuntimeError(f"layers that were to be read or edited never ran: {self.missed}")
        return {name: value for reader in self._readers for name, value in reader.result(self.masks).items()}


def _detached(edit: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in edit.items()}


def _readers(reads: Sequence[dict[str, Any]]) -> list[_MeanReader | _TokenReader]:
    """One reader for each read, but one for all means at the same layers: they share a pass over the residual."""
    means: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    for read in reads:
        if read["per_row"]:
            means.setdefault((read["layers"], read["kind"] == "response_norm"), []).append(read)
    return [*map(_MeanReader, means.values()), *(_TokenReader(read) for read in reads if not read["per_row"])]


class _MeanReader:
    """Sums in float32 of one or more means at the same layers, layer by layer, on the layer's own device.

    They are means of residuals, or of their lengths where the only one is ``response_norm``.
    """

    def __init__(self, reads: Sequence[dict[str, Any]]) -> None:
        self.kinds: tuple[str, ...] = tuple(read["kind"] for read in reads)
        self.layers: tuple[int, ...] = reads[0]["layers"]
        self.leaves_out_sinks = not all(read["sinks"] for read in reads)
        self.of_lengths = self.kinds == ("response_norm",)
        self._going_on = [index for index, kind in enumerate(self.kinds) if not kind.startswith("prompt")]
        self._whole = torch.tensor([read["sinks"] for read in reads]).reshape(1, -1, 1)
        self._newest: dict[int, Tensor] = {}
        self._generated: dict[int, Tensor] = {}  # of each kind that goes on, [batch, layers, d_model]
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}

    def take(
        self, layer: int, h: Float[Tensor, "batch window d_model"], masks: TokenMasks, sinks: Tensor | None
    ) -> None:
        if masks.decoding and not self._going_on:
            return
        so_far = self._sums.get(layer)
        if self.of_lengths and masks.decoding and so_far is not None:
            self._add_length(layer, so_far, h, masks, sinks)
            return
        if masks.decoding and so_far is not None:
            self._hold(layer, h, masks)
            return
        fresh = h[:, -masks.fresh :]
        if self.of_lengths:
            fresh = fresh.float().norm(dim=-1, keepdim=True)
        if masks.padded or masks.fresh == 1:
            # Padding is blanked, not only weighted by zero: what a model computes there may be NaN.
            padding = ~masks.attention[:, -masks.fresh :, None].to(h.device)
            fresh = fresh.to(torch.float32, copy=True).masked_fill_(padding, 0)
        fresh = fresh.float()
        weights = torch.stack([masks.mask(kind)[:, -masks.fresh :] for kind in self.kinds], dim=1).to(h.device)
        if self.leaves_out_sinks and sinks is not None:
            self._whole = self._whole.to(h.device)
            weights = weights & (self._whole | ~sinks[:, None, -masks.fresh :])
            counts = weights.sum(dim=2)
            self._counts[layer] = counts if so_far is None else self._counts[layer] + counts
        total = torch.bmm(weights.to(fresh.dtype), fresh)
        self._sums[layer] = total if so_far is None else so_far.add_(total)

    def _hold(self, layer: int, h: Float[Tensor, "batch 1 d_model"], masks: TokenMasks) -> None:
        """Count one newly generated token a row; at the last layer, since many small steps take longer than one."""
        self._newest[layer] = h
        if layer != self.layers[-1]:
            return
        newest, self._newest = self._newest, {}
        if len(newest) < len(self.layers):  # a block did not run, which is told in the end
            return
        together = torch.cat([newest[each].to(h.device) for each in self.layers], dim=1).float()
        together.masked_fill_(~masks.attention[:, -1:, None].to(h.device), 0)
        for index in self._going_on:
            kind, so_far = self.kinds[index], self._generated.get(index)
            if so_far is None:
                so_far = self._generated[index] = torch.zeros_like(together)
            if part_of(kind) is None:
                so_far += together
            else:
                so_far += together.masked_fill(~masks.mask(kind)[:, -1:, None].to(h.device), 0)

    def _add_length(self, layer: int, so_far: Tensor, h: Tensor, masks: TokenMasks, sinks: Tensor | None) -> None:
        """Count one newly generated token a row, in few steps: there is a call for every layer and token."""
        counted = masks.response[:, -1:].to(h.device)
        if self.leaves_out_sinks and sinks is not None:
            counted = counted & ~sinks[:, -1:]
            self._counts[layer] = self._counts[layer] + counted
        lengths = torch.linalg.vector_norm(h[:, -1:], dim=-1, dtype=torch.float32)
        so_far[:, 0] += torch.where(counted, lengths, 0.0)

    def result(self, masks: TokenMasks) -> dict[str, Float[Tensor, "batch layers ..."]]:
        sums = torch.stack([self._sums[layer].cpu() for layer in self.layers], dim=2)
        for index, generated in self._generated.items():
            sums[:, index] += generated.cpu()
        means = {}
        for index, kind in enumerate(self.kinds):
            counts = masks.mask(kind).sum(dim=1, keepdim=True).cpu()
            if not self._whole[0, index, 0]:
                counts = torch.stack([self._counts[layer][:, index].cpu() for layer in self.layers], dim=1)
            # A mean over nothing is NaN.
            mean = sums[:, index] / torch.where(counts > 0, counts.float(), torch.nan).unsqueeze(-1)
            means[kind] = mean.squeeze(-1) if self.of_lengths else mean
        return means


class TokenValues:
    """A value for every token: its projections, its residual's length, or all of its residual; kept by layer.

    Args:
        read: See `persona_lens.backend.reads.Read.plain`.
    """

    leaves_out_sinks = False

    def __init__(self, read: dict[str, Any]) -> None:
        self.kind: str = read["kind"]
        self.layers: tuple[int, ...] = read["layers"]
        units: list[Tensor] | None = read["units"]
        self._units = dict(zip(self.layers, units, strict=True)) if units is not None else {}
        self._kept: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

    def keep(self, layer: int, h: Float[Tensor, "*tokens d_model"]) -> None:
        """Keep the values of these residuals."""
        fresh = h.float()
        if self.kind == "norms":
            fresh = fresh.norm(dim=-1, keepdim=True)
        if self._units:
            unit = self._units[layer] = self._units[layer].to(h.device)
            fresh = fresh @ unit.T
        self._kept[layer].append(fresh)


class _TokenReader(TokenValues):
    of_lengths = False

    def take(
        self, layer: int, h: Float[Tensor, "batch window d_model"], masks: TokenMasks, sinks: Tensor | None
    ) -> None:
        self.keep(layer, h[:, -masks.fresh :])

    def result(self, masks: TokenMasks) -> dict[str, Tensor]:
        values = torch.stack([torch.cat(self._kept[layer], dim=1).cpu() for layer in self.layers], dim=1)
        aligned = aligned_right(values, masks.attention.cpu()[:, : values.shape[2]])
        return {self.kind: aligned.squeeze(-1) if self.kind == "norms" else aligned}


def aligned_right(
    values: Float[Tensor, "batch layers tokens k"], tokens: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch layers width k"]:
    """The values of each row's tokens, padded on the left with NaN to those of the longest row."""
    lengths = tokens.sum(dim=1).tolist()
    aligned = values.new_full((*values.shape[:2], max(lengths), values.shape[3]), torch.nan)
    for row, length in enumerate(lengths):
        aligned[row, :, aligned.shape[2] - length :] = values[row][:, tokens[row]]
    return aligned

"""From the blocks of a running model to the callback of a `Watch`: one pass at a time, and nothing kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.backend.blocks import require_reached
from persona_lens.backend.intervention import TokenMasks
from persona_lens.backend.tokens import TokenBatch, TokenIds
from persona_lens.backend.watching import StopGeneration, Watch, WatchedTokens, WatchError


class Listener:
    """Tells a callback of passes, and notes which rows it stops.

    Args:
        watch: Whom to tell.
        rows: Rows of the batch.
    """

    def __init__(self, watch: Watch, rows: int) -> None:
        self._on_tokens = watch.on_tokens
        self._stopped_at: list[int | None] = [None] * rows

    @property
    def stopped(self) -> Bool[Tensor, " batch"]:
        """True for rows that say no more."""
        return torch.tensor([step is not None for step in self._stopped_at])

    def tell(self, tokens: WatchedTokens) -> None:
        """Call back.

        Raises:
            WatchError: If a row is to be stopped that is not there.
        """
        try:
            self._on_tokens(tokens)
        except StopGeneration as stop:
            rows = range(len(self._stopped_at))
            for row in rows if stop.rows is None else stop.rows:
                if row not in rows:
                    raise WatchError(f"row {row} cannot be stopped: the batch has rows 0 to {len(rows) - 1}") from None
                if self._stopped_at[row] is None:
                    self._stopped_at[row] = tokens.step

    def cut(
        self, responses: Sequence[TokenIds], ended: Sequence[bool]
    ) -> tuple[tuple[TokenIds, ...], tuple[bool, ...]]:
        """The responses up to where they were stopped, and whether each ended by itself."""
        whole = [at is None or len(r) <= at for r, at in zip(responses, self._stopped_at, strict=True)]
        kept = tuple(r if w else r[:at] for r, w, at in zip(responses, whole, self._stopped_at, strict=True))
        return kept, tuple(w and e for w, e in zip(whole, ended, strict=True))


class Watcher:
    """Takes the projections of a pass layer by layer, and hands them over together.

    `Intervention` calls it at the blocks. The generation loop calls `deliver` after each pass, where it waits for the
    device anyway.

    Args:
        watch: What to watch, fit for the model.
        rows: Rows of the batch.
        n_layers: Number of blocks of the model.
    """

    def __init__(self, watch: Watch, rows: int, n_layers: int) -> None:
        self.layers = watch.read.resolved_layers(n_layers)
        self.listener = Listener(watch, rows)
        self._units = dict(zip(self.layers, watch.read.unit_directions(n_layers), strict=True))
        self._values: dict[int, Float[Tensor, "batch new k"]] = {}
        self._newest: list[Float[Tensor, "batch 1 d_model"]] = []
        self._together: Float[Tensor, "layers k d_model"] | None = None
        self._step = -1
        self._ids: Tensor | None = None
        self._masks: TokenMasks | None = None
        self._leaving: _Copies | None = None

    def begin_pass(self, ids: Int[Tensor, "batch window"], masks: TokenMasks) -> None:
        """Note which tokens the coming pass is about."""
        self._step += 1
        self._ids, self._masks = ids[:, -masks.fresh :], masks

    def take(self, layer: int, h: Float[Tensor, "batch window d_model"], masks: TokenMasks) -> None:
        """Take the values of a layer; at the last one all leave for the CPU in one transfer."""
        if masks.decoding:  # many small products take longer than one; until then a token a layer is held
            self._newest.append(h)
        else:
            unit = self._units[layer] = self._units[layer].to(h.device)
            self._values[layer] = h[:, -masks.fresh :].float() @ unit.T
        if layer == self.layers[-1]:
            assert self._ids is not None  # a pass has begun
            tokens = (masks.prompt[:, -masks.fresh :] | masks.response[:, -masks.fresh :]).to(h.device)
            values = self._projected(h.device).masked_fill(~tokens[:, None, :, None], torch.nan)
            self._leaving = _Copies(self._ids, values, tokens)

    def _projected(self, device: torch.device) -> Float[Tensor, "batch layers new k"]:
        """What was taken in this pass, which is forgotten."""
        if self._newest:
            newest = torch.cat([value.to(device) for value in self._newest], dim=1).float()
            self._newest = []
            if self._together is None:
                self._together = torch.stack([unit.to(device) for unit in self._units.values()])
            return torch.bmm(self._together, newest.permute(1, 2, 0)).permute(2, 0, 1).unsqueeze(2)
        values = torch.stack([value.to(device) for value in self._values.values()], dim=1)
        self._values = {}
        return values

    def deliver(self) -> Bool[Tensor, " batch"]:
        """Call back for the pass that has just run.

        Returns:
            True for rows that are to say no more, on the CPU.
        """
        if self._leaving is None or self._masks is None:
            require_reached(self.layers)
        assert self._leaving is not None
        assert self._masks is not None
        leaving, self._leaving = self._leaving, None
        # What a callback keeps is to be as any tensor, and what it computes as anywhere else.
        with torch.inference_mode(False):
            ids, values, tokens = (tensor.clone() for tensor in leaving.arrived())
            self.listener.tell(WatchedTokens(self._step, ids, values, ~tokens[:, -1]))
        stopped = self.listener.stopped
        if bool(stopped.any()):
            self._masks.stop(stopped)
        return stopped


class _Copies:
    """Tensors on their way to the CPU; a CUDA device need not be waited for before the next work is queued."""

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[-1].device
        self._there = [tensor.to("cpu", non_blocking=tensor.device.type == "cuda") for tensor in tensors]
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(device))

    def arrived(self) -> list[Tensor]:
        if self._done is not None:
            self._done.synchronize()
        return self._there


def replay(listener: Listener, text: TokenBatch, projections: Float[Tensor, "batch layers width k"]) -> None:
    """Tell of a generation that is over, pass by pass, as if it ran.

    Args:
        listener: Whom to tell.
        text: The prompts with the responses that were generated.
        projections: Every token's, as a read of that kind brings them.
    """
    prompt = max(map(len, text.prompts))
    batch, layers, width, k = projections.shape
    step = 0
    lengths = torch.tensor([len(response) for response in text.responses])
    while bool(((lengths >= step) & ~listener.stopped).any()):
        new = 1 if step else prompt
        ids = torch.zeros(batch, new, dtype=torch.long)
        values = projections.new_full((batch, layers, new, k), torch.nan)
        finished = (lengths < step) | listener.stopped
        for row in (~finished).nonzero().flatten().tolist():
            head, tail = text.prompts[row], text.responses[row]
            told = tail[step - 1 : step] if step else head
            first = width - len(head) - len(tail) + (len(head) + step - 1 if step else 0)
            ids[row, new - len(told) :] = torch.tensor(told)
            values[row, :, new - len(told) :] = projections[row, :, first : first + len(told)]
        listener.tell(WatchedTokens(step, ids, values, finished))
        step += 1


def joined(passes: Sequence[WatchedTokens]) -> Float[Tensor, "batch layers width k"]:
    """The values of all passes as a read of `PROJECTIONS` brings them: left-padded with NaN."""
    values = torch.cat([each.projections for each in passes], dim=2)
    tokens = ~values.isnan().all(dim=-1).all(dim=1)
    lengths = tokens.sum(dim=1).tolist()
    aligned = values.new_full((*values.shape[:2], max(lengths), values.shape[3]), torch.nan)
    for row, length in enumerate(lengths):
        aligned[row, :, aligned.shape[2] - length :] = values[row][:, tokens[row]]
    return aligned

"""`Watch`: what is told about every token while a batch is generated, and how blocks' outputs reach it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.backend.blocks import require_reached
from persona_lens.backend.edits import Edit
from persona_lens.backend.parts import Part, Parts
from persona_lens.backend.protocol import Backend, Generation
from persona_lens.backend.reads import Read
from persona_lens.backend.tokens import Sampling, TokenIds, TokenScore
from persona_lens.backend.writing import TokenMasks
from persona_lens.core.errors import PersonaLensError

SCORED_AT_ONCE = 256  # tokens; in float32, logits of a whole prompt can be gigabytes


class WatchError(PersonaLensError):
    """A generation that cannot be watched, or not in this way."""


class StopGeneration(Exception):  # noqa: N818 - nothing went wrong
    """Raised by a callback: the rows say no more.

    The response of such a row ends with the token that the callback was told of.

    Args:
        rows: Which rows of the batch; None stops all.
    """

    def __init__(self, rows: Iterable[int] | None = None) -> None:
        super().__init__(rows)
        self.rows = None if rows is None else tuple(rows)


@dataclass(frozen=True, eq=False)
class WatchedTokens:
    """The tokens of one forward pass. All tensors are on the CPU.

    Attributes:
        step: 0 for the prompts; then i for the i-th token of each response.
        ids: int64 [batch, new]: the prompts, left-padded, at step 0; afterwards one token a row.
        projections: float32 [batch, L, new, k], in residual-stream units, after the edits: the value of a token is that
            of the residual at the token's own position. NaN at padding and in rows that have finished.
        finished: bool [batch], True for a row whose response ended before this pass.
        scores: How likely each row's token was, and what else was, where the watch asks for it; None at step 0, and
            for rows that have finished.
        parts: What each row's token is, thinking or answer, where the watch says how to tell; likewise.
    """

    step: int
    ids: Int[Tensor, "batch new"]
    projections: Float[Tensor, "batch layers new k"]
    finished: Bool[Tensor, " batch"]
    scores: tuple[TokenScore | None, ...] | None = None
    parts: tuple[Part | None, ...] | None = None


def token_scores(logits: Float[Tensor, "tokens vocab"], ids: Sequence[int], top: int) -> list[TokenScore]:
    """How likely tokens were.

    Args:
        logits: For each token those at the one before it, of any precision.
        ids: The tokens.
        top: How many of the likeliest to tell at each place.
    """
    found = []
    for start in range(0, len(ids), SCORED_AT_ONCE):
        some = list(ids[start : start + SCORED_AT_ONCE])
        logprobs = logits[start : start + len(some)].float().log_softmax(dim=-1)
        chosen = logprobs.gather(-1, torch.tensor(some, device=logprobs.device).unsqueeze(-1)).squeeze(-1)
        likeliest = logprobs.topk(top)
        values = zip(some, chosen.tolist(), likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        found += [TokenScore(token, own, tuple(likely), tuple(theirs)) for token, own, likely, theirs in values]
    return found


@dataclass(frozen=True, eq=False)
class Watch:
    """Projections of every token as it is generated, told at once and kept nowhere.

    Attributes:
        directions: float [k, d_model], used at every layer, or [layers, k, d_model]; made unit vectors.
        on_tokens: Called after every forward pass, in the order of the passes. It may raise `StopGeneration`; any other
            error ends the generation and comes out as it is. It must not run the same backend.
        layers: Block indices, 0-based, ascending; None watches every layer.
        top: Also tell how likely each token was, with so many of the likeliest at its place; None does not. Backends
            whose calls run together can, see `persona_lens.backend.continuous`.
        top_of_prompts: With ``top``: tell it of the prompts' tokens too, once all is generated, see `Generation`.
        parts: What tells thinking from answer, where that is wanted of each token: `Parts.of` the model's tokenizer.

    Raises:
        ReadError: If layers are not ascending.
        WatchError: If ``top`` is negative, or missing where it is wanted of prompts.
    """

    directions: Float[Tensor, "k d_model"] | Float[Tensor, "layers k d_model"]
    on_tokens: Callable[[WatchedTokens], None]
    layers: tuple[int, ...] | None = None
    top: int | None = None
    top_of_prompts: bool = False
    parts: Parts | None = None

    def __post_init__(self) -> None:
        assert self.read  # raises for layers that cannot be
        if self.top is not None and self.top < 0:
            raise WatchError(f"the likeliest tokens to tell of are 0 or more, got {self.top}")
        if self.top_of_prompts and self.top is None:
            raise WatchError("say how many of the likeliest tokens to tell of prompts: top=0 or more")

    def refuse_top(self) -> None:
        """Raise `WatchError` if it asks for what only backends can tell whose calls run together."""
        if self.top is not None:
            raise WatchError(
                "this backend does not tell how likely tokens were while it generates; wrap it in "
                "persona_lens.backend.continuous(backend), or score the finished text with forward(..., logprobs=True)"
            )

    @property
    def read(self) -> Read:
        """The read that brings the same values once a text is finished."""
        return Read.projections(self.directions, self.layers)


@runtime_checkable
class WatchableBackend(Backend, Protocol):
    """A backend whose generations can be watched. Backends need not; those of this package all are."""

    def generate_watched(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Watch,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """As `Backend.generate`, calling back after every forward pass, the last token of each response included.

        Nothing is stored on the way. A row that the callback stopped counts as not ended. Where the model runs on
        another machine the callback is told everything once the result is here: a stop then shortens the response,
        while reads are of all that was generated.
        """
        ...


def watched_generation(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    watch: Watch,
    edits: Sequence[Edit] = (),
    reads: Sequence[Read] = (),
) -> Generation:
    """`WatchableBackend.generate_watched` of any backend.

    Raises:
        WatchError: If the backend cannot be watched.
    """
    if not isinstance(backend, WatchableBackend):
        raise WatchError(
            f"the backend {backend.info.backend!r} cannot be watched while it generates (it has no generate_watched); "
            "read the finished text with forward() and Read.projections, or open the model with another backend"
        )
    return backend.generate_watched(prompts, sampling, watch, edits, reads)


class Listener:
    """Tells a callback of passes, and notes which rows it stops.

    Args:
        watch: Whom to tell.
        prompts: The batch's prompts.
    """

    def __init__(self, watch: Watch, prompts: Sequence[Sequence[int]]) -> None:
        self._on_tokens, self._parts = watch.on_tokens, watch.parts
        self._stopped_at: list[int | None] = [None] * len(prompts)
        self._states = [] if self._parts is None else [self._parts.after(prompt) for prompt in prompts]

    @property
    def stopped(self) -> Bool[Tensor, " batch"]:
        """True for rows that say no more."""
        return torch.tensor(self.are_stopped)

    @property
    def are_stopped(self) -> list[bool]:
        """The same row by row."""
        return [step is not None for step in self._stopped_at]

    def tell(self, tokens: WatchedTokens) -> None:
        """Call back.

        Raises:
            WatchError: If a row is to be stopped that is not there.
        """
        tokens = replace(tokens, parts=self._parts_of(tokens)) if self._states and tokens.step else tokens
        try:
            self._on_tokens(tokens)
        except StopGeneration as stop:
            rows = range(len(self._stopped_at))
            for row in rows if stop.rows is None else stop.rows:
                if row not in rows:
                    raise WatchError(f"row {row} cannot be stopped: the batch has rows 0 to {len(rows) - 1}") from None
                if self._stopped_at[row] is None:
                    self._stopped_at[row] = tokens.step

    def _parts_of(self, tokens: WatchedTokens) -> tuple[Part | None, ...]:
        """What the newest tokens are."""
        assert self._parts is not None
        found: list[Part | None] = []
        for row, over in enumerate(tokens.finished.tolist()):
            part = None
            if not over:
                self._states[row], part = self._parts.step(self._states[row], int(tokens.ids[row, -1]))
            found.append(part)
        return tuple(found)

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
        prompts: The batch's prompts.
        n_layers: Number of blocks of the model.
    """

    def __init__(self, watch: Watch, prompts: Sequence[Sequence[int]], n_layers: int) -> None:
        self.layers = watch.read.resolved_layers(n_layers)
        self.listener = Listener(watch, prompts)
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
            self._leaving = _Copies(self._ids.to(h.device), values, tokens)  # one device to wait for

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
    """Tensors of one device on their way to the CPU; if it is CUDA's it is waited for when they are needed."""

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

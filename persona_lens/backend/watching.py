"""`Watch`: what to be told about every token while a batch is generated, and the way to stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.backend.edits import Edit
from persona_lens.backend.protocol import Backend, Generation
from persona_lens.backend.reads import Read
from persona_lens.backend.tokens import Sampling
from persona_lens.errors import PersonaLensError


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
    """

    step: int
    ids: Int[Tensor, "batch new"]
    projections: Float[Tensor, "batch layers new k"]
    finished: Bool[Tensor, " batch"]


@dataclass(frozen=True, eq=False)
class Watch:
    """Projections of every token as it is generated, told at once and kept nowhere.

    Attributes:
        directions: float [k, d_model], used at every layer, or [layers, k, d_model]; made unit vectors.
        on_tokens: Called after every forward pass, in the order of the passes. It may raise `StopGeneration`; any other
            error ends the generation and comes out as it is. It must not run the same backend.
        layers: Block indices, 0-based, ascending; None watches every layer.

    Raises:
        ReadError: If layers are not ascending.
    """

    directions: Float[Tensor, "k d_model"] | Float[Tensor, "layers k d_model"]
    on_tokens: Callable[[WatchedTokens], None]
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert self.read  # raises for layers that cannot be

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

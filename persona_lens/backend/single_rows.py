"""Backends that run on another one: row by row, where batches, padding or caches do not give what a row alone gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum
from itertools import cycle, islice
from typing import Any

import torch

from persona_lens.backend.arrivals import WatchedByReplay
from persona_lens.backend.batches import SHORTEST_BEGINNING, context_length
from persona_lens.backend.blocks import (
    ModuleBackend,
    UnsupportedModelError,
    base_weights_of,
    module_of,
    vocabulary_size,
)
from persona_lens.backend.edits import Edit, edits_of_rows
from persona_lens.backend.protocol import Backend, ForwardResult, Generation, ModelInfo
from persona_lens.backend.reads import Read, ReadKind
from persona_lens.backend.sinks import sink_limits
from persona_lens.backend.tokens import Sampling, TokenBatch, TokenIds
from persona_lens.core.errors import PersonaLensError, first_line
from persona_lens.core.progress import note


@dataclass(frozen=True)
class LongTexts:
    """Texts on which all that a backend may do to be fast happens.

    Attributes:
        alike: Two prompts of unequal length that begin alike, each with two responses of unequal length.
        unlike: Of unequal lengths, some of them longer than a window.
    """

    alike: TokenBatch
    unlike: TokenBatch

    @staticmethod
    def of(ids: Sequence[int], longer_than: int = 0) -> LongTexts:
        """Texts made of these ids, longer than so many tokens."""
        length = max(SHORTEST_BEGINNING, longer_than) + 1
        beginning, further = _taken(ids, 0, length), _taken(ids, 3, 16)
        prompts = beginning + further[:13], beginning + further[5:6]
        responses = further[2:4], further[1:6]
        alike = [(p, r) for p in prompts for r in responses]
        unlike = [(further[:3], beginning), (beginning, further[:2]), (further[:1], further[2:7])]
        return LongTexts(*(TokenBatch.of(*zip(*rows, strict=True)) for rows in (alike, unlike)))


def _taken(ids: Sequence[int], start: int, length: int) -> TokenIds:
    return tuple(islice(cycle(ids), start, start + length))


IDS = range(5, 24)  # as good as any
NEW = 2  # tokens
LAYERS = 8  # the first of a model; kinds of layers take turns in fewer, and what goes wrong does so in the first
# Of a residual's length, at the layer in the middle of all errors. What a model does with padding or a cache that it is
# not made for is a tenth of it or more; in 16 bits rounding alone may send a token to another expert.
TOLERANCE = {"float32": 1e-2, "float64": 1e-2}
TOLERANCE_16_BITS = 2e-1


class Way(Enum):
    """How a model's rows may run."""

    TOGETHER = "in batches"
    ALONE = "row by row"
    UNCACHED = "row by row and without a cache"


_known: dict[tuple[str, ...], Way] = {}  # it is the architecture that decides, so that one of its models is enough


def sound(backend: Backend) -> Backend:
    """The backend itself where its batches are right; otherwise one that runs row by row, and a note that says so.

    A model on another machine is taken as it is.

    Raises:
        UnsupportedModelError: If a row by itself cannot be read, or does not give while it is generated what it gives
            once it is finished.
    """
    if not isinstance(backend, Backend) or backend.info.remote:
        return backend
    room = context_length(backend)
    if room is not None and room < 2 * SHORTEST_BEGINNING:
        return backend
    info, config = backend.info, ""
    if isinstance(backend, ModuleBackend):
        module: Any = backend.module
        config = module.config.to_json_string() + str(getattr(module.config, "_attn_implementation", ""))
    key = (info.backend, info.architecture, info.dtype, info.device.partition(":")[0], config)
    if key not in _known or not config:
        _known[key] = _way(backend)
    if _known[key] is Way.TOGETHER:
        return backend
    note(
        f"batches or caches of {info.architecture} do not give what its rows give alone, so {info.model} runs "
        f"{_known[key].value}: the results are right, and slow"
    )
    return SingleRowsBackend(backend, cached=_known[key] is Way.ALONE)


def _way(backend: Backend) -> Way:
    size = vocabulary_size(backend.module) if isinstance(backend, ModuleBackend) else IDS.stop
    texts = LongTexts.of([token % size for token in IDS])
    tolerance = TOLERANCE.get(backend.info.dtype, TOLERANCE_16_BITS)

    def holds(error_of: Callable[[Backend, TokenBatch], float], backend: Backend, text: TokenBatch) -> bool:
        try:
            return error_of(backend, text) <= tolerance
        except Exception:  # noqa: BLE001 - of models' own code; the next way is tried
            return False

    if holds(_batch_error, backend, texts.alike) and holds(_generating_error, backend, texts.unlike):
        return Way.TOGETHER
    if holds(_generating_error, SingleRowsBackend(backend, cached=True), texts.unlike):
        return Way.ALONE
    try:
        uncached = _generating_error(SingleRowsBackend(backend, cached=False), texts.unlike)
    except PersonaLensError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{backend.info.architecture} cannot be read here: {first_line(error)}; use a model of another architecture"
        ) from error
    if not uncached <= tolerance:  # no number is no agreement either
        raise UnsupportedModelError(
            f"{backend.info.architecture} does not give while it generates what it gives for the finished text, not "
            "even row by row; use a model of another architecture"
        )
    return Way.UNCACHED


def _batch_error(backend: Backend, text: TokenBatch) -> float:
    """Largest error of a row of a batch, of those that stand first and last in it."""
    reads = _reads(backend)[:1]
    together = backend.forward(text, reads=reads).reads
    last = len(text) - 1
    return max(
        _error(together["response_mean"][row], backend.forward(text.rows(row, row + 1), reads=reads).reads)
        for row in (0, last)
    )


def _generating_error(backend: Backend, text: TokenBatch) -> float:
    """Largest error of a row's reads while a padded batch is generated, against the finished text of that row alone."""
    reads = _reads(backend)
    found = backend.generate(text.prompts, Sampling(NEW), reads=reads)
    errors = [0.0]
    for row, (prompt, response) in enumerate(zip(text.prompts, found.responses, strict=True)):
        alone = backend.forward(TokenBatch.of([prompt], [response]), reads=reads).reads
        errors += [_error(found.reads[read.kind][row], {read.kind: alone[read.kind]}) for read in reads]
    return max(errors)


def _reads(backend: Backend) -> tuple[Read, ...]:
    layers = tuple(range(min(LAYERS, backend.info.n_layers)))
    return Read(ReadKind.RESPONSE_MEAN, layers), Read(ReadKind.PROMPT_LAST, layers)


def _error(measured: torch.Tensor, alone: Mapping[str, torch.Tensor]) -> float:
    """The error of a row relative to its residual's length, at the layer in the middle of all."""
    (expected,) = (value[0] for value in alone.values())
    errors = (measured - expected).norm(dim=-1) / expected.norm(dim=-1)
    return 0.0 if bool(expected.isnan().any()) else float(errors.median())


class DelegatingBackend:
    """Says of its model what another backend says; calls are left to those who derive from it.

    Prompts are not shared: every row is computed whole.

    Args:
        inner: The other backend.
    """

    shares_prompts = False

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.tokenizer, self.end_ids, self.calls_at_once = inner.tokenizer, inner.end_ids, inner.calls_at_once
        self.context_length, self.base_weights = context_length(inner), base_weights_of(inner)

    @property
    def sink_limits(self) -> tuple[float, ...] | None:
        """See `persona_lens.backend.sinks.sink_limits`."""
        return sink_limits(self.inner)


class SingleRowsBackend(WatchedByReplay, DelegatingBackend):
    """A backend that runs every row of a batch by itself, which no padding reaches.

    Args:
        inner: What runs the rows.
        cached: Whether a generation may keep what a row's earlier tokens left; where not it runs over the whole text
            for every token.
    """

    watched_as = "a model that runs row by row"

    def __init__(self, inner: Backend, *, cached: bool) -> None:
        super().__init__(inner)
        self.cached = cached

    @property
    def info(self) -> ModelInfo:
        """The model, with the way it runs in the name of the backend."""
        plain = self.inner.info
        return replace(plain, backend=f"{plain.backend}, single rows{'' if self.cached else ' without a cache'}")

    @property
    def module(self) -> Any:
        """See `persona_lens.backend.blocks`."""
        return module_of(self.inner)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `Backend.generate`."""
        sampling.check_rows(len(prompts))
        if not self.cached:
            sampling = replace(sampling, use_cache=False)
        lengths = [len(prompt) for prompt in prompts]
        return Generation.joined(
            self.inner.generate([prompt], sampling.rows(i, i + 1), edits_of_rows(edits, i, i + 1, lengths), reads)
            for i, prompt in enumerate(TokenBatch.of(prompts).prompts)
        )

    def forward(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        """See `Backend.forward`."""
        return ForwardResult.joined(
            self.inner.forward(row, edits_of_rows(edits, i, i + 1, tokens.lengths), reads, logprobs=logprobs)
            for i, row in enumerate(tokens.rows(i, i + 1) for i in range(len(tokens)))
        )

    def editing(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """See `Backend.editing`."""
        return self.inner.editing(edits)

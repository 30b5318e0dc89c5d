"""Whether a model may run in batches: a few short passes at opening, of the ways that differ from a row by itself."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from persona_lens.backend.blocks import UnsupportedModelError, vocabulary_size
from persona_lens.backend.context import context_length
from persona_lens.backend.long_texts import LongTexts
from persona_lens.backend.module import ModuleBackend
from persona_lens.backend.protocol import Backend
from persona_lens.backend.reads import Read, ReadKind
from persona_lens.backend.shared_prompts import SHORTEST_BEGINNING
from persona_lens.backend.single_rows import SingleRowsBackend
from persona_lens.backend.tokens import Sampling, TokenBatch
from persona_lens.errors import PersonaLensError, first_line
from persona_lens.notes import note

IDS = range(5, 24)  # as good as any
NEW = 3  # tokens
LAYERS = 12  # the first of a model; kinds of layers take turns in fewer, and what goes wrong does so in the first
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
    if _holds(backend, texts):
        return Way.TOGETHER
    if _generates(SingleRowsBackend(backend, cached=True), texts):
        return Way.ALONE
    try:
        uncached = _generating_error(SingleRowsBackend(backend, cached=False), texts.unlike)
    except PersonaLensError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{backend.info.architecture} cannot be read here: {first_line(error)}; use a model of another architecture"
        ) from error
    if not uncached <= _tolerance(backend):  # no number is no agreement either
        raise UnsupportedModelError(
            f"{backend.info.architecture} does not give while it generates what it gives for the finished text, not "
            "even row by row; use a model of another architecture"
        )
    return Way.UNCACHED


def _tolerance(backend: Backend) -> float:
    return TOLERANCE.get(backend.info.dtype, TOLERANCE_16_BITS)


def _holds(backend: Backend, texts: LongTexts) -> bool:
    try:
        beginning = _batch_error(backend, texts.alike)
    except Exception:  # noqa: BLE001 - of models' own code; a row by itself is tried next
        return False
    return beginning <= _tolerance(backend) and _generates(backend, texts)


def _generates(backend: Backend, texts: LongTexts) -> bool:
    try:
        return _generating_error(backend, texts.unlike) <= _tolerance(backend)
    except Exception:  # noqa: BLE001 - as above
        return False


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

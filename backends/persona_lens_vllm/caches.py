"""What cached keys and values depend on beside tokens: the edits that they were computed under."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from persona_lens.backend import Edit, Positions, Span, TokenBatch


def cache_keys(edits: Sequence[Edit], tokens: TokenBatch) -> list[str]:
    """For each row, what its keys and values depend on beside its tokens; empty where that is nothing."""
    if not edits:
        return [""] * len(tokens)
    shared, own = hashlib.sha256(), [hashlib.sha256() for _ in tokens.prompts]
    for edit in edits:
        varying: dict[str, Any] = {}
        for row, digest in enumerate(own):
            if isinstance(edit.coefficient, Tensor):
                varying["coefficient"] = 0.0
                digest.update(f"{float(edit.coefficient[row])!r};".encode())
            if isinstance(edit.positions, Tensor):
                varying["positions"] = Positions.ALL
                digest.update(bytes(edit.positions[row, -tokens.lengths[row] :].tolist()))
            kind = edit.positions.kind if isinstance(edit.positions, Span) else edit.positions
            if isinstance(kind, Tensor) or kind is not Positions.ALL:
                digest.update(f"{len(tokens.prompts[row])};".encode())
        shared.update(replace(edit, **varying).content_hash.encode())
    return [hashlib.sha256(shared.digest() + digest.digest()).hexdigest() for digest in own]


class Caches:
    """What each block of the cache of keys and values was computed under.

    vLLM finds a cached beginning by its tokens and a salt. That nobody goes on from one that was steered otherwise is
    checked here, by what was really written where.
    """

    def __init__(self, runner: Any) -> None:
        self._on = bool(runner.cache_config.enable_prefix_caching)
        groups = runner.kv_cache_config.kv_cache_groups if self._on else ()
        self._sizes = [group.kv_cache_spec.block_size for group in groups]
        blocks = runner.kv_cache_config.num_blocks
        self._of = [np.zeros(blocks, dtype=np.int64) for _ in groups]
        self._numbers: dict[str, int] = {"": 0}
        self._next: dict[str, int] = {}
        self._requests = runner.requests

    def follows(self, request: str, blocks: Sequence[Sequence[int]], cache: str, done: int, new: int) -> bool:
        """Note that a request's next tokens are computed; False where those before were computed under something else.

        Args:
            request: Its id.
            blocks: Its blocks, for each group.
            cache: What its keys and values depend on beside its tokens.
            done: Its tokens that are in the cache.
            new: Its tokens that are computed now.
        """
        if not self._on:
            return True
        number = self._numbers.setdefault(cache, len(self._numbers))
        right = True
        for of, size, mine in zip(self._of, self._sizes, blocks, strict=True):
            if self._next.get(request, 0) != done:  # it comes from somebody else's cache, or its own of before
                before = np.asarray(mine[: done // size], dtype=np.int64)
                right &= bool(np.isin(of[before[before > 0]], number).all())
            of[np.asarray(mine[done // size : -(-(done + new) // size)], dtype=np.int64)] = number
        self._next[request] = done + new
        if len(self._next) > 2 * len(self._requests) + 1024:
            self._next = {each: at for each, at in self._next.items() if each in self._requests}
        return right

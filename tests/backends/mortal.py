"""A backend that fails in the ways that workers may; a module by itself, since Ray's processes import it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from persona_lens.backend import BackendSpec, Edit, ForwardResult, Generation, Read, Sampling, TokenBatch, open_backend
from persona_lens.backend.single_rows import DelegatingBackend

TRIALS = 7  # calls of `persona_lens.backend.single_rows.sound`


class MortalBackend(DelegatingBackend):
    """The transformers backend, as one that fails.

    Args:
        model: A folder.
        dies: A file: the first process to find none in a call, behind those that try the model, makes it and is killed.
        room: Rows beyond which memory runs out.
        first: A file: a process that finds one has another model.
        at_once: Calls that it takes at once.
    """

    def __init__(
        self, model: str, *, dies: str = "", room: int = 1000, first: str = "", at_once: int = 1, dtype: str = "float32"
    ) -> None:
        super().__init__(open_backend("transformers", model, dtype=dtype, device="cpu"))
        self.shares_prompts = self.inner.shares_prompts
        self.info = self.inner.info
        self.calls_at_once = at_once
        self._dies, self._room, self._calls = dies, room, 0
        self._lock, self._running, self.most = threading.Lock(), 0, 0
        if first and not _is_first(first):
            self.info = replace(self.info, weights=f"sha256:{0:064}")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        self._may_fail(len(prompts))
        return self.inner.generate(prompts, sampling, edits, reads)

    def forward(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        self._may_fail(len(tokens))
        return self.inner.forward(tokens, edits, reads, logprobs=logprobs)

    def editing(self, edits: Sequence[Edit]) -> Any:
        return self.inner.editing(edits)

    def wait(self) -> int:
        """How many of these calls have run at the same time at most."""
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        time.sleep(0.2)
        with self._lock:
            self._running -= 1
        return self.most

    def _may_fail(self, rows: int) -> None:
        self._calls += 1
        if self._dies and self._calls > TRIALS and _is_first(self._dies):
            os.kill(os.getpid(), signal.SIGKILL)
        if rows > self._room:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {rows} rows")


def waiting(backend: Any) -> Callable[[], int]:
    """Its `wait`, which is no part of what backends have in common."""
    wait: Callable[[], int] = backend.wait
    return wait


def _is_first(file: str) -> bool:
    try:
        Path(file).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


SPEC = BackendSpec(
    "mortal", "one that fails", (), "", MortalBackend, lambda model: False, lambda model, tokenizer: model
)

"""`Worker`: what runs in a process of a Ray cluster: it opens models, and runs calls of them."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from persona_lens.backend.batches import context_length, is_out_of_memory
from persona_lens.backend.blocks import base_weights_of
from persona_lens.backend.protocol import Backend, BackendError, ModelInfo
from persona_lens.backend.registry import open_backend
from persona_lens.core.progress import PersonaLensNote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Make: TypeAlias = Callable[[Backend], Callable[..., Any]]
"""What makes something of a worker's own model that can be called."""


@dataclass(frozen=True)
class Opening:
    """How workers open a model; plain values, which travel.

    Attributes:
        key: Tells it from the others that they have open.
        backend: Name of the backend.
        model: Hub id, folder, or embedded name; the same on every machine.
        options: The backend's own.
        wanted: What they must find; None where that is not known yet.
    """

    key: str
    backend: str
    model: str
    options: Mapping[str, Any]
    wanted: ModelInfo | None = None

    def check(self, found: ModelInfo) -> None:
        """Raise unless a model is the one that is wanted, and runs as it does.

        Raises:
            BackendError: Saying what differs.
        """
        if self.wanted is None:
            return
        different = self.wanted.differences(found)
        for name in ("dtype", "device"):
            one, other = (getattr(info, name).partition(":")[0] for info in (self.wanted, found))
            if one != other:
                different.append(f"{name}: {one} and {other}")
        if different:
            raise BackendError(
                f"a worker found another model under the name {self.model} ({'; '.join(different)}); give every "
                "machine the same files, and name dtype and device where machines differ"
            )


@dataclass(frozen=True)
class Facts:
    """What a worker says of a model; by the names of `Backend`, and of what a backend may say beside.

    Attributes:
        tokenizer: None unless it was asked for.
        notes: What was said while the model was opened.
    """

    info: ModelInfo
    tokenizer: PreTrainedTokenizerBase | None
    end_ids: tuple[int, ...]
    shares_prompts: bool
    calls_at_once: int
    context_length: int | None
    base_weights: str | None
    notes: tuple[str, ...]


class _Open:
    """A model that is open, and what was made of it."""

    def __init__(self, opening: Opening) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", PersonaLensNote)
            self.backend = open_backend(opening.backend, opening.model, **opening.options)
        opening.check(self.backend.info)
        self.notes = tuple(str(each.message) for each in said if issubclass(each.category, PersonaLensNote))
        self.turns = BoundedSemaphore(self.backend.calls_at_once)
        self.made: dict[str, Callable[..., Any]] = {}


class Worker:
    """Opens a model when it first hears of it, as it does once more where its process had to be started again.

    Args:
        threads: How many torch uses.
        folder: Where the command runs, if this machine has it too: names of models and files may be relative.
    """

    def __init__(self, threads: int, folder: str) -> None:
        with suppress(OSError):
            os.chdir(folder)
        torch.set_num_threads(threads)
        self._models: dict[str, _Open] = {}
        self._lock = Lock()  # calls come from several threads

    def is_there(self) -> bool:
        """True: the process has a place in the cluster."""
        return True

    def facts(self, opening: Opening, *, tokenizer: bool) -> Facts:
        """What there is to know of a model.

        Args:
            opening: The model.
            tokenizer: Whether to send its tokenizer.
        """
        opened = self._opened(opening)
        backend = opened.backend
        return Facts(
            backend.info,
            backend.tokenizer if tokenizer else None,
            backend.end_ids,
            backend.shares_prompts,
            backend.calls_at_once,
            context_length(backend),
            base_weights_of(backend),
            opened.notes,
        )

    def call(self, opening: Opening, method: str, given: Sequence[Any], how: Mapping[str, Any]) -> Any:
        """A method of the backend."""
        opened = self._opened(opening)
        return _run(opened, lambda: getattr(opened.backend, method)(*given, **how))

    def call_made(self, opening: Opening, key: str, make: Sequence[Any], given: Sequence[Any]) -> Any:
        """What was made of the model.

        Args:
            opening: The model.
            key: Tells what is made from other things.
            make: A reference to what makes it, a `Make`, which is fetched once.
            given: What it is called with.
        """
        import ray

        opened = self._opened(opening)
        with self._lock:
            if key not in opened.made:
                opened.made[key] = ray.get(make[0])(opened.backend)
        return _run(opened, lambda: opened.made[key](*given))

    def forget(self, key: str) -> None:
        """Let a model go."""
        self._models.pop(key, None)
        gc.collect()
        _empty_cache()

    def _opened(self, opening: Opening) -> _Open:
        with self._lock:
            if opening.key not in self._models:
                self._models[opening.key] = _Open(opening)
            return self._models[opening.key]


def _run(opened: _Open, call: Callable[[], Any]) -> Any:
    """Run a call, no more of them at once than the backend takes."""
    with opened.turns:
        try:
            return call()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = error.with_traceback(None)
            failed.__cause__ = failed.__context__ = None
        # Outside the handler, and without the frames that kept the failed call's tensors alive.
        _empty_cache()
        raise failed


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

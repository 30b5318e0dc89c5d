"""How fast a model is here, by short measurements: while it answers and reads, while it is trained, and afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from persona_lens.backend import Backend, Sampling, TokenBatch
from persona_lens.backend.blocks import ModuleBackend
from persona_lens.core.documents import Record
from persona_lens.finetuning import FinetuneConfig
from persona_lens.finetuning.run import trainable
from persona_lens.models import ChatFormat, load

ROWS, NEW_TOKENS = 16, 24
LEARNED = 4  # rows of a step
AUTO = "auto"


@dataclass(frozen=True)
class Speed(Record):
    """Tokens a second, measured.

    Attributes:
        generated: Prompts and responses together, while the model generates.
        read: While it reads responses behind their prompts, as judges do.
        seconds: What the measurement took.
        rows: Rows it was taken on.
    """

    generated: float
    read: float
    seconds: float
    rows: int


@dataclass(frozen=True)
class Learning(Record):
    """Tokens a second in training, measured on an adapter of the usual size.

    Attributes:
        trained: Of steps forwards and back.
        read: Of passes that take the loss.
        slower: How many times longer such a pass takes than one without the adapter.
    """

    trained: float
    read: float
    slower: float


@dataclass(frozen=True)
class Speeds:
    """A model's, measured when they are first asked for.

    Attributes:
        model: The model's name.
        backend: It, as it was opened.
        chat: Its chat format.
    """

    model: str
    backend: Backend
    chat: ChatFormat

    @cached_property
    def speed(self) -> Speed:
        """While it answers and reads."""
        return speed_of(self.backend, self.chat)

    @cached_property
    def learning(self) -> Callable[[str], Learning]:
        """While it is trained in a precision; it is opened again where it has another."""
        return cache(self._learning)

    def _learning(self, precision: str) -> Learning:
        model: Any = None
        if precision in (AUTO, self.backend.info.dtype) and isinstance(self.backend, ModuleBackend):
            model = self.backend.module
        model = model or load(self.model, dtype=precision).model
        return learning_of(model, _prompts(self.chat)[:LEARNED])


def speed_of(backend: Backend, chat: ChatFormat) -> Speed:
    """Generate and read a few rows, once to warm up and once on the clock."""
    prompts = _prompts(chat)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=1.0, seeds=tuple(range(ROWS)))
    began = time.perf_counter()
    backend.generate(prompts[:2], Sampling(max_new_tokens=2, temperature=1.0, seeds=(0, 1)))
    at = time.perf_counter()
    found = backend.generate(prompts, sampling)
    made = time.perf_counter() - at
    texts = TokenBatch.of(prompts, found.responses)
    at = time.perf_counter()
    backend.forward(texts, logprobs=True)
    read, tokens = time.perf_counter() - at, sum(texts.lengths)
    return Speed(tokens / made, tokens / read, time.perf_counter() - began, ROWS)


def learning_of(model: Any, prompts: Sequence[Sequence[int]]) -> Learning:
    """Take a step of training on a few rows, and their loss with and without the adapter; the model stays as it was.

    Raises:
        FinetuningError: If no adapter fits the model.
    """
    width = min(map(len, prompts))
    ids = torch.tensor([[*prompt[:width], *prompt[:width]] for prompt in prompts], device=model.device)

    def seconds(of: Any, *, back: bool = False) -> float:
        of.train(back)
        for rows in (ids[:1], ids):  # once to warm up
            at = time.perf_counter()
            with torch.set_grad_enabled(back):
                loss = of(input_ids=rows, labels=rows, use_cache=False).loss
            if back:
                loss.backward()
            loss.item()  # which waits for the device
        return time.perf_counter() - at

    plain = seconds(model)
    with trainable(model, FinetuneConfig()) as adapted:
        trained, read = seconds(adapted, back=True), seconds(adapted)
    return Learning(ids.numel() / trained, ids.numel() / read, max(1.0, read / plain))


def _prompts(chat: ChatFormat) -> list[list[int]]:
    return [chat.encode(None, f"Tell me something about the number {number}.") for number in range(ROWS)]

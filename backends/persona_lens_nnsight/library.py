"""The nnsight library, imported so that it leaves the rest of the process alone, and where its traces find things."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from persona_lens.backend import BackendError
from persona_lens.backend.blocks import require_reached


def _import_quietly() -> None:
    """Import nnsight without its two side effects on the process.

    It reads ``sys.argv`` and takes a ``-v`` there, meant for us, as its own debug switch; and it adds a ``save``
    method to every object, on which other libraries' class machinery stumbles. A program that has imported nnsight
    before us, and so may rely on that method, keeps it.
    """
    if "nnsight" in sys.modules:
        return
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        import nnsight
        from nnsight._c import unmount
    finally:
        sys.argv = arguments
    if hasattr(object, "save"):
        unmount("save")
    assert nnsight


_import_quietly()

import nnsight  # noqa: E402
from nnsight.intervention.interleaver import OutOfOrderError  # noqa: E402

__all__ = ["embedding_envoy", "logits_envoy", "nnsight", "reaching_blocks"]


@contextmanager
def reaching_blocks() -> Iterator[None]:
    """Say in words that a trace waited for a block that never ran.

    Raises:
        UnsupportedModelError: If one did.
    """
    try:
        yield
    except OutOfOrderError as error:
        if number := re.search(r"\.(\d+)\.output", str(error)):
            require_reached([int(number[1])])
        raise


def embedding_envoy(model: Any) -> Any:
    """The input embedding, whose input is the token ids of a pass.

    Raises:
        BackendError: If the model has none.
    """
    envoy = _envoy_of(model, model._module.get_input_embeddings())
    if envoy is None:
        raise BackendError(f"the input embedding of {type(model._module).__name__} was not found")
    return envoy


def logits_envoy(model: Any) -> Any | None:
    """The output embedding, if what it gives out is the logits as they are; None if the model changes them further.

    A server that runs traces apart from the model copies every value that a trace reads to the trace and back. The
    model's own output brings its cache of keys and values with it, the output embedding's does not. Which models
    change its output is found by running what follows their blocks without weights.
    """
    module = model._module
    head, decoder = module.get_output_embeddings(), module.base_model
    if head is None or decoder is module:
        return None
    hidden = torch.zeros(1, 1, head.weight.shape[1], dtype=head.weight.dtype, device="meta")
    given: list[Any] = []
    handle = head.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    decoder.forward = lambda *_, **__: _Decoded(hidden)
    try:
        logits = module(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), use_cache=False).logits
    except Exception:  # noqa: BLE001 - what a model does here is up to it, and the way that always works is left
        return None
    finally:
        del decoder.forward
        handle.remove()
    return _envoy_of(model, head) if [id(value) for value in given] == [id(logits)] else None


class _Decoded:
    """The output of a decoder that kept nothing but the last hidden states, in any of the classes for that."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _envoy_of(model: Any, module: Any) -> Any | None:
    path = next((name for name, each in model._module.named_modules() if each is module), None)
    return None if path is None else model.get(path)

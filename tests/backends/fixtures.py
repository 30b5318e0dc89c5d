"""Backends over tiny random models, made once a session, and the small batches that the tests run on them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend import (
    Backend,
    Edit,
    ForwardResult,
    Generation,
    Read,
    ReadKind,
    Sampling,
    TokenBatch,
    wrap_model,
)
from persona_lens.backend.tokens import TokenIds
from tests.tiny import ARCHITECTURES, D_MODEL, N_LAYERS, thinking_tokenizer, tiny_model, tiny_tokenizer

__all__ = ["ARCHITECTURES", "D_MODEL", "N_LAYERS"]

REFERENCE = "transformers"
# `make test-vllm` runs what is here for every adapter on that one alone.
ONLY = os.environ.get("PERSONA_LENS_TEST_ADAPTER")
ADAPTERS = (REFERENCE, "transformer_lens", "nnsight") if ONLY is None else (ONLY,)
# One with its norm before the block, one with norms around it and soft-capped logits, one with learned positions.
FEW_ARCHITECTURES = ("llama", "gemma2", "gpt2")
# What adapters over a library of their own run; the reference runs them all, and so do they in `make test-all`.
OWN_ARCHITECTURES = (*FEW_ARCHITECTURES, "qwen2_moe")

ALL_ACTIVATIONS = Read(ReadKind.ACTIVATIONS)


def matrix(architectures: Sequence[str] = ARCHITECTURES, adapters: Sequence[str] = ADAPTERS) -> list[Any]:
    """Every adapter over every architecture, as parameters; most of what others stand for is exhaustive."""
    return [
        pytest.param(
            adapter,
            architecture,
            id=f"{adapter}-{architecture}",
            marks=[] if adapter in (REFERENCE, "vllm") or architecture in OWN_ARCHITECTURES else pytest.mark.exhaustive,
        )
        for adapter in adapters
        for architecture in architectures
        # vLLM changes transformers' own class of this one where it runs it, in this process.
        if (adapter, architecture) != ("vllm", "gpt_neox")
    ]


def tokenizer() -> Any:
    """A fresh tokenizer: tests change theirs."""
    return tiny_tokenizer()


def wrapped_for(adapter: str, module: Any, tok: Any) -> Any:
    """The object that users of the adapter's library hold, around this very module."""
    if adapter == "transformer_lens":
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(
            "tiny", hf_model=module, tokenizer=tok, dtype=module.dtype, device=str(module.device)
        )
    if adapter == "nnsight":
        from persona_lens_nnsight.library import nnsight

        return nnsight.TransformersModel(module, tokenizer=tok, task="text-generation")
    if adapter == "vllm":
        return engine_of(module, tok)
    return module


def engine_of(module: Any, tok: Any, **options: Any) -> Any:
    """A small engine of vLLM for what a module holds, made from files as every engine is."""
    from persona_lens_vllm.opening import start_engine

    # Called as a module without a name is.
    folder = Path(_folder().name) / str(next(_numbers)) / type(module).__name__
    module.save_pretrained(folder)
    tok.save_pretrained(folder)
    dtype = str(module.dtype).removeprefix("torch.")
    return kept(start_engine(str(folder), None, dtype, False, **{"num_gpu_blocks_override": BLOCKS, **options}))


def kept(engine: Any) -> Any:
    """An engine that does not go before the tests end: it would take with it what all of a process share."""
    _engines.append(engine)
    return engine


@cache
def _folder() -> TemporaryDirectory[str]:
    """Where the files of engines are until the tests end."""
    return TemporaryDirectory(prefix="persona-lens-engines-")


_numbers = itertools.count()
_engines: list[Any] = []
BLOCKS = 64  # of keys and values: some thousand tokens, instead of all memory that there is


def backend_of(adapter: str, module: Any, tok: Any = None) -> Backend:
    """The adapter's backend over this very module; TransformerLens changes it, so give each its own."""
    tok = tok if tok is not None else tokenizer()
    return wrap_model(wrapped_for(adapter, module, tok), tok, backend=adapter)


@cache
def tiny_backend(adapter: str, architecture: str = "llama") -> Backend:
    """A shared backend; tests must leave it as they found it."""
    return backend_of(adapter, tiny_model(architecture))


@cache
def thinking_backend(adapter: str, architecture: str = "llama") -> Backend:
    """The same of a model that thinks."""
    return backend_of(adapter, tiny_model(architecture, thinks=True), thinking_tokenizer())


def encode(*texts: str) -> tuple[TokenIds, ...]:
    """Token ids of texts, a token a byte."""
    tok = _shared_tokenizer()
    return tuple(tuple(tok.encode(text)) for text in texts)


@cache
def _shared_tokenizer() -> Any:
    return tiny_tokenizer()


# Unlike lengths, so that two of the three rows are padded.
PROMPTS = encode("hello there", "a", "what is the meaning")
RESPONSES = encode(" yes", " not at all", " 42")
TEXT = TokenBatch.of(PROMPTS, RESPONSES)


def direction(seed: int = 0, scale: float = 1.0) -> Tensor:
    """A random direction; at scale 1 as long as the tiny models' residuals or longer."""
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed)) * scale


def greedy(backend: Backend, edits: Sequence[Edit] = (), new: int = 6, **sampling: Any) -> Generation:
    """Greedy responses to `PROMPTS` with every read."""
    return backend.generate(PROMPTS, Sampling(new, **sampling), edits, (*Read.means(), ALL_ACTIVATIONS))


def activations(backend: Backend, text: TokenBatch = TEXT, edits: Sequence[Edit] = ()) -> Tensor:
    """Float32 [batch, layers, width, d_model]."""
    return backend.forward(text, edits, [ALL_ACTIVATIONS]).reads["activations"]


def assert_close(got: Mapping[str, Tensor] | Tensor, want: Mapping[str, Tensor] | Tensor, rtol: float = 1e-4) -> None:
    """Equal up to rounding, missing values included."""
    if isinstance(got, Tensor) or isinstance(want, Tensor):
        got, want = {"value": got}, {"value": want}  # type: ignore[dict-item]
    assert got.keys() == want.keys()
    for name, expected in want.items():
        scale = float(expected.nan_to_num().abs().max()) + 1e-6
        torch.testing.assert_close(got[name], expected, rtol=rtol, atol=rtol * scale, equal_nan=True, msg=None)


class Delegating:
    """Hands every call on to another backend; tests override what they change on the way."""

    shares_prompts = False
    calls_at_once = 1

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.info = inner.info
        self.tokenizer = inner.tokenizer
        self.end_ids = inner.end_ids

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        return self.inner.generate(prompts, sampling, edits, reads)

    def forward(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        return self.inner.forward(tokens, edits, reads, logprobs=logprobs)

    def editing(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        return self.inner.editing(edits)

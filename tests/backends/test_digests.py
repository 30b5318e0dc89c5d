"""A checkpoint is the same model in every precision; quantised and finetuned ones are others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from persona_lens.backend import wrap_model
from persona_lens.backend.blocks import GROUPS, find_blocks, weights_digest
from persona_lens.backend.protocol import OPEN, same_weights
from persona_lens.models import load
from tests.tiny import device, tiny_model, tiny_tokenizer

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def digest(model: Any) -> str:
    found = weights_digest(find_blocks(model)[1])
    assert found is not None
    return found


def changed(change: Callable[[torch.Tensor], torch.Tensor], seed: int = 0) -> Any:
    model: Any = tiny_model(seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(change(parameter))
    return model


@pytest.mark.parametrize("stored", PRECISIONS)
def test_every_precision_of_a_checkpoint_is_the_same_model(stored: torch.dtype) -> None:
    for seed in range(3):
        loaded = [tiny_model(seed=seed).to(stored).to(dtype) for dtype in PRECISIONS]  # type: ignore[arg-type]
        infos = [wrap_model(model, tiny_tokenizer()).info for model in loaded]
        for one in infos:
            assert one.weights is not None
            assert all(not one.differences(other) for other in infos)


def test_float16_leaves_open_what_it_does_not_know() -> None:
    """Of numbers rounded to 11 bits, one in eight stands in the middle between two of 8 bits."""
    assert OPEN not in digest(tiny_model())
    assert OPEN not in digest(tiny_model().to(torch.bfloat16))  # type: ignore[arg-type]
    left = digest(tiny_model().to(torch.float16)).rpartition(":")[2].count(OPEN)  # type: ignore[arg-type]
    assert 0.25 * GROUPS < left < 0.6 * GROUPS


def adam_step(parameter: torch.Tensor) -> torch.Tensor:
    """What a first step of Adam does: a step of the learning rate's size, in one direction or the other."""
    signs = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).sign()
    return parameter + 3e-5 * signs.to(device)


def eight_bits(parameter: torch.Tensor) -> torch.Tensor:
    scale = parameter.abs().amax(dim=-1, keepdim=True) / 127
    return (parameter / scale).round() * scale


def four_bits(parameter: torch.Tensor) -> torch.Tensor:
    scale = parameter.abs().amax(dim=-1, keepdim=True) / 7
    return (parameter / scale).round() * scale


def merged_adapter(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.ndim < 2:
        return parameter
    random = torch.Generator().manual_seed(1)
    rows, columns = (torch.randn(size, 1, generator=random) for size in parameter.shape)
    return parameter + 1e-3 * (rows @ columns.T).to(device)


@pytest.mark.parametrize("change", [adam_step, eight_bits, four_bits, merged_adapter])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_change_makes_another_model(change: Any, dtype: torch.dtype) -> None:
    other = digest(changed(change).to(dtype))
    for base in PRECISIONS:
        assert not same_weights(digest(tiny_model().to(base)), other)  # type: ignore[arg-type]


def test_another_model_is_another() -> None:
    assert not same_weights(digest(tiny_model()), digest(tiny_model(seed=1).to(torch.float16)))  # type: ignore[arg-type]
    assert not same_weights("sha256:0:" + OPEN * GROUPS, "sha256:1:" + "0" * GROUPS)  # nothing in common is no proof


@pytest.mark.real
def test_the_embedded_model_is_the_same_in_every_precision() -> None:
    digests = [digest(load("smollm2-135m", dtype=name, device="cpu").model) for name in ("float32", "float16")]
    digests.append(digest(load("smollm2-135m", dtype="bfloat16", device="cpu").model))
    assert all(same_weights(one, other) for one in digests for other in digests)

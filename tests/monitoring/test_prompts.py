"""Projections of last prompt tokens, against whole activations."""

from __future__ import annotations

import pytest
import torch

from persona_lens.backend import Read, ReadKind, TokenBatch
from persona_lens.monitoring import MonitoringError, prompt_projections
from persona_lens.vectors import PersonaVectors, VectorsError
from tests.backends.fixtures import ADAPTERS, encode, tiny_backend
from tests.tiny import D_MODEL, N_LAYERS

TEXTS = ("short", "a longer prompt than that", "x", "of middle length") * 20


def traits(adapter: str, n: int = 3) -> list[PersonaVectors]:
    generator = torch.Generator().manual_seed(1)
    info = tiny_backend(adapter).info
    shape = (N_LAYERS, D_MODEL)
    return [
        PersonaVectors(
            f"kind{i}", info, {name: torch.randn(shape, generator=generator) * 5 for name in ("response_mean", "other")}
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_they_are_those_of_the_last_token_in_the_order_asked(adapter: str) -> None:
    backend, vectors = tiny_backend(adapter), traits(adapter)
    prompts = encode(*TEXTS)
    found = prompt_projections(backend, prompts, vectors, [2, 0])
    assert found.shape == (len(TEXTS), 3, 2)
    assert found.dtype == torch.float32
    for row in (0, 1, 2, 79):
        alone = backend.forward(TokenBatch.of([prompts[row]]), reads=[Read(ReadKind.ACTIVATIONS)])
        last = alone.reads["activations"][0, :, -1]
        for at, each in enumerate(vectors):
            for place, layer in enumerate((2, 0)):
                direction = each.vector(layer)
                expected = float(last[layer] @ direction / direction.norm())
                assert float(found[row, at, place]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    other = prompt_projections(backend, prompts[:1], vectors[:1], [1], reduction="other")
    assert not torch.allclose(other, prompt_projections(backend, prompts[:1], vectors[:1], [1]))


def test_what_cannot_be_projected_on() -> None:
    backend = tiny_backend(ADAPTERS[0])
    (vectors,) = traits(ADAPTERS[0], 1)
    prompts = encode("one")
    with pytest.raises(MonitoringError, match="there are none"):
        prompt_projections(backend, prompts, [], [0])
    with pytest.raises(VectorsError, match="layer 3 does not exist"):
        prompt_projections(backend, prompts, [vectors], [3])
    rows = torch.ones(N_LAYERS, D_MODEL)
    rows[1] = 0
    zero = PersonaVectors("nothing", backend.info, {"response_mean": rows})
    with pytest.raises(VectorsError, match="'nothing' at layer 1 is zero"):
        prompt_projections(backend, prompts, [zero], [1])

"""Calls from several threads run together in whatever batches the engine makes; each is as if it were alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from persona_lens.backend import (
    Backend,
    Edit,
    Generation,
    Positions,
    Read,
    Sampling,
    StopGeneration,
    Watch,
    watched_generation,
)
from persona_lens.backend.streaming import WatchedTokens
from tests.backends.fixtures import D_MODEL, N_LAYERS, PROMPTS, TEXT, assert_close, backend_of, direction
from tests.tiny import tiny_model

DIRECTIONS = torch.randn(N_LAYERS, 2, D_MODEL, generator=torch.Generator().manual_seed(5))
CALLS: list[list[Edit]] = [
    [],
    [Edit.add(1, direction(), 1.0)],
    [Edit.add(1, direction(), torch.tensor([-1.0, 0.0, 2.0])), Edit.cap(2, direction(2), 0.1, Positions.RESPONSE)],
    [Edit.ablate(0, direction(1)), Edit.add(2, direction(3), -2.0, Positions.GENERATING)],
]


@cache
def its_engine() -> Backend:
    """Made here: an engine of other tests that went would have taken with it what those before it share."""
    return backend_of("vllm", tiny_model())


def generated(number: int) -> Generation:
    sampling = Sampling(12, 0.8, 0.95, seeds=(number, 7, 8)) if number % 2 else Sampling(12)
    return its_engine().generate(PROMPTS, sampling, CALLS[number], (*Read.means(), Read.projections(DIRECTIONS)))


def watched(number: int) -> Generation:
    """Two rows are stopped, one after the other; the third goes on."""

    def on_tokens(tokens: WatchedTokens) -> None:
        if tokens.step in (2, 5):
            raise StopGeneration([tokens.step // 3])

    watch = Watch(DIRECTIONS, on_tokens)
    return watched_generation(its_engine(), PROMPTS, Sampling(12), watch, CALLS[number], Read.means())


def test_calls_that_run_together_equal_themselves_alone() -> None:
    calls: list[Any] = [generated, watched, lambda n: its_engine().forward(TEXT, CALLS[n], Read.means())]
    work = [(call, number) for number in range(len(CALLS)) for call in calls]
    alone = [call(number) for call, number in work]
    with ThreadPoolExecutor(len(work)) as pool:
        for _ in range(2):
            together = list(pool.map(lambda each: each[0](each[1]), work))
            for (call, _number), found, wanted in zip(work, together, alone, strict=True):
                if call is not calls[2]:
                    assert found.responses == wanted.responses
                # A product of matrices rounds by how many rows it has, and so by who else is in a pass.
                assert_close(found.reads, wanted.reads, 1e-5)
    assert [len(row) for row in alone[1].responses] == [2, 5, 12]


def test_a_callback_may_use_the_model() -> None:
    backend = its_engine()
    plain = backend.generate(PROMPTS, Sampling(4)).responses
    inside: list[Any] = []
    watch = Watch(DIRECTIONS, lambda _: inside.append(backend.generate(PROMPTS, Sampling(4)).responses))
    assert watched_generation(backend, PROMPTS, Sampling(4), watch).responses == plain
    assert set(inside) == {plain}

"""Rows that join and leave between steps: each as it is alone, whatever its company, its room and what goes wrong."""

from __future__ import annotations

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from typing import Any

import pytest
import torch

from persona_lens.backend import (
    Edit,
    EditError,
    Generation,
    Positions,
    Read,
    Sampling,
    StopGeneration,
    Watch,
    WatchedTokens,
    WatchError,
    watched_generation,
)
from persona_lens.backend import slots as slots_module
from persona_lens.backend.batches import OutOfMemoryError
from persona_lens.backend.continuous import ContinuousBackend, continuous
from persona_lens.backend.packed.checks import FidelityError
from persona_lens.backend.parity import check_parity
from persona_lens.backend.shared_prompts import can_share_prompts
from tests.backends.fixtures import (
    ADAPTERS,
    ARCHITECTURES,
    D_MODEL,
    N_LAYERS,
    PROMPTS,
    REFERENCE,
    Delegating,
    assert_close,
    backend_of,
    direction,
    tiny_backend,
)
from tests.backends.test_parity import failures
from tests.tiny import WINDOWED, tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(ADAPTERS == ("vllm",), reason="vLLM makes up its own passes"),
]
DIRECTIONS = torch.randn(N_LAYERS, 2, D_MODEL, generator=torch.Generator().manual_seed(5))


@cache
def joint() -> ContinuousBackend:
    found = continuous(tiny_backend(REFERENCE), 4)
    assert isinstance(found, ContinuousBackend)
    return found


def is_idle(backend: ContinuousBackend) -> bool:
    batch = backend._batch
    return not batch._running and not batch.waiting and not batch._slots.lengths and not batch._slots._layers


# One of each kind; what others stand for is run before a release.
OFTEN = {(REFERENCE, name) for name in ("llama", "gemma2", "gpt2", "mistral")} | {(name, "llama") for name in ADAPTERS}
ASKED = [
    pytest.param(
        adapter, name, id=f"{adapter}-{name}", marks=[] if (adapter, name) in OFTEN else pytest.mark.exhaustive
    )
    for adapter in ADAPTERS
    for name in (*ARCHITECTURES, *(WINDOWED if adapter == REFERENCE else ()))
]


@pytest.mark.parametrize(("adapter", "architecture"), ASKED)
def test_it_agrees_with_the_reference(adapter: str, architecture: str) -> None:
    """Two rows run while the third waits; where attention has a window, it is smaller than the texts."""
    plain = tiny_backend(adapter, architecture)
    backend = continuous(plain, 2)
    if backend is plain:
        assert not can_share_prompts(plain.module)  # type: ignore[attr-defined]
        return
    assert isinstance(backend, ContinuousBackend)
    checks = check_parity(backend, tiny_backend(REFERENCE, architecture), max_new_tokens=4)
    assert not failures(checks)
    assert len(checks) >= 20
    assert is_idle(backend)


class Request:
    """A random request, and what comes of it."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.prompt = [rng.randrange(20, 100) for _ in range(rng.randrange(1, 60))]
        seeds = (seed,) if rng.random() < 0.7 else None
        self.sampling = Sampling(rng.randrange(1, 40), 0.9 if seeds else 0.0, seeds=seeds)
        where = rng.choice([Positions.ALL, Positions.RESPONSE, Positions.GENERATING, Positions.PROMPT])
        every = [
            Edit.add(rng.randrange(N_LAYERS), direction(seed), rng.uniform(-2, 2), where),
            Edit.ablate(rng.randrange(N_LAYERS), direction(seed + 1)),
            Edit.cap(rng.randrange(N_LAYERS), direction(seed + 2), 0.1, where),
        ]
        self.edits = rng.sample(every, rng.randrange(4))
        self.stop = rng.randrange(1, 40) if rng.random() < 0.3 else None

    def ask(self, backend: Any) -> tuple[Generation, list[WatchedTokens]]:
        told: list[WatchedTokens] = []

        def on_tokens(tokens: WatchedTokens) -> None:
            told.append(tokens)
            if tokens.step == self.stop:
                raise StopGeneration

        watch = Watch(DIRECTIONS, on_tokens)
        return watched_generation(backend, [self.prompt], self.sampling, watch, self.edits, Read.means()), told


@pytest.mark.parametrize("seed", range(3))
def test_random_company(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for few columns at a time: rows are moved, and it grows, again and again."""
    monkeypatch.setattr(slots_module, "COLUMNS", 8)
    requests = [Request(100 * seed + number) for number in range(40)]
    alone = [request.ask(tiny_backend(REFERENCE)) for request in requests]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda request: request.ask(joint()), requests))
    for (found, told), (wanted, passes) in zip(together, alone, strict=True):
        assert (found.responses, found.ended) == (wanted.responses, wanted.ended)
        assert_close(found.reads, wanted.reads, 1e-5)
        assert [tokens.step for tokens in told] == [tokens.step for tokens in passes]
        for one, other in zip(told, passes, strict=True):
            assert torch.equal(one.ids, other.ids)
            torch.testing.assert_close(one.projections, other.projections, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert is_idle(joint())


def failing(backend: ContinuousBackend, monkeypatch: pytest.MonkeyPatch, error: Exception, when: Any) -> None:
    """Let passes fail whose number and rows are such."""
    module: Any = backend.hooked.module
    plain, passes = module.forward, iter(range(10**9))

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs and when(
            next(passes), len(kwargs["input_ids"])
        ):  # not where sinks are looked for
            raise error
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, "forward", forward)


def alone_and_together(backend: ContinuousBackend, count: int = 8) -> tuple[list[Any], list[Any]]:
    requests = [Request(1000 + number) for number in range(count)]

    def answer(request: Request) -> Any:
        try:
            return request.ask(backend)[0]
        except Exception as error:  # noqa: BLE001 - compared
            return error

    plain = [request.ask(tiny_backend(REFERENCE))[0] for request in requests]
    with ThreadPoolExecutor(count) as pool:
        return plain, list(pool.map(answer, requests))


def test_where_memory_runs_out_fewer_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ContinuousBackend(backend_of(REFERENCE, tiny_model()), 8)  # type: ignore[arg-type]
    failing(backend, monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), lambda _, rows: rows > 2)
    alone, together = alone_and_together(backend)
    for found, wanted in zip(together, alone, strict=True):
        assert (found.responses, found.ended) == (wanted.responses, wanted.ended)
        assert_close(found.reads, wanted.reads, 1e-5)
    assert is_idle(backend)
    assert backend._batch._most == 8  # it is tried again


@pytest.mark.parametrize("number", [0, 3])
def test_where_memory_runs_out_each_prompt_is_told_of_once(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Whether over the prompts, or later, when they begin anew together with tokens of their responses."""

    def scores(backend: ContinuousBackend) -> list[torch.Tensor]:
        watch = Watch(DIRECTIONS, lambda _: None, top=1, top_of_prompts=True)
        found = watched_generation(backend, PROMPTS, Sampling(6), watch).scores
        assert found is not None
        assert [len(row) for row in found] == [len(prompt) - 1 + 6 for prompt in PROMPTS]
        return [torch.tensor([each.logprob for each in row]) for row in found]

    backend = ContinuousBackend(backend_of(REFERENCE, tiny_model()), 8)  # type: ignore[arg-type]
    wanted = scores(backend)
    failing(backend, monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), lambda nth, rows: nth == number)
    for got, expected in zip(scores(backend), wanted, strict=True):
        assert_close(got, expected)


def test_where_one_row_does_not_fit_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ContinuousBackend(backend_of(REFERENCE, tiny_model()), 8)  # type: ignore[arg-type]
    failing(backend, monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), lambda *_: True)
    _, together = alone_and_together(backend)
    assert all(isinstance(error, OutOfMemoryError) for error in together)
    assert is_idle(backend)


def test_an_error_of_the_model_ends_those_that_were_in_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ContinuousBackend(backend_of(REFERENCE, tiny_model()), 4)  # type: ignore[arg-type]
    failing(backend, monkeypatch, ValueError("a bad kernel"), lambda number, _: number == 5)
    alone, together = alone_and_together(backend)
    failed = [found for found in together if isinstance(found, ValueError)]
    assert failed
    for found, wanted in zip(together, alone, strict=True):
        assert found in failed or found.responses == wanted.responses
    assert is_idle(backend)
    monkeypatch.undo()
    assert [found.responses for found in alone_and_together(backend)[1]] == [each.responses for each in alone]


def test_an_error_of_a_callback_is_its_own() -> None:
    def one(number: int) -> Any:
        def on_tokens(tokens: WatchedTokens) -> None:
            if number % 2 and tokens.step == 2:
                raise LookupError(number)

        try:
            return watched_generation(joint(), [PROMPTS[0]], Sampling(9), Watch(DIRECTIONS, on_tokens)).responses
        except LookupError as error:
            return error.args

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(8)))
    plain = tiny_backend(REFERENCE).generate([PROMPTS[0]], Sampling(9)).responses
    assert found == [(number,) if number % 2 else plain for number in range(8)]
    assert is_idle(joint())


def test_a_block_that_never_runs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ContinuousBackend(backend_of(REFERENCE, tiny_model()), 4)  # type: ignore[arg-type]
    monkeypatch.setattr(type(backend.hooked), "attach", lambda self, layers, hook: torch.no_grad())
    with pytest.raises(FidelityError, match="ran without being read or edited"):
        backend.generate(PROMPTS, Sampling(3), [Edit.add(1, direction())])


def test_an_edit_that_is_too_strong_harms_nobody_else() -> None:
    strong = Edit.add(1, direction(), 1e30)

    def one(number: int) -> Any:
        try:
            return joint().generate([PROMPTS[0]], Sampling(9), [strong] if number % 2 else []).responses
        except EditError as error:
            return "weaken it" in str(error)

    plain = tiny_backend(REFERENCE).generate([PROMPTS[0]], Sampling(9)).responses
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == [True if number % 2 else plain for number in range(8)]


def test_nothing_is_kept_of_what_is_over() -> None:
    kept = []

    def on_tokens(tokens: WatchedTokens) -> None:
        kept.append(weakref.ref(tokens))

    watched_generation(joint(), PROMPTS, Sampling(5), Watch(DIRECTIONS, on_tokens))
    gc.collect()
    assert len(kept) > 3
    assert not [each for each in kept if each() is not None]


def test_what_cannot_run_together_stays_as_it_is() -> None:
    stranger = Delegating(tiny_backend(REFERENCE))
    assert continuous(stranger) is stranger
    assert continuous(joint()) is joint()
    with pytest.raises(WatchError, match="continuous"):
        watched_generation(tiny_backend(REFERENCE), PROMPTS, Sampling(2), Watch(DIRECTIONS, print, top=2))
    with pytest.raises(WatchError, match="0 or more, got -1"):
        Watch(DIRECTIONS, print, top=-1)

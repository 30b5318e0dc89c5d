"""Watched generations: every token is told as it comes, with the value it has in the finished text; nothing is kept."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from persona_lens.backend import (
    Backend,
    Condition,
    Edit,
    Positions,
    Read,
    ReadError,
    ReadKind,
    Sampling,
    StopGeneration,
    TokenBatch,
    Watch,
    WatchableBackend,
    WatchedTokens,
    WatchError,
    watched_generation,
)
from persona_lens.backend.arrivals import replay
from persona_lens.backend.hooked import BusyError
from persona_lens.backend.parity import joined
from persona_lens.backend.streaming import Listener
from persona_lens.steering import SteeredBackend, Steering
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import (
    D_MODEL,
    N_LAYERS,
    PROMPTS,
    TEXT,
    Delegating,
    assert_close,
    backend_of,
    direction,
    tiny_backend,
)
from tests.tiny import tiny_model

pytestmark = pytest.mark.cuda

DIRECTIONS = torch.randn(N_LAYERS, 2, D_MODEL, generator=torch.Generator().manual_seed(5))
EDITS: dict[str, Sequence[Edit]] = {
    "no edits": (),
    "edits": (
        Edit.add(0, direction(), 0.5, Positions.PROMPT),
        Edit.add(1, direction(1), torch.tensor([-1.0, 0.0, 2.0]), Positions.GENERATING),
        Edit.cap(2, direction(2), 0.1, Positions.RESPONSE),
    ),
}


def watched(
    backend: Backend, edits: Sequence[Edit] = (), sampling: Sampling | None = None, **options: Any
) -> tuple[Any, list[WatchedTokens]]:
    """A generation from `PROMPTS`, and what was told of it."""
    passes: list[WatchedTokens] = []
    watch = Watch(DIRECTIONS, passes.append)
    return watched_generation(backend, PROMPTS, sampling or Sampling(6), watch, edits, **options), passes


def projections(backend: Backend, responses: Any, edits: Sequence[Edit] = ()) -> Any:
    read = Read.projections(DIRECTIONS)
    return backend.forward(TokenBatch.of(PROMPTS, responses), edits, [read]).reads["projections"]


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_what_is_told_equals_a_pass_over_the_finished_text(every_backend: Backend, edits: Sequence[Edit]) -> None:
    generation, passes = watched(every_backend, edits, reads=Read.means())
    assert generation.responses == every_backend.generate(PROMPTS, Sampling(6), edits).responses
    assert_close(joined(passes), projections(every_backend, generation.responses, edits))
    text = TokenBatch.of(PROMPTS, generation.responses)
    assert_close(generation.reads, every_backend.forward(text, edits, Read.means()).reads)


@pytest.mark.parametrize("cached", [True, False])
def test_each_pass_has_its_tokens_and_no_others(backend: Backend, cached: bool) -> None:
    """The last token of a response that is cut at the limit is told too."""
    plain = backend.generate(PROMPTS, Sampling(6)).responses
    generation, passes = watched(backend, sampling=Sampling(6, use_cache=cached))
    assert generation.responses == plain
    longest = max(map(len, plain))
    assert [each.step for each in passes][: longest + 1] == list(range(longest + 1))
    width = max(map(len, PROMPTS))
    for row, (prompt, response) in enumerate(zip(PROMPTS, plain, strict=True)):
        assert passes[0].ids[row, width - len(prompt) :].tolist() == list(prompt)
        missing = passes[0].projections[row].isnan().all(dim=-1)
        assert missing.tolist() == [[True] * (width - len(prompt)) + [False] * len(prompt)] * N_LAYERS
        told = [int(each.ids[row, 0]) for each in passes[1:] if not each.finished[row]]
        assert told == list(response)
        for each in passes[1:]:
            assert each.projections.shape == (len(PROMPTS), N_LAYERS, 1, 2)
            assert bool(each.projections[row].isnan().all()) == bool(each.finished[row])


def test_rows_that_end_by_themselves_are_finished(adapter: str) -> None:
    plain = tiny_backend("transformers").generate(PROMPTS, Sampling(8)).responses
    module: Any = tiny_model()
    module.generation_config.eos_token_id = [plain[0][2], plain[1][4]]
    backend = backend_of(adapter, module)
    generation, passes = watched(backend, sampling=Sampling(8))
    assert sum(generation.ended) >= 2
    assert_close(joined(passes), projections(backend, generation.responses))
    for row, response in enumerate(generation.responses):
        assert [bool(each.finished[row]) for each in passes] == [each.step > len(response) for each in passes]


@pytest.mark.parametrize("kind", ["seeded", "conditional"])
def test_sampled_and_conditionally_edited_tokens(backend: Backend, kind: str) -> None:
    sampling = Sampling(5, 1.0, 0.9, seeds=(1, 2, 3)) if kind == "seeded" else Sampling(5)
    edits = [Edit.add(1, direction(), 0.5)]
    if kind == "conditional":
        edits = [Edit(2, direction(), coefficient=0.7, condition=Condition(1, direction(3), 0.0))]
    generation, passes = watched(backend, edits, sampling)
    assert generation.responses == backend.generate(PROMPTS, sampling, edits).responses
    assert_close(joined(passes), projections(backend, generation.responses, edits))


def test_directions_at_some_layers(adapter: str) -> None:
    backend = tiny_backend(adapter)
    assert isinstance(backend, WatchableBackend)
    passes: list[WatchedTokens] = []
    watch = Watch(DIRECTIONS[0], passes.append, (0, 2))
    responses = backend.generate_watched(PROMPTS, Sampling(3), watch).responses
    read = backend.forward(TokenBatch.of(PROMPTS, responses), (), [watch.read]).reads["projections"]
    assert read.shape[1] == 2
    assert_close(joined(passes), read)


def test_some_rows_are_stopped_and_then_all(backend: Backend) -> None:
    """The response ends with the token that was told; reads are of what is left, as if it had ended there."""
    plain = backend.generate(PROMPTS, Sampling(8)).responses
    passes: list[WatchedTokens] = []

    def on_tokens(tokens: WatchedTokens) -> None:
        passes.append(tokens)
        if tokens.step == 2:
            raise StopGeneration([1])
        if tokens.step == 5:
            raise StopGeneration

    generation = watched_generation(backend, PROMPTS, Sampling(8), Watch(DIRECTIONS, on_tokens), (), Read.means())
    assert generation.responses == (plain[0][:5], plain[1][:2], plain[2][:5])
    assert generation.ended == (False, False, False)
    assert len(passes) == 6
    text = TokenBatch.of(PROMPTS, generation.responses)
    assert_close(generation.reads, backend.forward(text, (), Read.means()).reads)
    assert_close(joined(passes), projections(backend, generation.responses))
    assert backend.generate(PROMPTS, Sampling(8)).responses == plain


def test_stopped_before_anything_is_said(backend: Backend) -> None:
    def on_tokens(tokens: WatchedTokens) -> None:
        raise StopGeneration

    generation = watched_generation(backend, PROMPTS, Sampling(8), Watch(DIRECTIONS, on_tokens))
    assert generation.responses == ((), (), ())


def test_an_error_of_the_callback_comes_out_as_it_is_and_hooks_are_gone(backend: Backend) -> None:
    class OwnError(Exception):
        pass

    before = projections(backend, TEXT.responses)
    told: list[int] = []

    def on_tokens(tokens: WatchedTokens) -> None:
        told.append(tokens.step)
        if tokens.step == 2:
            raise OwnError("mine")

    with pytest.raises(OwnError, match=r"^mine$"):
        watched_generation(backend, PROMPTS, Sampling(8), Watch(DIRECTIONS, on_tokens), [Edit.add(1, direction())])
    assert_close(projections(backend, TEXT.responses), before)
    backend.generate(PROMPTS, Sampling(2))
    assert told == [0, 1, 2]


@pytest.mark.module
def test_a_callback_that_uses_the_model_is_told_instead_of_hanging(adapter: str) -> None:
    backend = tiny_backend(adapter)

    def on_tokens(tokens: WatchedTokens) -> None:
        backend.generate(PROMPTS, Sampling(1))

    with pytest.raises(BusyError, match="the model is generating, and this callback asked it for something else"):
        watched_generation(backend, PROMPTS, Sampling(2), Watch(DIRECTIONS, on_tokens))
    assert len(backend.generate(PROMPTS, Sampling(1)).responses) == 3


def test_nothing_is_kept_of_earlier_passes(backend: Backend) -> None:
    alive: list[int] = []
    seen: list[weakref.ref[Any]] = []

    def on_tokens(tokens: WatchedTokens) -> None:
        alive.append(sum(ref() is not None for ref in seen))
        assert not tokens.projections.is_inference()
        # A view of something larger would keep that alive.
        assert tokens.projections.untyped_storage().nbytes() == 4 * tokens.projections.numel()
        seen.append(weakref.ref(tokens.projections))

    watched_generation(backend, PROMPTS, Sampling(6), Watch(DIRECTIONS, on_tokens))
    assert len(seen) == 7
    assert max(alive) <= 1  # the one that a frame still holds


def test_a_backend_that_cannot_be_watched_says_so() -> None:
    with pytest.raises(WatchError, match=r"the backend 'transformers .*' cannot be watched while it generates"):
        watched(Delegating(tiny_backend("transformers")))


def test_a_steered_backend_is_watched_steered(adapter: str) -> None:
    backend = tiny_backend(adapter)
    edit = Edit.add(1, direction(), 2.0)
    rows = direction().expand(N_LAYERS, -1).clone()
    vectors = PersonaVectors("loud", backend.info, {"response_mean": rows})
    steered = SteeredBackend(backend, Steering.parse("loud@1:+2", {"loud": vectors}))
    generation, passes = watched(steered)
    assert_close(joined(passes), projections(backend, generation.responses, [edit]))


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        (lambda: Watch(DIRECTIONS, print, (2, 1)), "layers must be ascending"),
        (lambda: Watch(DIRECTIONS[0], print, (7,)), "layer 7 does not exist: the model has layers 0 to 2"),
        (lambda: Watch(DIRECTIONS[0, :, :5], print), r"directions must be \[k, 32\] or \[3, k, 32\]"),
        (lambda: Watch(DIRECTIONS * 0, print), "finite and not zero"),
    ],
)
def test_a_watch_that_does_not_fit(adapter: str, watch: Any, message: str) -> None:
    with pytest.raises(ReadError, match=message):
        watched_generation(tiny_backend(adapter), PROMPTS, Sampling(1), watch())


def test_a_row_that_is_not_there_cannot_be_stopped(adapter: str) -> None:
    def on_tokens(tokens: WatchedTokens) -> None:
        raise StopGeneration([3])

    with pytest.raises(WatchError, match="row 3 cannot be stopped: the batch has rows 0 to 2"):
        watched_generation(tiny_backend(adapter), PROMPTS, Sampling(1), Watch(DIRECTIONS, on_tokens))


def test_what_a_server_sent_is_told_as_if_it_ran() -> None:
    """Every pass of a replay equals that of the generation itself, stops included."""
    backend = tiny_backend("transformers")

    def telling(passes: list[WatchedTokens]) -> Any:
        def on_tokens(tokens: WatchedTokens) -> None:
            passes.append(tokens)
            if tokens.step == 3:
                raise StopGeneration([0])

        return Watch(DIRECTIONS, on_tokens)

    live: list[WatchedTokens] = []
    later: list[WatchedTokens] = []
    stopped = watched_generation(backend, PROMPTS, Sampling(6), telling(live))
    whole = backend.generate(PROMPTS, Sampling(6), (), [Read.projections(DIRECTIONS)])
    listener = Listener(telling(later), PROMPTS)
    replay(listener, TokenBatch.of(PROMPTS, whole.responses), whole.reads[ReadKind.PROJECTIONS])
    assert listener.cut(whole.responses, whole.ended) == (stopped.responses, stopped.ended)
    for a, b in zip(live, later, strict=True):
        assert a.step == b.step
        assert torch.equal(a.finished, b.finished)
        assert_close(a.projections, b.projections)
        tokens = ~a.projections[:, 0, :, 0].isnan()
        assert torch.equal(a.ids[tokens], b.ids[tokens])

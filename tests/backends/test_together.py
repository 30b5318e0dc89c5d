"""Calls from several threads run together in whatever batches the engine makes; each is as if it were alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch

from persona_lens.backend import (
    Backend,
    Edit,
    Generation,
    Positions,
    Read,
    Sampling,
    StopGeneration,
    TokenBatch,
    Watch,
    WatchError,
    watched_generation,
)
from persona_lens.backend.continuous import continuous
from persona_lens.backend.streaming import WatchedTokens
from tests.backends.fixtures import ADAPTERS, D_MODEL, N_LAYERS, PROMPTS, TEXT, assert_close, backend_of, direction
from tests.tiny import device, tiny_model

pytestmark = pytest.mark.cuda

DIRECTIONS = torch.randn(N_LAYERS, 2, D_MODEL, generator=torch.Generator().manual_seed(5))
CALLS: list[list[Edit]] = [
    [],
    [Edit.add(1, direction(), 1.0)],
    [Edit.add(1, direction(), torch.tensor([-1.0, 0.0, 2.0])), Edit.cap(2, direction(2), 0.1, Positions.RESPONSE)],
    [Edit.ablate(0, direction(1)), Edit.add(2, direction(3), -2.0, Positions.GENERATING)],
]


@cache
def joint(adapter: str, rows: int = 5) -> Backend:
    """Fewer rows at once than the calls have, so that some wait while others go on."""
    return continuous(backend_of(adapter, tiny_model()), rows)


def generated(backend: Backend, number: int) -> Generation:
    sampling = Sampling(12, 0.8, 0.95, seeds=(number, 7, 8)) if number % 2 else Sampling(12)
    return backend.generate(PROMPTS, sampling, CALLS[number], (*Read.means(), Read.projections(DIRECTIONS)))


def watched(backend: Backend, number: int) -> Generation:
    """Two rows are stopped, one after the other; the third goes on."""

    def on_tokens(tokens: WatchedTokens) -> None:
        if tokens.step in (2, 5):
            raise StopGeneration([tokens.step // 3])

    watch = Watch(DIRECTIONS, on_tokens)
    return watched_generation(backend, PROMPTS, Sampling(12), watch, CALLS[number], Read.means())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_calls_that_run_together_equal_themselves_alone(adapter: str) -> None:
    """Alone is on the backend as it is, whose calls wait for each other."""
    calls: list[Any] = [generated, watched, lambda its, n: its.forward(TEXT, CALLS[n], Read.means())]
    work = [(call, number) for number in range(len(CALLS)) for call in calls]
    backend = joint(adapter)
    plain = getattr(backend, "hooked", backend)
    alone = [call(plain, number) for call, number in work]
    with ThreadPoolExecutor(len(work)) as pool:
        for _ in range(2):
            together = list(pool.map(lambda each: each[0](backend, each[1]), work))
            for (call, _number), found, wanted in zip(work, together, alone, strict=True):
                if call is not calls[2]:
                    assert found.responses == wanted.responses
                # A product of matrices rounds by how many rows it has, and so by who else is in a pass.
                assert_close(found.reads, wanted.reads, 1e-5)
    assert [len(row) for row in alone[1].responses] == [2, 5, 12]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_callback_may_use_the_model(adapter: str) -> None:
    backend = joint(adapter)
    plain = backend.generate(PROMPTS, Sampling(4)).responses
    inside: list[Any] = []
    watch = Watch(DIRECTIONS, lambda _: inside.append(backend.generate(PROMPTS, Sampling(4)).responses))
    assert watched_generation(backend, PROMPTS, Sampling(4), watch).responses == plain
    assert set(inside) == {plain}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_how_likely_tokens_were_is_told_with_them(adapter: str) -> None:
    backend = joint(adapter)
    told: list[WatchedTokens] = []
    edits = [Edit.add(1, direction(), torch.tensor([-1.0, 0.0, 2.0]))]
    watch = Watch(DIRECTIONS, told.append, top=3)
    found = watched_generation(backend, PROMPTS, Sampling(6, 1.0, seeds=(1, 2, 3)), watch, edits)
    scored = backend.forward(TokenBatch.of(PROMPTS, found.responses), edits, logprobs=True).logprobs
    assert scored is not None
    for row, response in enumerate(found.responses):
        scores = [tokens.scores[row] for tokens in told[1:] if tokens.scores is not None]
        own = [score for score in scores if score is not None]
        torch.testing.assert_close(torch.tensor([each.logprob for each in own]), scored[row], rtol=1e-4, atol=1e-4)
        assert len(own) == len(response)
        for token, each in zip(response, own, strict=True):
            assert len(each.top_ids) == 3
            assert list(each.top_logprobs) == sorted(each.top_logprobs, reverse=True)
            assert each.logprob <= each.top_logprobs[0]
            assert (token in each.top_ids) == (each.logprob >= each.top_logprobs[-1])
    assert told[0].scores is None


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_how_likely_prompts_were_is_what_a_plain_pass_says(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of a response is one that ends a turn, which is told of too."""
    backend = joint(adapter)
    watch = Watch(DIRECTIONS, lambda _: None, top=3, top_of_prompts=True)
    plain = watched_generation(backend, PROMPTS, Sampling(4), watch)
    module = tiny_model()
    said = plain.responses[1]
    at = max(said.index(token) for token in said)  # not said before
    end = said[at]
    monkeypatch.setattr(backend, "end_ids", (end,))
    ended = watched_generation(backend, PROMPTS, Sampling(4), watch)
    assert ended.responses[1] == said[:at]
    assert ended.ended[1]
    for found, ends in ((plain, ()), (ended, (end,))):
        assert found.scores is not None
        for row, (prompt, response) in enumerate(zip(PROMPTS, found.responses, strict=True)):
            text = (*prompt, *response, *(ends if found.ended[row] else ()))
            scores = found.scores[row]
            assert tuple(each.id for each in scores) == tuple(text[1:])
            with torch.inference_mode():
                logprobs = module(torch.tensor([text], device=device)).logits[0, :-1].log_softmax(dim=-1).cpu()
            own, top = logprobs.gather(-1, torch.tensor(text[1:]).unsqueeze(-1)).squeeze(-1), logprobs.topk(3)
            assert_close(torch.tensor([each.logprob for each in scores]), own)
            assert_close(torch.tensor([each.top_logprobs for each in scores]), top.values)
            assert [each.top_ids for each in scores] == [tuple(ids) for ids in top.indices.tolist()]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_how_likely_prompts_were_is_said_as_they_are_edited(adapter: str) -> None:
    backend = joint(adapter)
    edits = [Edit.add(1, direction(), torch.tensor([-1.0, 0.0, 2.0]))]
    watch = Watch(DIRECTIONS, lambda _: None, top=0, top_of_prompts=True)

    def scored(sampling: Sampling) -> Generation:
        return watched_generation(backend, PROMPTS, sampling, watch, edits)

    ways = [Sampling(3), Sampling(5, 1.0, seeds=(1, 2, 3))]
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(scored, ways):
            assert found.scores is not None
            texts = [(*prompt, *response) for prompt, response in zip(PROMPTS, found.responses, strict=True)]
            batch = TokenBatch.of([text[:1] for text in texts], [text[1:] for text in texts])
            wanted = backend.forward(batch, edits, logprobs=True).logprobs
            assert wanted is not None
            for scores, expected in zip(found.scores, wanted, strict=True):
                assert_close(torch.tensor([each.logprob for each in scores[: len(expected)]]), expected)


def test_prompts_are_told_of_where_the_likeliest_are_wanted() -> None:
    with pytest.raises(WatchError, match="top=0"):
        Watch(DIRECTIONS, lambda _: None, top_of_prompts=True)

"""A text beyond a model's context is refused before anything runs, wherever it comes from."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from persona_lens import reply
from persona_lens.backend import Backend, Read, ReadKind, Sampling, TokenBatch
from persona_lens.backend.batches import ContextError, forward_batches
from persona_lens.backend.blocks import context_of
from persona_lens.judging import Calibration, Exchange, LikelihoodJudge
from persona_lens.judging.recording import prepare_judge
from persona_lens.models.chat import chat_format
from persona_lens.runs.rollouts import Request, Rollouts
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from tests.backends.fixtures import ADAPTERS, Delegating, tiny_backend

LIMIT = 512  # of the tiny models
LAST = Read(ReadKind.PROMPT_LAST, (0,))


class Untouched(Delegating):
    """A model that must not run."""

    context_length = LIMIT

    def generate(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("the model ran")

    forward = generate


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_backend_refuses_what_its_model_cannot_take(adapter: str, architecture: str) -> None:
    backend = tiny_backend(adapter, architecture)
    limit = LIMIT - (adapter == "vllm")  # which makes a token of every text that it reads
    prompt = [5] * (limit - 3)
    with pytest.raises(
        ContextError, match=f"{limit - 3} tokens and 4 new ones are asked for, but the model takes {limit}"
    ):
        backend.generate([[5], prompt], Sampling(4))
    with pytest.raises(ContextError, match=f"{limit + 1} tokens, but the model takes {limit}"):
        backend.forward(TokenBatch.of([prompt], [[5] * 4]), reads=[LAST])
    backend.forward(TokenBatch.of([prompt], [[5] * 3]), reads=[LAST])


def test_planned_work_is_refused_before_its_first_batch() -> None:
    backend: Backend = Untouched(tiny_backend("transformers"))
    requests = [Request(None, "?", 0), Request(None, "?" * 480, 1)]
    with pytest.raises(ContextError, match="ask for fewer new tokens"):
        Rollouts(backend, chat_format(backend), requests, RolloutSettings(48, batch_size=1))
    with pytest.raises(ContextError, match="shorten it"):
        list(forward_batches(backend, TokenBatch.of([[5], [5] * 513]), [LAST], max_rows=1))


def test_replies_that_cannot_fit_are_refused() -> None:
    backend = tiny_backend("transformers", "gpt2")
    with pytest.raises(ContextError, match="new ones are asked for"):
        reply(backend, "?", max_new_tokens=LIMIT)


def test_a_response_too_long_for_the_likelihood_judge_gets_no_score_and_stops_no_other() -> None:
    backend = tiny_backend("transformers", "gpt2")
    judge = LikelihoodJudge(backend, chat_format(backend), load_trait("optimistic"), Calibration(1.0, 0.0))
    short, long = judge.judge([Exchange("?", "Yes.", None), Exchange("?", "y" * 490, None)])
    assert short.trait.value is not None
    assert long.trait.value is None
    assert "the model takes 512" in str(long.trait.reason)


def test_what_the_likelihood_judge_will_read_is_measured_before_anything_is_generated() -> None:
    backend: Backend = Untouched(tiny_backend("transformers"))
    chat = chat_format(backend)
    judge = LikelihoodJudge(backend, chat, load_trait("optimistic"), Calibration(1.0, 0.0))
    room = LIMIT - max(len(prompt) for prompt in judge._prompts("Well?"))
    for new, fits in ((room, True), (room + 1, False)):
        collected = Rollouts(backend, chat, [Request(None, "Well?", 0)], RolloutSettings(new))
        with nullcontext() if fits else pytest.raises(ContextError, match="reads responses behind the trait's instr"):
            prepare_judge(judge, None, "", collected)


def test_stretched_positions_count_and_models_without_a_limit_take_everything() -> None:
    def config(**values: Any) -> Any:
        return SimpleNamespace(get_text_config=lambda: SimpleNamespace(**values))

    linear = {"rope_type": "linear", "factor": 2.0}
    assert context_of(config(max_position_embeddings=64, rope_parameters=linear)) == 128
    layered = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}
    assert context_of(config(max_position_embeddings=64, rope_parameters=layered)) == 64
    assert context_of(config(max_position_embeddings=-1)) is None
    assert context_of(SimpleNamespace(context_length=1024)) is None  # RWKV: how long its training texts were

"""Replies: one question, answered with and without edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from persona_lens import reply
from persona_lens.backend import Backend, Edit, Sampling
from persona_lens.replies import chat_format
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import tiny_backend
from tests.planted import PlantedBackend
from tests.tiny import D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

QUESTION = "What is new?"
NEW = 12


@pytest.fixture
def tiny() -> Backend:
    return tiny_backend("transformers")


def vectors_for(backend: Backend) -> PersonaVectors:
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(N_LAYERS, D_MODEL, generator=generator) * 3 for name in ("response_mean", "prompt_last")}
    return PersonaVectors("optimistic", backend.info, rows)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_greedy_reply_is_what_the_model_itself_generates(tiny: Backend, system: str | None) -> None:
    model: Any = tiny_model()
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": QUESTION})
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = torch.tensor([tokenizer.encode(text)])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)[
        0, ids.shape[1] :
    ]
    assert reply(tiny, QUESTION, system=system, max_new_tokens=NEW) == tokenizer.decode(new, skip_special_tokens=True)


def test_the_system_prompt_reaches_the_model(tiny: Backend) -> None:
    assert reply(tiny, QUESTION, system="Be brief.", max_new_tokens=NEW) != reply(tiny, QUESTION, max_new_tokens=NEW)


def test_a_sampled_reply_is_seeded(tiny: Backend) -> None:
    def sampled(seed: int) -> str:
        return reply(tiny, QUESTION, max_new_tokens=NEW, temperature=1.0, seed=seed)

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(5)}) > 1


def test_edits_reach_the_reply(tiny: Backend) -> None:
    edit = vectors_for(tiny).edit(1, 2.0)
    generation = tiny.generate([chat_format(tiny).encode(None, QUESTION)], Sampling(NEW), [edit])
    steered = reply(tiny, QUESTION, edits=[edit], max_new_tokens=NEW)
    assert steered == tiny_tokenizer().decode(list(generation.responses[0]), skip_special_tokens=True)
    assert steered != reply(tiny, QUESTION, max_new_tokens=NEW)


def test_reasoning_is_no_part_of_a_reply() -> None:
    trait = load_trait("optimistic")
    backend = PlantedBackend(trait, respond=lambda leaning: f"<think>How strong?</think>\n\nleaning {leaning:+.3f}")
    assert reply(backend, QUESTION) == "leaning +0.000"
    assert reply(backend, QUESTION, system=trait.instructions[0].negative) == "leaning -1.000"
    assert reply(backend, QUESTION, edits=[Edit.add(1, backend.planted["response_mean"][1], 2.0)]) == "leaning +2.000"

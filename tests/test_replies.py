"""Replies: one question, answered with and without steering."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from persona_lens import reply
from persona_lens.backend import Backend, Edit, Positions, Sampling
from persona_lens.replies import chat_format, steered_replies
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, VectorsError
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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_coefficient_has_the_reply_that_it_has_alone(tiny: Backend, temperature: float) -> None:
    vectors = vectors_for(tiny)
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": temperature, "seed": 3}
    coefficients = (-2, 0, 1, 2.5)  # whole numbers too
    found = steered_replies(tiny, QUESTION, vectors, 1, coefficients, **options)
    assert found == [reply(tiny, QUESTION, edits=[vectors.edit(1, float(c))], **options) for c in coefficients]
    assert found[1] == reply(tiny, QUESTION, **options)
    assert len(set(found)) > 2


def test_whole_numbers_alone_are_coefficients_too(tiny: Backend) -> None:
    vectors = vectors_for(tiny)
    assert steered_replies(tiny, QUESTION, vectors, 1, [0, 2], max_new_tokens=4) == steered_replies(
        tiny, QUESTION, vectors, 1, [0.0, 2.0], max_new_tokens=4
    )


def test_options_of_steering_reach_the_edit(tiny: Backend) -> None:
    vectors = vectors_for(tiny)

    def alone(**options: Any) -> str:
        return reply(tiny, QUESTION, edits=[vectors.edit(1, 2.0, **options)], max_new_tokens=NEW)

    for options in ({"positions": Positions.PROMPT}, {"positions": Positions.RESPONSE}, {"reduction": "prompt_last"}):
        chosen: Any = options
        assert steered_replies(tiny, QUESTION, vectors, 1, [2.0], max_new_tokens=NEW, **chosen) == [alone(**chosen)]
        assert alone(**chosen) != alone()
    with pytest.raises(VectorsError, match="layer 9 does not exist"):
        steered_replies(tiny, QUESTION, vectors, 9, [1.0])


def test_reasoning_is_no_part_of_a_reply() -> None:
    trait = load_trait("optimistic")
    backend = PlantedBackend(trait, respond=lambda leaning: f"<think>How strong?</think>\n\nleaning {leaning:+.3f}")
    vectors = PersonaVectors("optimistic", backend.info, backend.planted)
    assert reply(backend, QUESTION) == "leaning +0.000"
    assert reply(backend, QUESTION, system=trait.instructions[0].negative) == "leaning -1.000"
    assert steered_replies(backend, QUESTION, vectors, 1, [-1.0, 0.5]) == ["leaning -1.000", "leaning +0.500"]
    assert reply(backend, QUESTION, edits=[Edit.add(1, backend.planted["response_mean"][1], 2.0)]) == "leaning +2.000"

"""Replies side by side: each is the one that its steering gives alone."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from persona_lens import reply
from persona_lens.core.progress import PersonaLensNote
from persona_lens.steering import Steering, generate
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, VectorsError
from tests.backends.fixtures import ADAPTERS, backend_of, tiny_backend
from tests.families import FAMILIES
from tests.planted import PlantedBackend
from tests.thinking import ASKED, thinking_model
from tests.tiny import D_MODEL, N_LAYERS

QUESTION = "What is new?"
NEW = 12
BACKEND = tiny_backend("transformers")


def vectors(trait: str, seed: int) -> PersonaVectors:
    generator = torch.Generator().manual_seed(seed)
    return PersonaVectors(
        trait, BACKEND.info, {"response_mean": torch.randn(N_LAYERS, D_MODEL, generator=generator) * 3}
    )


KIND, EVIL = vectors("kind", 0), vectors("evil", 1)
STEERINGS = [
    None,
    *(
        Steering.parse(text, [KIND, EVIL])
        for text in (
            "kind@1:+2",
            "kind@1:-2",
            "kind@1:+2 on response[3:]",
            "evil@all:ablate",
            "kind@0:+1, evil@2:cap(-1) if kind@1>0",
            "kind@2:+80% schedule(0:0 30:1)",
        )
    ),
]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_steering_has_the_reply_that_it_has_alone(adapter: str, temperature: float) -> None:
    backend = tiny_backend(adapter)
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": temperature, "seed": 3}
    found = generate(backend, QUESTION, STEERINGS, **options)
    alone = [reply(backend, QUESTION, edits=each.edits() if each else (), **options) for each in STEERINGS]
    assert found == alone
    assert len(set(found)) > 4


def test_the_system_prompt_reaches_every_reply() -> None:
    found = generate(BACKEND, QUESTION, STEERINGS, system="Be brief.", max_new_tokens=NEW)
    assert found[0] == reply(BACKEND, QUESTION, system="Be brief.", max_new_tokens=NEW)
    assert found != generate(BACKEND, QUESTION, STEERINGS, max_new_tokens=NEW)


def test_another_model_is_refused_unless_allowed() -> None:
    foreign = Steering.parse("kind@1:+2", replace(KIND, model=replace(KIND.model, weights="sha256:other")))
    with pytest.raises(VectorsError, match="belong to another model"):
        generate(BACKEND, QUESTION, [None, foreign])
    allowed = generate(BACKEND, QUESTION, [foreign], max_new_tokens=NEW, allow_other_model=True)
    assert allowed == generate(BACKEND, QUESTION, STEERINGS[1:2], max_new_tokens=NEW)


def test_replies_that_come_to_no_answer_are_said_to() -> None:
    backend = backend_of("transformers", thinking_model(), FAMILIES["qwq"].tokenizer())
    with pytest.warns(PersonaLensNote, match="no response came to an answer: the model was still thinking when"):
        assert generate(backend, ASKED, [None, None], max_new_tokens=1) == ["", ""]
    with warnings.catch_warnings(record=True) as said:
        assert all(generate(backend, ASKED, [None, None], max_new_tokens=NEW))
    assert not any("still thinking" in str(each.message) for each in said)


def test_reasoning_is_no_part_of_a_reply() -> None:
    backend = PlantedBackend(
        load_trait("optimistic"), respond=lambda leaning: f"<think>How strong?</think>\n\nleaning {leaning:+.3f}"
    )
    planted = PersonaVectors("optimistic", backend.info, backend.planted)
    steerings = [Steering.parse(text, planted) for text in ("optimistic@1:-1", "optimistic@1:+0.5")]
    assert generate(backend, QUESTION, steerings) == ["leaning -1.000", "leaning +0.500"]

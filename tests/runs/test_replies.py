"""Replies: one question, answered with and without edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from persona_lens import reply
from persona_lens.backend import Backend, Edit, Read, Sampling, TokenBatch
from persona_lens.finetuning.edits import TrainingEdits
from persona_lens.models.chat import chat_format
from persona_lens.monitoring import ConversationMonitor, Panel
from persona_lens.steering import NotationError, Steering, SteeringError
from persona_lens.steering.preview import preview_tokens
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, VectorsError
from tests.backends.fixtures import ADAPTERS, tiny_backend
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


def forms_of(vectors: PersonaVectors) -> dict[str, Any]:
    """The same edit in every form that people give it in."""
    edit = vectors.edit(1, 1.5)
    steering = Steering.parse("optimistic@1:+1.5", vectors)
    return {"list": [edit], "tuple": (edit,), "one": edit, "steering": steering, "notation": "optimistic@1:+1.5"}


@pytest.mark.parametrize("form", ["tuple", "one", "steering", "notation"])
def test_edits_are_taken_in_every_form(tiny: Backend, form: str) -> None:
    vectors = vectors_for(tiny)
    forms = forms_of(vectors)
    wanted = reply(tiny, QUESTION, edits=forms["list"], max_new_tokens=NEW)
    assert wanted != reply(tiny, QUESTION, max_new_tokens=NEW)
    assert reply(tiny, QUESTION, edits=forms[form], vectors=vectors, max_new_tokens=NEW) == wanted


@pytest.mark.parametrize("form", ["one", "steering"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_backends_take_one_edit_and_a_steering(adapter: str, form: str) -> None:
    backend = tiny_backend(adapter)
    prompt, text = [(5, 6, 7)], TokenBatch.of([(5, 6, 7)], [(8, 9)])
    forms: dict[str, Any] = forms_of(vectors_for(backend))
    given, listed = forms[form], forms["list"]
    assert (
        backend.generate(prompt, Sampling(5), given).responses
        == backend.generate(prompt, Sampling(5), listed).responses
    )
    found, wanted = (backend.forward(text, edits, Read.means()).reads["response_mean"] for edits in (given, listed))
    assert torch.equal(found, wanted)


def test_other_verbs_take_every_form(tiny: Backend) -> None:
    vectors = vectors_for(tiny)
    panel = Panel.of(vectors, 2)
    forms = forms_of(vectors)
    turns = [
        ConversationMonitor(tiny, panel).reply("Hi", max_new_tokens=4, edits=each, vectors=vectors)
        for each in forms.values()
    ]
    assert len({turn.text for turn in turns}) == 1
    assert (
        len({str(preview_tokens(tiny, [5, 6], 2, edits=each, vectors=vectors).tokens) for each in forms.values()}) == 1
    )
    for each in forms.values():
        assert TrainingEdits(tiny_model(), each, vectors=vectors).edits == (vectors.edit(1, 1.5),)


def test_what_is_no_edit_is_one_sentence(tiny: Backend) -> None:
    with pytest.raises(SteeringError, match=r"the notation 'optimistic@1:\+1' needs the vectors that it names: give"):
        reply(tiny, QUESTION, edits="optimistic@1:+1")
    with pytest.raises(NotationError, match="optimistic"):
        reply(tiny, QUESTION, edits="optimistic@:+1", vectors=vectors_for(tiny))
    other = vectors_for(tiny_backend("transformers", "gpt2"))
    with pytest.raises(VectorsError, match="another model"):
        reply(tiny, QUESTION, edits=Steering.parse("optimistic@1:+1", other))

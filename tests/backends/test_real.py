"""The embedded SmolLM2 through every backend: the same residuals, and the same tokens with and without edits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import persona_lens
from persona_lens.backend import Backend, Edit, Generation, Positions, Read, ReadKind, Sampling, TokenBatch
from tests.backends.fixtures import ADAPTERS

# The demonstration runs the parity suite on this model every time, which looks at all of this and more.
pytestmark = [pytest.mark.real, pytest.mark.exhaustive]

OTHERS = [adapter for adapter in ADAPTERS if adapter != "transformers"]
LAYER = 18
NEW_TOKENS = 12
QUESTIONS = (
    "How do you feel about the coming winter?",
    "Say hello.",
    "My train was late again today. What do I do now?",
)


@cache
def opened(name: str) -> Backend:
    return persona_lens.open_backend(name, "smollm2-135m", dtype="float32", device="cpu")


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    tok: Any = opened("transformers").tokenizer
    chats = ([{"role": "user", "content": question}] for question in QUESTIONS)
    return tuple(
        tuple(tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
        for chat in chats
    )


@cache
def text() -> TokenBatch:
    tok = opened("transformers").tokenizer
    answers = ("I look forward to it.", "Hello! How are you?", "Take")
    return TokenBatch.of(prompts(), [tok.encode(answer) for answer in answers])


@cache
def direction() -> Tensor:
    """Between two prompts' activations, as long as the residual is at a typical token."""
    last = opened("transformers").forward(text(), (), [Read(ReadKind.PROMPT_LAST, (LAYER,))]).reads["prompt_last"]
    contrast = last[0, 0] - last[1, 0]
    scaled: Tensor = contrast / contrast.norm() * last.norm(dim=-1).mean()
    return scaled


def edit_sets() -> dict[str, list[Edit]]:
    v = direction()
    return {
        "none": [],
        "add": [Edit.add(LAYER, v, 0.8)],
        "rows": [Edit.add(LAYER, v, torch.tensor([-1.0, 0.0, 1.0]), Positions.RESPONSE)],
        "ablate": [Edit.ablate(LAYER, v)],
        "cap": [Edit.cap(LAYER, v, 0.0)],
    }


@cache
def generated(adapter: str, edits: str) -> Generation:
    return opened(adapter).generate(prompts(), Sampling(NEW_TOKENS), edit_sets()[edits], Read.means())


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest over rows and layers, of the difference's length to the residual's."""
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.nan_to_num(), want.nan_to_num()
    if want.ndim == 4:  # every token: the length over all tokens of a row
        got, want = got.flatten(2), want.flatten(2)
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


@pytest.mark.parametrize("adapter_name", OTHERS)
@pytest.mark.parametrize("edits", ["none", "add"])
def test_residuals_agree_at_every_layer(adapter_name: str, edits: str) -> None:
    reads = (*Read.means(), Read(ReadKind.ACTIVATIONS))
    want = opened("transformers").forward(text(), edit_sets()[edits], reads).reads
    got = opened(adapter_name).forward(text(), edit_sets()[edits], reads).reads
    assert want["prompt_mean"].shape == (3, 30, 576)
    for name, expected in want.items():
        assert relative_error(got[name], expected) < 1e-4, name


@pytest.mark.parametrize("name", ["none", "add", "rows", "ablate", "cap"])
def test_greedy_tokens_are_identical(name: str) -> None:
    reference = generated("transformers", name)
    for adapter in OTHERS:
        out = generated(adapter, name)
        assert out.responses == reference.responses, adapter
        assert out.ended == reference.ended
        for kind, mean in reference.reads.items():
            assert relative_error(out.reads[kind], mean) < 1e-4, (adapter, kind)
    assert name == "none" or reference.responses != generated("transformers", "none").responses


@pytest.mark.parametrize("adapter_name", ADAPTERS)
def test_a_padded_row_equals_the_prompt_alone(adapter_name: str) -> None:
    batch = generated(adapter_name, "add")
    alone = opened(adapter_name).generate(prompts()[1:2], Sampling(NEW_TOKENS), edit_sets()["add"], Read.means())
    assert alone.responses[0] == batch.responses[1]
    for name, value in alone.reads.items():
        assert relative_error(batch.reads[name][1:2], value) < 1e-4


def test_the_fingerprints_name_one_model() -> None:
    for adapter in OTHERS:
        assert opened(adapter).info.differences(opened("transformers").info) == []
        assert opened(adapter).end_ids == opened("transformers").end_ids

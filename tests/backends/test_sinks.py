"""Attention sinks: left out of what goes by the residual, on every backend and in every way of running."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend import (
    Backend,
    Condition,
    Edit,
    Operation,
    Positions,
    Read,
    ReadError,
    ReadKind,
    Sampling,
    TokenBatch,
)
from persona_lens.backend.editing import first_tokens
from persona_lens.backend.edits import apply_edit
from persona_lens.backend.sinks import sink_limits, sinks_of
from persona_lens.finetuning.edits import TrainingEdits
from tests.backends.fixtures import (
    ADAPTERS,
    ALL_ACTIVATIONS,
    PROMPTS,
    RESPONSES,
    TEXT,
    activations,
    assert_close,
    backend_of,
    direction,
    encode,
)
from tests.tiny import N_LAYERS, device, tiny_model

pytestmark = pytest.mark.cuda

MASSIVE = encode("h")[0][0]  # first in the first prompt, within the third prompt and in the second response
NORMS = Read(ReadKind.NORMS)
LAYER = 1
V = direction(3)


def massive_model(architecture: str = "llama") -> Any:
    """A model in which one token's residual is 60 times as long as others', wherever it stands."""
    model: Any = tiny_model(architecture)
    with torch.no_grad():
        model.get_input_embeddings().weight[MASSIVE] *= 300
    return model


@cache
def massive(adapter: str) -> Backend:
    return backend_of(adapter, massive_model())


def sinks_by_hand(text: TokenBatch = TEXT) -> Tensor:
    """Of the padded batch: bool [batch, width]."""
    width = max(text.lengths)
    found = torch.zeros(len(text), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(text.prompts, text.responses, strict=True)):
        ids = (*prompt, *response)
        for place, token in enumerate(ids):
            found[row, width - len(ids) + place] = place == 0 or token == MASSIVE
    return found


GOING_BY_THE_RESIDUAL = {
    "ablate": Edit.ablate(LAYER, V),
    "cap": Edit.cap(LAYER, V, -1.0),
    "floor": Edit.floor(LAYER, V, 1.0),
    "affine": Edit.affine(LAYER, V, 0.5),
    "a relative step": Edit.add(LAYER, V, 0.3, relative=True),
    "a condition": dataclasses.replace(Edit.add(LAYER, V), condition=Condition(LAYER, V, -1e9)),
    "a condition before": dataclasses.replace(Edit.add(LAYER, V), condition=Condition(0, V, -1e9)),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", GOING_BY_THE_RESIDUAL)
def test_what_goes_by_the_residual_leaves_sinks_out(adapter: str, name: str) -> None:
    backend, edit = massive(adapter), GOING_BY_THE_RESIDUAL[name]
    plain = activations(backend)[:, LAYER]
    sinks = sinks_by_hand()
    assert_close(activations(backend, edits=[edit])[:, LAYER], apply_edit(plain, edit, ~sinks))
    taken_in = dataclasses.replace(edit, sinks=True)
    assert_close(activations(backend, edits=[taken_in])[:, LAYER], apply_edit(plain, edit, None))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_step_of_the_vectors_own_length_moves_every_token(adapter: str) -> None:
    backend, edit = massive(adapter), Edit.add(LAYER, V)
    plain = activations(backend)[:, LAYER]
    assert_close(activations(backend, edits=[edit])[:, LAYER], apply_edit(plain, edit, None))
    assert edit == dataclasses.replace(edit, sinks=True)
    assert Edit.ablate(LAYER, V) != dataclasses.replace(Edit.ablate(LAYER, V), sinks=True)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_is_the_same_cached_alone_and_over_finished_text(adapter: str) -> None:
    backend = massive(adapter)
    # Every response is written over with massive tokens, so that sinks also come while generating.
    towards = massive_model().get_output_embeddings().weight[MASSIVE].detach()
    edits = [Edit.add(N_LAYERS - 1, towards, 50.0, Positions.GENERATING), Edit.ablate(0, V), Edit.cap(LAYER, V, 0.0)]
    reads = (*Read.means(), Read(ReadKind.RESPONSE_NORM), ALL_ACTIVATIONS, NORMS)
    made = backend.generate(PROMPTS, Sampling(4), edits, reads)
    assert all(MASSIVE in response for response in made.responses)
    text = TokenBatch.of(PROMPTS, made.responses)
    again = backend.generate(PROMPTS, Sampling(4, use_cache=False), edits, reads)
    assert again.responses == made.responses
    assert_close(again.reads, made.reads)
    assert_close(backend.forward(text, edits, reads).reads, made.reads)
    for row in range(3):
        alone = backend.generate(PROMPTS[row : row + 1], Sampling(4), edits, reads)
        assert_close(alone.reads["prompt_mean"], made.reads["prompt_mean"][row : row + 1])
        assert_close(alone.reads["response_norm"], made.reads["response_norm"][row : row + 1])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_means_of_prompts_and_norms_leave_sinks_out(adapter: str) -> None:
    backend = massive(adapter)
    text = TokenBatch.of(PROMPTS, RESPONSES)
    means = (*Read.means(), Read(ReadKind.RESPONSE_NORM))
    found = backend.forward(text, (), (*means, ALL_ACTIVATIONS, NORMS)).reads
    whole = backend.forward(text, (), (*Read.means(sinks=True), Read(ReadKind.RESPONSE_NORM, sinks=True))).reads
    alone = backend.forward(text, (), Read.means()).reads  # where prompts may run once for many rows
    h, norms, sinks = found["activations"], found["norms"], sinks_by_hand()
    assert_close(norms, h.norm(dim=-1))
    width = h.shape[2]
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        among = torch.zeros(width, dtype=torch.bool)
        among[width - len(prompt) - len(response) : width - len(response)] = True
        said = torch.zeros(width, dtype=torch.bool)
        said[width - len(response) :] = True
        assert_close(whole["prompt_mean"][row], h[row, :, among].mean(dim=1))
        assert_close(whole["response_norm"][row], norms[row, :, said].mean(dim=1))
        assert_close(found["response_norm"][row], norms[row, :, said & ~sinks[row]].mean(dim=1))
        assert_close(found["response_mean"][row], h[row, :, said].mean(dim=1))
        if row == 1:  # one token, and it is the first
            assert found["prompt_mean"][row].isnan().all()
        else:
            assert_close(found["prompt_mean"][row], h[row, :, among & ~sinks[row]].mean(dim=1))
    assert_close(alone["prompt_mean"], found["prompt_mean"])
    twice = backend.forward(TokenBatch.of(PROMPTS * 2, RESPONSES * 2), (), means).reads  # and here they do
    for name in ("prompt_mean", "response_norm", "response_mean"):
        assert_close(twice[name], torch.cat([found[name]] * 2))


@pytest.mark.module
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_training_edits_leave_sinks_out(adapter: str) -> None:
    backend = massive(adapter)
    module, edit = backend.module, Edit.ablate(LAYER, V)  # type: ignore[attr-defined]
    text = TokenBatch.of([PROMPTS[2]])
    want = activations(backend, text, [edit])[0, N_LAYERS - 1]
    seen: list[Tensor] = []
    ids = torch.tensor([PROMPTS[2]], device=device)
    with torch.no_grad(), backend.editing([edit]):
        seen.append(module(input_ids=ids, output_hidden_states=True, use_cache=False).logits)
    spared = dataclasses.replace(edit, sinks=True)
    with torch.no_grad(), backend.editing([spared]):
        seen.append(module(input_ids=ids, use_cache=False).logits)
    assert float((seen[0] - seen[1]).abs().max()) > 1e-3
    logprobs = backend.forward(TokenBatch.of([PROMPTS[2][:-1]], [PROMPTS[2][-1:]]), [edit], logprobs=True).logprobs
    assert logprobs is not None
    if adapter != "transformer_lens":  # whose hook points are not told which token comes first
        assert_close(seen[0][0, -2].log_softmax(-1)[PROMPTS[2][-1]].cpu(), logprobs[0][0])
    assert want.isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_finetuning_leaves_sinks_out_padded_and_checkpointed(architecture: str, checkpointing: bool) -> None:
    model = massive_model(architecture)
    edit = Edit.ablate(LAYER, V)
    backend = backend_of("transformers", model)
    want = activations(backend, TokenBatch.of(PROMPTS), [edit])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    width = max(map(len, PROMPTS))
    ids = torch.zeros(3, width, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):  # padded on the right, as trainers do
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt, device=device), 1
    model.train()
    kept: list[Tensor] = []
    handle = model.base_model.get_submodule("h" if architecture == "gpt2" else "layers")[N_LAYERS - 1]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    editing = TrainingEdits(model, [edit])
    hook = handle.register_forward_hook(lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out))
    with editing:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False)
        out.logits[mask.bool()].square().mean().backward()
    hook.remove()
    for row, prompt in enumerate(PROMPTS):
        assert_close(kept[0][row, : len(prompt)].detach().cpu(), want[row, -1, -len(prompt) :])
    if checkpointing:
        assert_close(kept[-1], kept[0])
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_first_tokens_are_those_that_attend_to_nothing_else_or_have_position_0() -> None:
    h = torch.zeros(2, 3, 4)
    padded = torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    may = (torch.ones(3, 3, dtype=torch.bool).tril() & padded[:, None, :]).unsqueeze(1)
    want = [[True, False, False], [False, True, False]]
    for mask in (may, torch.zeros(may.shape).masked_fill(~may, -torch.inf)):
        found = first_tokens(h, {"attention_mask": mask, "position_ids": torch.arange(3)[None]})
        assert found is not None
        assert found.tolist() == want
    packed = first_tokens(h, {"position_ids": torch.tensor([[0, 1, 0]])})
    assert packed is not None
    assert packed.tolist() == [[True, False, True]] * 2
    assert first_tokens(h, {}) is None


def test_limits_are_constants_of_the_model_and_equal_on_every_backend() -> None:
    limits = [sink_limits(massive(adapter)) for adapter in ADAPTERS]
    assert limits[0] is not None
    assert len(limits[0]) == N_LAYERS
    for other in limits[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(limits[0]), rtol=1e-4, atol=0)
    found = sinks_of(massive("transformers"), TokenBatch.of([PROMPTS[2]]), to_come=1)
    wanted = torch.tensor([place == 0 or token == MASSIVE for place, token in enumerate(PROMPTS[2])] + [False])
    assert torch.equal(found, wanted.expand(N_LAYERS, -1))


def test_only_what_leaves_sinks_out_can_take_them_in() -> None:
    with pytest.raises(ReadError, match="response_mean takes in every token"):
        Read(ReadKind.RESPONSE_MEAN, sinks=True)
    assert not Edit(LAYER, V, Operation.ABLATE, sinks=True).leaves_out_sinks

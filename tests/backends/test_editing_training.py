"""``editing()``: training under edits, on the plain module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from persona_lens.backend import Backend, BackendError, Edit, EditError, Positions
from persona_lens.backend.blocks import find_blocks
from tests.backends.fixtures import D_MODEL, PROMPTS, TEXT, assert_close, backend_of, direction, tiny_backend
from tests.tiny import device, tiny_model

TRAINABLE = ("transformers", "nnsight")


class LowRank(nn.Module):
    """A linear layer with a trainable addition of rank 2, as LoRA puts it; not zero, so that both halves learn."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter((torch.randn(2, inner.in_features, generator=generator) * 0.1).to(device))
        self.up = nn.Parameter((torch.randn(inner.out_features, 2, generator=generator) * 0.1).to(device))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + x @ self.down.T @ self.up.T
        return out


def adapted(adapter: str) -> tuple[Backend, Any, list[LowRank]]:
    module: Any = tiny_model().requires_grad_(False)
    layers = []
    for block in module.model.layers:
        block.mlp.down_proj = LowRank(block.mlp.down_proj)
        layers.append(block.mlp.down_proj)
    return backend_of(adapter, module), module, layers


IDS = torch.tensor([PROMPTS[2][:12], PROMPTS[0] + PROMPTS[1]], device=device)


def loss_of(module: Any) -> Any:
    return module(input_ids=IDS, labels=IDS).loss


def gradients(layers: list[LowRank]) -> list[Tensor]:
    return [p.grad.clone() for layer in layers for p in (layer.down, layer.up) if p.grad is not None]


EDITS = [Edit.add(0, direction(), 0.5), Edit.ablate(1, direction(1))]


@pytest.mark.parametrize("adapter_name", TRAINABLE)
def test_gradients_flow_to_adapters_under_an_edit(adapter_name: str) -> None:
    backend, module, layers = adapted(adapter_name)
    plain = loss_of(module)
    with backend.editing(EDITS):
        edited = loss_of(module)
        edited.backward()
    assert float((edited - plain).detach().abs()) > 1e-3
    got = gradients(layers)
    assert len(got) == 6  # the adapters of every layer, before and behind the edits
    assert all(float(g.abs().max()) > 0 for g in got)
    # The slope that finite differences find under the same edits.
    step, entry = 1e-2, layers[0].up
    with torch.no_grad(), backend.editing(EDITS):
        entry[3, 1] += step
        above = loss_of(module)
        entry[3, 1] -= 2 * step
        below = loss_of(module)
    numeric = float((above - below) / (2 * step))
    assert numeric == pytest.approx(float(got[1][3, 1]), rel=0.05, abs=1e-4)


@pytest.mark.parametrize("adapter_name", TRAINABLE)
def test_a_step_under_edits_learns(adapter_name: str) -> None:
    backend, module, layers = adapted(adapter_name)
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters() if p.requires_grad], lr=0.05)
    losses = []
    with backend.editing(EDITS):
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_of(module)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("adapter_name", TRAINABLE)
def test_gradients_flow_to_the_direction(adapter_name: str) -> None:
    backend, module, _ = adapted(adapter_name)
    vector = direction().requires_grad_()
    with backend.editing([Edit.add(1, vector)]):
        loss_of(module).backward()
    assert vector.grad is not None
    assert float(vector.grad.abs().max()) > 0


@pytest.mark.parametrize("adapter_name", TRAINABLE)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(adapter_name: str, reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        backend, module, layers = adapted(adapter_name)
        module.train()
        if checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": reentrant})
            module.enable_input_require_grads()
        with backend.editing(EDITS):
            loss = loss_of(module)
            loss.backward()
        results.append((loss.detach(), gradients(layers)))
    assert_close(results[0][0], results[1][0])
    assert len(results[1][1]) == 6
    for plain, checkpointed in zip(results[0][1], results[1][1], strict=True):
        assert_close(checkpointed, plain)


@pytest.mark.parametrize("adapter_name", TRAINABLE)
def test_edits_are_gone_after_the_context_and_after_an_exception(adapter_name: str) -> None:
    backend, module, _ = adapted(adapter_name)
    with torch.no_grad():
        before = loss_of(module)
        with backend.editing(EDITS):
            assert not torch.equal(loss_of(module), before)
        assert torch.equal(loss_of(module), before)
        with pytest.raises(LookupError), backend.editing(EDITS):
            raise LookupError
        assert torch.equal(loss_of(module), before)
    assert not any(block._forward_hooks for block in find_blocks(module)[1])


@pytest.mark.parametrize("adapter_name", TRAINABLE)
def test_editing_does_what_forward_does(adapter_name: str) -> None:
    backend = tiny_backend(adapter_name)
    text = TEXT.rows(0, 1)
    expected = backend.forward(text, EDITS, logprobs=True).logprobs
    module: Any = tiny_model()
    ids = torch.tensor([text.prompts[0] + text.responses[0]], device=device)
    with torch.no_grad(), backend_of(adapter_name, module).editing(EDITS):
        logprobs = module(input_ids=ids).logits[0].log_softmax(dim=-1)
    start = len(text.prompts[0])
    assert expected is not None
    assert_close(expected[0], logprobs[range(start - 1, ids.shape[1] - 1), ids[0, start:]].cpu())


@pytest.mark.parametrize("adapter_name", TRAINABLE)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit.add(0, direction(), 1.0, Positions.RESPONSE), "editing.. cannot tell prompt from response"),
        (Edit.add(0, direction(), 1.0, torch.ones(2, 12, dtype=torch.bool)), "positions mask has 2 rows"),
        (Edit.add(0, direction(), torch.ones(2)), "coefficient has 2 rows"),
        (Edit.add(7, direction()), "layer 7 does not exist: the model has layers 0 to 2"),
        (Edit.add(0, torch.ones(3)), f"direction has 3 entries, the model's d_model is {D_MODEL}"),
    ],
)
def test_edits_that_training_cannot_place_are_refused(adapter_name: str, edit: Edit, message: str) -> None:
    with pytest.raises(EditError, match=message), tiny_backend(adapter_name).editing([edit]):
        pass


def test_transformer_lens_refuses_with_the_reason() -> None:
    with pytest.raises(BackendError, match=r"adapters trained on it are saved under wrong names; train through the"):
        tiny_backend("transformer_lens").editing(EDITS)

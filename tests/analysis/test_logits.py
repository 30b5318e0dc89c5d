"""The logit found against the models' own final norms and unembeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.logit_lens import lens
from persona_lens.backend import Backend, Read, ReadKind, TokenBatch
from persona_lens.backend.blocks import module_of
from persona_lens.backend.readout import FrozenNorm, ReadoutError, find_readout
from persona_lens.vectors import PersonaVectors, VectorsError
from tests.backends.fixtures import ADAPTERS, backend_of, tiny_backend
from tests.tiny import D_MODEL, N_LAYERS, tiny_model

PROMPTS = [(5, 6, 7, 8), (9, 10), (11, 12, 13)]
FINAL = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gemma2": "model.norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
}


def with_gains(architecture: str) -> Any:
    """A tiny model whose final norm has a gain, and a bias where it has one at all."""
    module = tiny_model(architecture)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.get_submodule(FINAL[architecture]).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def vectors_of(backend: Backend) -> PersonaVectors:
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(1))
    return PersonaVectors("planted", backend.info, {"response_mean": rows})


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("architecture", FINAL)
def test_the_shift_is_the_models_own_derivative_where_the_scale_does_not_change(
    adapter: str, architecture: str
) -> None:
    """Along directions at right angles to the residual a norm's scale stands still, so freezing it changes nothing."""
    backend = backend_of(adapter, with_gains(architecture))
    module: Any = module_of(backend)
    last = Read(ReadKind.PROMPT_LAST, (N_LAYERS - 1,))
    h = backend.forward(TokenBatch.of(PROMPTS[:1]), (), [last]).reads["prompt_last"][0, 0].double()
    v = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for other in torch.linalg.qr(torch.stack([h, torch.ones_like(h)], dim=1))[0].T:
        v = v - (v @ other) * other
    norm, head = module.get_submodule(FINAL[architecture]), module.get_output_embeddings()
    with torch.no_grad():
        around = torch.stack([h + 0.01 * v, h - 0.01 * v]).float().unsqueeze(0)
        up, down = head(norm(around))[0]
    readout = find_readout(module)
    assert readout.norm is not None
    found = readout.shifts(v.float().unsqueeze(0), float(readout.norm.scale(h)))[0]
    torch.testing.assert_close(found, ((up - down) / 0.02).float(), rtol=2e-3, atol=2e-3 * float(found.abs().max()))


def test_a_norms_gain_and_kind_are_measured_however_it_keeps_them() -> None:
    layer_norm = nn.LayerNorm(8)
    with torch.no_grad():
        layer_norm.weight.copy_(torch.arange(8.0))
        layer_norm.bias.fill_(3)
    found = FrozenNorm.of(layer_norm, 8)
    assert found.centred
    torch.testing.assert_close(found.gain, torch.arange(8.0), rtol=1e-4, atol=1e-4)
    gemma: Any = with_gains("gemma2").model.norm
    of_gemma = FrozenNorm.of(gemma, D_MODEL)
    assert not of_gemma.centred
    torch.testing.assert_close(of_gemma.gain, 1 + gemma.weight.detach(), rtol=1e-4, atol=1e-4)
    half = FrozenNorm.of(layer_norm.to(torch.bfloat16), 8)
    torch.testing.assert_close(half.gain, torch.arange(8.0), rtol=1e-2, atol=2e-2)


def test_the_lens_ranks_tokens_by_their_shift_and_stands_beside_random_directions() -> None:
    backend = backend_of("transformers", with_gains("llama"))
    vectors = vectors_of(backend)
    found = lens(backend, vectors, [0, 2], PROMPTS, top=4)
    assert [each.layer for each in found.layers] == [0, 2]
    readout = find_readout(module_of(backend))
    shifts = readout.shifts(vectors[2].unsqueeze(0), found.scale)[0]
    centred = shifts - shifts.mean()
    top = found.layers[1]
    assert [token.id for token in top.promoted] == centred.topk(4).indices.tolist()
    assert [token.id for token in top.suppressed] == (-centred).topk(4).indices.tolist()
    assert top.promoted[0].shift == pytest.approx(float(centred.max()), rel=1e-4)
    assert top.promoted[0].text == backend.tokenizer.decode([top.promoted[0].id])
    assert 0 < top.random_most <= top.random_limit
    assert top.norm == pytest.approx(float(vectors[2].norm()))
    double = lens(backend, vectors * 2.0, [2], PROMPTS, top=4).layers[0]
    assert double.promoted[0].shift == pytest.approx(2 * top.promoted[0].shift, rel=1e-4)
    assert double.random_most == pytest.approx(2 * top.random_most, rel=1e-4)


def test_a_token_whose_row_the_vector_is_comes_first() -> None:
    backend = tiny_backend("transformers")
    readout = find_readout(module_of(backend))
    assert readout.norm is not None
    rows: Tensor = readout.unembedding.detach().float()
    v = (rows[42] - rows.mean(dim=0)) / readout.norm.gain
    vectors = PersonaVectors("token", backend.info, {"response_mean": v.repeat(N_LAYERS, 1) * 50})
    layer = lens(backend, vectors, [1], PROMPTS).layers[0]
    assert layer.promoted[0].id == 42
    assert layer.promoted[0].shift > layer.random_limit


def test_what_makes_no_sense_is_refused() -> None:
    backend = tiny_backend("transformers")
    vectors = vectors_of(backend)
    with pytest.raises(AnalysisError, match="at least one layer"):
        lens(backend, vectors, [], PROMPTS)
    with pytest.raises(AnalysisError, match="at least one layer"):
        lens(backend, vectors, [1], [])
    rows = torch.zeros(N_LAYERS, D_MODEL).index_fill(0, torch.tensor([0]), 1.0)
    zero = PersonaVectors("none", backend.info, {"response_mean": rows})
    with pytest.raises(VectorsError, match="'none' at layer 1 is zero"):
        lens(backend, zero, [1], PROMPTS)
    with pytest.raises(VectorsError, match="layer 7"):
        lens(backend, vectors, [7], PROMPTS)


def test_a_model_with_more_than_a_norm_before_the_unembedding_is_refused() -> None:
    module: Any = tiny_model()
    head = module.lm_head

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = head

        def forward(self, h: Tensor) -> Tensor:
            projected: Tensor = self.inner(h)
            return projected

    hook = module.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    with pytest.raises(ReadoutError, match="something other than one norm"):
        find_readout(module)
    hook.remove()
    module.set_output_embeddings(Projected())
    assert find_readout(module).unembedding.shape == head.weight.shape
    module.get_output_embeddings = lambda: None
    with pytest.raises(ReadoutError, match="no unembedding"):
        find_readout(module)

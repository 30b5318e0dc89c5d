"""Cosines in chunks, from memory and from files, and the sparse reconstruction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.dissection import features as features_module
from persona_lens.analysis.dissection.decomposition import decoder_cosines, pursue, rank
from persona_lens.analysis.dissection.features import FileDecoder, TensorDecoder
from tests.analysis.dictionaries import dictionary, directions
from tests.tiny import D_MODEL


@pytest.mark.parametrize("chunk", [1, 7, 13, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosines_are_the_same_however_the_decoder_is_read(
    chunk: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = directions(41).to(dtype)
    save_file({"W_dec": rows, "W_enc": rows.T.contiguous()}, tmp_path / "sae.safetensors")
    vectors = directions(3, seed=5)
    want = torch.nn.functional.cosine_similarity(vectors.unsqueeze(1), rows.float().unsqueeze(0), dim=-1)
    monkeypatch.setattr(features_module, "CHUNK_VALUES", chunk * D_MODEL)
    for decoder in (TensorDecoder(rows), FileDecoder(tmp_path / "sae.safetensors")):
        assert decoder.shape == (41, D_MODEL)
        torch.testing.assert_close(decoder_cosines(decoder, vectors), want, rtol=1e-5, atol=1e-6)


def test_a_decoder_is_read_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Watched(TensorDecoder):
        def rows(self, start: int, stop: int) -> torch.Tensor:
            asked.append((start, stop))
            return super().rows(start, stop)

    monkeypatch.setattr(features_module, "CHUNK_VALUES", 16 * D_MODEL)
    decoder_cosines(Watched(directions(40)), directions(1))
    assert asked == [(0, 16), (16, 32), (32, 40)]


def test_both_ends_come_in_order_beside_what_random_directions_reach() -> None:
    rows = directions(30)
    rows[4], rows[9], rows[11] = 2 * torch.eye(D_MODEL)[0], -torch.eye(D_MODEL)[0], 0.0
    vectors = torch.cat([torch.eye(D_MODEL)[:1], directions(5, seed=8)])
    cosines = decoder_cosines(TensorDecoder(rows), vectors)
    found = rank(cosines[0], 3, cosines[1:])
    assert (found.top[0].feature, found.bottom[0].feature) == (4, 9)
    assert (found.top[0].cosine, found.bottom[0].cosine) == pytest.approx((1, -1))
    assert [each.cosine for each in found.top] == sorted((each.cosine for each in found.top), reverse=True)
    assert [each.cosine for each in found.bottom] == sorted(each.cosine for each in found.bottom)
    assert (found.features, found.zero) == (30, 1)
    want = sorted(cosines[1:].nan_to_num(nan=-2).amax(dim=1).tolist(), reverse=True)
    assert list(found.random_top) == pytest.approx(want)
    assert len(rank(cosines[0], 99).top) == 29
    assert 11 not in {each.feature for each in rank(cosines[0], 99).top}


def test_what_has_no_cosine_is_refused() -> None:
    decoder = TensorDecoder(directions(5))
    with pytest.raises(AnalysisError, match="width 3 do not fit a decoder of width 32"):
        decoder_cosines(decoder, torch.ones(1, 3))
    for bad in (torch.zeros(1, D_MODEL), torch.full((1, D_MODEL), torch.nan)):
        with pytest.raises(AnalysisError, match="zero or not finite"):
            decoder_cosines(decoder, bad)
    with pytest.raises(AnalysisError, match="no feature of this dictionary has a direction"):
        rank(decoder_cosines(TensorDecoder(torch.zeros(4, D_MODEL)), torch.ones(1, D_MODEL))[0], 2)
    with pytest.raises(AnalysisError, match="at least one feature"):
        rank(torch.ones(3), 0)


def test_files_that_are_no_decoders_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file({"W_dec": directions(6), "flat": torch.ones(4)}, good)
    content = good.read_bytes()
    for name, broken in {"cut": content[: len(content) // 2], "text": b"{}", "empty": b""}.items():
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(AnalysisError, match=f"{name} is not a safetensors file, or is damaged"):
            FileDecoder(tmp_path / name)
    with pytest.raises(AnalysisError, match="holds no decoder 'other'; it holds W_dec, flat"):
        FileDecoder(good, "other")
    with pytest.raises(AnalysisError, match=r"must be \[features, d_model\], got \[4\]"):
        FileDecoder(good, "flat")
    with pytest.raises(AnalysisError, match="is not a safetensors file"):
        FileDecoder(tmp_path / "missing")


def test_a_pursuit_finds_what_a_vector_was_made_of() -> None:
    features = dictionary(directions(60))
    parts = {7: 2.0, 31: -1.5, 50: 1.0}
    vector = sum(weight * features.unit(i) for i, weight in parts.items())
    assert isinstance(vector, torch.Tensor)
    cosines = decoder_cosines(features.decoder, vector.unsqueeze(0))[0]
    found = pursue(features, vector, cosines, 10)
    assert set(found.features[:3]) == set(parts)
    assert found.shares[2] == pytest.approx(1, abs=1e-6)
    assert len(found.features) == 3, "nothing is left for a fourth"
    length = float(vector.norm())
    weights = {i: c * length for i, c in zip(found.features, found.coefficients, strict=True)}
    assert weights == pytest.approx(parts, abs=1e-4)
    assert found.exact
    assert list(found.shares) == sorted(found.shares)


def test_a_pursuit_is_that_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features = dictionary(directions(80))
    units = torch.stack([features.unit(i) for i in range(80)])
    vector = directions(1, seed=9)[0]
    cosines = decoder_cosines(features.decoder, vector.unsqueeze(0))[0]
    found = pursue(features, vector, cosines, 12)
    coefficients = linear_model.orthogonal_mp(units.double().T.numpy(), vector.double().numpy(), n_nonzero_coefs=12)
    assert set(found.features) == set(coefficients.nonzero()[0].tolist())
    assert [coefficients[i] / float(vector.norm()) for i in found.features] == pytest.approx(
        found.coefficients, abs=1e-4
    )
    left = vector.double() - torch.from_numpy(coefficients) @ units.double()
    assert found.shares[-1] == pytest.approx(1 - float(left @ left / (vector.double() @ vector.double())), abs=1e-5)


def test_a_pursuit_among_fewer_candidates_says_so_and_leaves_out_zero_directions() -> None:
    rows = directions(50)
    rows[3] = 0
    features = dictionary(rows)
    vector = directions(1, seed=9)[0]
    cosines = decoder_cosines(features.decoder, vector.unsqueeze(0))[0]
    few = pursue(features, vector, cosines, 5, candidates=10)
    assert (few.candidates, few.exact) == (10, False)
    assert set(few.features) <= set(cosines.abs().nan_to_num(nan=-1).topk(10).indices.tolist())
    every = pursue(features, vector, cosines, 200)
    assert 3 not in every.features
    assert len(every.features) <= D_MODEL
    assert every.shares[-1] == pytest.approx(1, abs=1e-6)
    with pytest.raises(AnalysisError, match="at least one feature"):
        pursue(features, vector, cosines, 0)

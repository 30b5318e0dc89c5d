"""Layers of one trait, components of many, two makings of one: known by hand, and held against random directions."""

from __future__ import annotations

import json
from dataclasses import replace
from math import sqrt

import pytest
import torch

from persona_lens.backend import ModelInfo
from persona_lens.vectors import PersonaVectors, VectorsError
from persona_lens.vectors.geometry import GeometryError, layer_cosines, likeness, principal_components

INFO = ModelInfo("m", None, "A", 3, 64, "sha256:a", "float32", "cpu", "b")


def vectors(rows: torch.Tensor, info: ModelInfo = INFO, trait: str = "t") -> PersonaVectors:
    return PersonaVectors(trait, info, {"response_mean": rows})


def planted(*pairs: tuple[float, float]) -> PersonaVectors:
    rows = torch.zeros(3, 64)
    rows[:, :2] = torch.tensor(pairs)
    return vectors(rows)


def test_layers_are_compared_with_one_another() -> None:
    found = layer_cosines(planted((2, 0), (3, 4), (0, 0)))
    expected = torch.tensor([[1, 0.6], [0.6, 1]])
    torch.testing.assert_close(found[:2, :2], expected)
    assert found[2].isnan().all()
    with pytest.raises(VectorsError, match="no reduction 'prompt_mean'"):
        layer_cosines(planted((2, 0), (3, 4), (0, 0)), "prompt_mean")


def test_two_makings_are_compared_layer_by_layer() -> None:
    found = likeness(planted((2, 0), (0, 1), (1, 0)), planted((3, 4), (0, -3), (0, 0)))
    torch.testing.assert_close(found.cosines[:2], torch.tensor([0.6, -1.0]))
    torch.testing.assert_close(found.lengths, torch.tensor([2.5, 3.0, 0.0]))
    assert found.cosines[2].isnan()
    assert found.null_std == 1 / 8
    assert found.different_models == ()
    written = found.to_json()
    assert written["cosines"][2] is None
    json.dumps(written, allow_nan=False)


def test_two_models_are_compared_only_if_that_is_meant_and_possible() -> None:
    one = planted((2, 0), (0, 1), (1, 0))
    tuned = vectors(one.rows(), replace(INFO, weights="sha256:b"))
    with pytest.raises(GeometryError, match=r"different models .weights.*allow_other_model .--allow-other-model."):
        likeness(one, tuned)
    found = likeness(one, tuned, allow_other_model=True)
    assert found.different_models == ("weights: sha256:a and sha256:b",)
    assert found.cosines.tolist() == pytest.approx([1, 1, 1])
    smaller = vectors(torch.ones(2, 64), replace(INFO, n_layers=2))
    with pytest.raises(GeometryError, match="3 layers of 64, and 2 of 64"):
        likeness(one, smaller, allow_other_model=True)


def test_components_of_a_plane_are_two() -> None:
    angles = torch.linspace(0, 5, 6)
    named = {}
    for number, angle in enumerate(angles):
        rows = torch.ones(3, 64)
        rows[1] = 0
        rows[1, 4], rows[1, 9], rows[1, 20] = 3 * angle.cos(), 3 * angle.sin(), 10
        named[str(number)] = vectors(rows * (number + 1))
    found = principal_components(named, 1)
    assert found.explained[:2].sum() == pytest.approx(1, abs=1e-5)
    assert found.explained[0] > found.explained[1] > 0.01
    assert len(found.explained) == 5, "one less than the vectors, since their mean is subtracted"
    assert found.directions[:2, [4, 9, 20]].norm(dim=-1).tolist() == pytest.approx([1, 1], abs=1e-4)
    units = torch.stack([each.vector(1) / each.vector(1).norm() for each in named.values()])
    back = found.coordinates @ found.directions + units.mean(dim=0)
    torch.testing.assert_close(back, units, atol=1e-5, rtol=0)
    biggest = found.coordinates.abs().argmax(dim=0)
    assert (found.coordinates[biggest, range(5)][:2] > 0).all(), "signs are settled"
    json.dumps(found.to_json(), allow_nan=False)


def test_what_the_traits_share_is_a_component_only_if_it_is_left_in() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(64, generator=generator) * 5
    named = {str(i): vectors((shared + torch.randn(3, 64, generator=generator)).float()) for i in range(6)}
    left_in = principal_components(named, 0, centred=False)
    taken_out = principal_components(named, 0)
    direction = shared / shared.norm()
    assert abs(float(left_in.directions[0] @ direction)) > 0.99
    assert left_in.explained[0] > 0.9 > taken_out.explained[0]
    raw = {name: each * (10.0 if name == "3" else 1.0) for name, each in named.items()}
    assert principal_components(raw, 0, normalised=False).explained[0] > 0.9
    torch.testing.assert_close(principal_components(raw, 0).explained, taken_out.explained)


def test_random_directions_stay_below_their_own_null() -> None:
    beyond = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        named = {str(i): vectors(torch.randn(3, 64, generator=generator)) for i in range(5)}
        found = principal_components(named, 0)
        beyond += bool(found.explained[0] > found.random_explained[0])
    assert beyond <= 6, "5% of 40 are 2"
    assert found.random_explained[0] > 1 / 4 > found.random_explained[3]


def test_components_need_several_vectors_of_one_model() -> None:
    one = planted((2, 0), (0, 1), (1, 0))
    with pytest.raises(GeometryError, match="2 vectors have no components worth the name"):
        principal_components({"a": one, "b": one}, 0)
    other = vectors(one.rows(), replace(INFO, weights="sha256:b"))
    with pytest.raises(GeometryError, match="different models"):
        principal_components({"a": one, "b": one, "c": other}, 0)
    with pytest.raises(VectorsError, match="layer 3 does not exist"):
        principal_components({"a": one, "b": one, "c": one}, 3)
    assert sqrt(one.model.d_model) == 8

"""Cosines: known angles, every layer on its own, and the null that random directions really have."""

from __future__ import annotations

import json
from dataclasses import replace
from math import nan, sqrt

import pytest
import torch

from persona_lens.backend import ModelInfo
from persona_lens.vectors import PersonaVectors, VectorsError
from persona_lens.vectors.geometry import CHANCE, GeometryError, cosines

INFO = ModelInfo("m", None, "A", 2, 64, "sha256:a", "float32", "cpu", "b")


def vectors(rows: torch.Tensor, info: ModelInfo = INFO) -> PersonaVectors:
    return PersonaVectors("t", info, {"response_mean": rows, "prompt_last": rows.roll(1, 0)})


def planted(layer0: tuple[float, float], layer1: tuple[float, float]) -> PersonaVectors:
    rows = torch.zeros(2, 64)
    rows[0, :2], rows[1, :2] = torch.tensor(layer0), torch.tensor(layer1)
    return vectors(rows)


def test_cosines_are_those_of_the_angles_layer_by_layer() -> None:
    found = cosines({"a": planted((2, 0), (0, 1)), "b": planted((3, 4), (0, -7)), "c": planted((0, 9), (1, 1))})
    assert found.traits == ("a", "b", "c")
    expected = torch.tensor(
        [
            [[1, 0.6, 0], [0.6, 1, 0.8], [0, 0.8, 1]],
            [[1, -1, sqrt(0.5)], [-1, 1, -sqrt(0.5)], [sqrt(0.5), -sqrt(0.5), 1]],
        ]
    )
    torch.testing.assert_close(found.cosines, expected)
    assert found.cosines.abs().max() <= 1
    other = cosines({"a": planted((2, 0), (0, 1)), "b": planted((3, 4), (0, -7))}, "prompt_last")
    torch.testing.assert_close(other.cosines[:, 0, 1], torch.tensor([-1, 0.6]))


def test_the_null_is_what_random_directions_have() -> None:
    generator = torch.Generator().manual_seed(0)
    many = {str(i): vectors(torch.randn(2, 64, generator=generator)) for i in range(60)}
    found = cosines(many)
    above = found.cosines[:, *torch.triu_indices(60, 60, 1)]
    assert found.null_std == 1 / 8
    assert float(above.std()) == pytest.approx(found.null_std, rel=0.05)
    assert float((above.abs() < CHANCE * found.null_std).float().mean()) == pytest.approx(0.95, abs=0.02)


def test_a_zero_vector_has_no_cosine() -> None:
    found = cosines({"a": planted((0, 0), (1, 0)), "b": planted((1, 0), (1, 0))})
    assert found.cosines[0].isnan().tolist() == [[True, True], [True, False]]
    written = found.to_json()
    assert written["cosines"][0] == [[None, None], [None, 1.0]]
    assert written["cosines"][1] == [[1.0, 1.0], [1.0, 1.0]]
    assert (written["traits"], written["d_model"], written["null_std"]) == (["a", "b"], 64, 0.125)
    json.dumps(written, allow_nan=False)
    assert nan not in written["cosines"][0][0]


def test_what_cannot_be_compared_is_refused() -> None:
    one = planted((1, 0), (1, 0))
    with pytest.raises(GeometryError, match="no vectors"):
        cosines({})
    other = vectors(one.directions["response_mean"], replace(INFO, weights="sha256:b"))
    with pytest.raises(GeometryError, match=r"'a' and 'b' belong to different models.*sha256:a and sha256:b"):
        cosines({"a": one, "b": other})
    with pytest.raises(VectorsError, match="no reduction 'prompt_mean'"):
        cosines({"a": one}, "prompt_mean")

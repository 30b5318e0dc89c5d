"""Edits: the plain functions, what they validate, and what they are as data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_lens.backend import Backend, Edit, EditError, Operation, Positions, Sampling
from persona_lens.backend.edits import apply_edit, check_edits
from persona_lens.backend.hooked import editing_blocks
from persona_lens.backend.residual import ablate, add, cap
from tests.backends.fixtures import D_MODEL, PROMPTS, TEXT, activations, assert_close, backend_of, direction
from tests.tiny import tiny_model

WIDTH = 6


def tensors(*shape: int) -> st.SearchStrategy[Tensor]:
    """Normal numbers of a size between 1e-3 and 1e3, in any order of magnitude."""

    def make(seed: int, exponent: float) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 10**exponent

    return st.builds(make, st.integers(0, 2**31), st.floats(-3, 3))


residuals = tensors(2, 5, WIDTH)
directions = tensors(WIDTH)
coefficients = st.floats(-10, 10)


def column(value: float) -> Tensor:
    return torch.full((1, 1, 1), value)


@settings(max_examples=40, deadline=None)
@given(residuals, directions, coefficients)
def test_adding_then_subtracting_is_the_identity(h: Tensor, v: Tensor, c: float) -> None:
    back = add(add(h, v, column(c)), v, column(-c))
    scale = float(h.abs().max() + abs(c) * v.abs().max())
    torch.testing.assert_close(back, h, rtol=0, atol=1e-6 * scale)


@settings(max_examples=40, deadline=None)
@given(residuals, directions)
def test_ablation_leaves_no_projection_and_nothing_else_changes(h: Tensor, v: Tensor) -> None:
    unit = v / v.norm()
    out = ablate(h, v)
    scale = float(h.norm(dim=-1).max())
    assert float((out @ unit).abs().max()) <= 1e-5 * scale
    torch.testing.assert_close(out + (h @ unit).unsqueeze(-1) * unit, h, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(ablate(out, v), out, rtol=0, atol=1e-5 * scale)


@settings(max_examples=40, deadline=None)
@given(residuals, directions, st.floats(-100, 100))
def test_a_cap_is_never_exceeded_and_what_is_below_stays(h: Tensor, v: Tensor, threshold: float) -> None:
    unit = v / v.norm()
    before, after = h @ unit, cap(h, v, threshold) @ unit
    scale = float(h.norm(dim=-1).max()) + abs(threshold)
    assert float(after.max()) <= threshold + 1e-5 * scale
    below = before <= threshold
    assert torch.equal(cap(h, v, threshold)[below], h[below])
    torch.testing.assert_close(after[~below], torch.full_like(after[~below], threshold), rtol=0, atol=1e-5 * scale)


@settings(max_examples=40, deadline=None)
@given(residuals, directions, st.lists(st.booleans(), min_size=10, max_size=10), st.sampled_from(Operation))
def test_exactly_the_named_positions_change(h: Tensor, v: Tensor, named: list[bool], operation: Operation) -> None:
    where = torch.tensor(named).reshape(2, 5)
    edit = {
        Operation.ADD: Edit.add(0, v, 1.5),
        Operation.ABLATE: Edit.ablate(0, v),
        Operation.CAP: Edit.cap(0, v, -1e6),  # below every projection
    }[operation]
    original = h.clone()
    out = apply_edit(h, edit, where)
    assert torch.equal(h, original)  # the input is left alone
    assert torch.equal((out != h).any(dim=-1), where)
    assert torch.equal(apply_edit(h, edit, None)[where], out[where])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edit", [Edit.add(0, direction()), Edit.ablate(0, direction()), Edit.cap(0, direction(), 0.1)])
def test_the_residual_keeps_its_precision_and_the_arithmetic_is_float32(dtype: torch.dtype, edit: Edit) -> None:
    h = torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = apply_edit(h, edit, None)
    assert out.dtype == dtype
    exact = apply_edit(h.double(), dataclasses.replace(edit, direction=edit.direction.double()), None)
    # A rounding or two to the residual's precision, no more: not one for each of the terms of a projection.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=eps * float(edit.direction.abs().max()) + 1e-6)


@pytest.mark.parametrize("make", [Edit.add, Edit.ablate, lambda layer, v: Edit.cap(layer, v, 0.1)])
def test_gradients_flow_through_an_edit_to_residual_and_direction(make: Any) -> None:
    h = torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    v = direction().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, v: apply_edit(h, make(0, v), None), (h, v))


def test_each_row_has_its_own_coefficient() -> None:
    h = torch.zeros(3, 2, D_MODEL)
    out = apply_edit(h, Edit.add(0, direction(), torch.tensor([0.0, 1.0, -2.0])), None)
    assert_close(out, torch.tensor([0.0, 1.0, -2.0]).reshape(3, 1, 1) * direction().expand(3, 2, -1))


def test_an_edit_is_frozen_and_compared_by_content() -> None:
    edit = Edit.add(1, direction(), 2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.layer = 2  # type: ignore[misc]
    same = Edit.add(1, direction(), 2.0)
    assert edit == same
    assert hash(edit) == hash(same)
    assert edit.content_hash == same.content_hash
    assert len({edit, same}) == 1
    assert edit != "an edit"


def variants() -> dict[str, Edit]:
    v = direction()
    mask = torch.ones(2, 3, dtype=torch.bool)
    return {
        "add": Edit.add(1, v, 2.0),
        "layer": Edit.add(2, v, 2.0),
        "direction": Edit.add(1, direction(1), 2.0),
        "one entry": Edit.add(1, torch.cat([v[:-1], v[-1:] + 1e-6]), 2.0),
        "coefficient": Edit.add(1, v, 2.0000001),
        "rows": Edit.add(1, v, torch.tensor([2.0, 2.0])),
        "prompt": Edit.add(1, v, 2.0, Positions.PROMPT),
        "mask": Edit.add(1, v, 2.0, mask),
        "other mask": Edit.add(1, v, 2.0, ~mask),
        "other shape of mask": Edit.add(1, v, 2.0, mask.reshape(3, 2)),
        "ablate": Edit.ablate(1, v),
        "cap": Edit.cap(1, v, 2.0),
        "cap elsewhere": Edit.cap(1, v, 3.0),
    }


def test_edits_that_do_different_things_have_different_hashes() -> None:
    hashes = {name: edit.content_hash for name, edit in variants().items()}
    assert len(set(hashes.values())) == len(hashes)
    assert hashes == {name: edit.content_hash for name, edit in variants().items()}


@pytest.mark.usefixtures("unchecked")
def test_numbers_that_are_equal_make_equal_edits() -> None:
    assert Edit(1, direction(), coefficient=2.0).content_hash == Edit(1, direction(), coefficient=2).content_hash


@pytest.mark.parametrize("part", ["direction", "coefficient", "positions"])
def test_a_later_change_of_the_callers_tensors_has_no_effect(part: str) -> None:
    given_ = {
        "direction": direction(),
        "coefficient": torch.tensor([1.0, 2.0]),
        "positions": torch.tensor([[True, False], [False, True]]),
    }
    edit = Edit(1, **given_)  # type: ignore[arg-type]
    before = edit.content_hash
    given_[part].zero_()
    assert edit.content_hash == before


def test_the_copy_of_a_direction_lets_gradients_through() -> None:
    v = direction().requires_grad_()
    (slope,) = torch.autograd.grad(Edit.add(0, v).direction.sum(), v)
    assert torch.equal(slope, torch.ones(D_MODEL))


def test_rows_cut_what_has_rows_and_nothing_else() -> None:
    mask = torch.tensor([[False, True, True], [True, True, True], [False, False, True]])
    edit = Edit.add(1, direction(), torch.tensor([1.0, 2.0, 3.0]), mask)
    cut = edit.rows(1, 3)
    assert isinstance(cut.coefficient, Tensor)
    assert isinstance(cut.positions, Tensor)
    assert cut.coefficient.tolist() == [2.0, 3.0]
    assert torch.equal(cut.positions, mask[1:3])
    narrow = edit.rows(2, 3, width=1)
    assert torch.equal(narrow.positions, torch.tensor([[True]]))  # type: ignore[arg-type]
    plain = Edit.ablate(1, direction())
    assert plain.rows(0, 1) is plain


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "negative layer": ({"layer": -1}, "layer must be a whole number counted from 0, got -1"),
    "fractional layer": ({"layer": 1.5}, "layer must be a whole number counted from 0, got 1.5"),
    "boolean layer": ({"layer": True}, "layer must be a whole number counted from 0, got True"),
    "all layers": ({"direction": torch.ones(4, 8)}, r"shape \[d_model\].*\[4, 8\].*pick one layer of the vectors"),
    "whole numbers": ({"direction": torch.ones(8, dtype=torch.long)}, r"must be a float tensor.*int64 \[8\]"),
    "nan": ({"direction": torch.tensor([1.0, torch.nan])}, "direction holds NaN or infinity"),
    "infinite": ({"direction": torch.tensor([1.0, torch.inf])}, "direction holds NaN or infinity"),
    "zero ablation": (
        {"direction": torch.zeros(4), "operation": Operation.ABLATE, "coefficient": None},
        "ablate needs a direction that is not zero everywhere",
    ),
    "zero cap": (
        {"direction": torch.zeros(4), "operation": Operation.CAP, "coefficient": None, "threshold": 1.0},
        "cap needs a direction that is not zero everywhere",
    ),
    "no coefficient": ({"coefficient": None}, "add needs a coefficient"),
    "a coefficient in vain": ({"operation": Operation.ABLATE}, "ablate takes no coefficient"),
    "no threshold": ({"operation": Operation.CAP, "coefficient": None}, "cap needs a threshold"),
    "a threshold in vain": ({"threshold": 1.0}, "add takes no threshold"),
    "coefficients of two dimensions": (
        {"coefficient": torch.ones(2, 2)},
        r"coefficient must be one number or float \[batch\], got shape \[2, 2\]",
    ),
    "nan coefficient": ({"coefficient": float("nan")}, "coefficient holds NaN or infinity"),
    "infinite coefficients": ({"coefficient": torch.tensor([1.0, torch.inf])}, "coefficient holds NaN or infinity"),
    "mask of numbers": (
        {"positions": torch.ones(2, 3)},
        r"positions mask must be bool \[batch, width\], got torch.float32",
    ),
    "mask of one row": (
        {"positions": torch.ones(3, dtype=torch.bool)},
        r"positions mask must be bool \[batch, width\], got torch.bool \[3\]",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("changes", "message"), INVALID.values(), ids=INVALID.keys())
def test_an_edit_that_cannot_mean_anything_is_refused(changes: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {"layer": 1, "direction": torch.ones(4), "coefficient": 1.0}
    with pytest.raises(EditError, match=message):
        Edit(**{**parts, **changes})


def test_a_direction_of_zeros_can_be_added_as_a_baseline() -> None:
    h = torch.randn(1, 2, D_MODEL)
    assert torch.equal(apply_edit(h, Edit.add(0, torch.zeros(D_MODEL)), None), h)


UNFIT: dict[str, tuple[Edit, str]] = {
    "layer": (Edit.add(3, direction()), "layer 3 does not exist: the model has layers 0 to 2"),
    "size": (Edit.add(1, torch.ones(5)), "direction has 5 entries, the model's d_model is 32"),
    "coefficients": (Edit.add(1, direction(), torch.ones(2)), "coefficient has 2 rows, the batch has 3"),
    "mask rows": (
        Edit.ablate(1, direction(), torch.ones(4, 19, dtype=torch.bool)),
        "positions mask has 4 rows, the batch has 3",
    ),
}


@pytest.mark.parametrize(("edit", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_an_edit_that_does_not_fit_the_model_or_the_batch_is_refused(
    backend: Backend, edit: Edit, message: str
) -> None:
    with pytest.raises(EditError, match=message):
        backend.forward(TEXT, [edit])
    with pytest.raises(EditError, match=message):
        backend.generate(PROMPTS, Sampling(2), [edit])


@pytest.mark.parametrize("width", [18, 20])
def test_a_mask_of_another_width_is_refused_and_not_shifted(backend: Backend, width: int) -> None:
    edit = Edit.add(1, direction(), 1.0, torch.ones(3, width, dtype=torch.bool))
    assert max(map(len, PROMPTS)) == 19
    with pytest.raises(EditError, match=f"positions mask is {width} tokens wide, the left-padded batch is 19"):
        backend.generate(PROMPTS, Sampling(2), [edit])


def test_check_edits_accepts_what_fits() -> None:
    check_edits([Edit.add(2, direction(), torch.ones(3)), Edit.ablate(0, direction())], 3, D_MODEL, 3)


def test_a_mask_edits_exactly_its_tokens(backend: Backend) -> None:
    plain = activations(backend)
    mask = torch.zeros(3, plain.shape[2], dtype=torch.bool)
    mask[0, -1] = mask[1, -4] = mask[2, -2:] = True
    change = activations(backend, edits=[Edit.add(1, direction(), 1.0, mask)])[:, 1] - plain[:, 1]
    assert torch.equal(change.nan_to_num().abs().sum(dim=-1) > 1e-3, mask)
    assert_close(change[mask], direction().expand(4, -1))


def test_edits_of_one_layer_act_in_the_order_given(backend: Backend) -> None:
    v = direction()
    last = activations(backend, edits=[Edit.add(1, v, 3.0), Edit.ablate(1, v)])[:, 1]
    first = activations(backend, edits=[Edit.ablate(1, v), Edit.add(1, v, 3.0)])[:, 1]
    unit = v / v.norm()
    assert float((last @ unit).nan_to_num().abs().max()) < 1e-4
    assert_close((first @ unit)[~first.isnan().any(dim=-1)].mean(), 3 * v.norm())


def test_a_block_list_is_edited_only_while_the_context_is_open() -> None:
    backend = backend_of("transformers", tiny_model())
    blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    h = torch.zeros(1, 1, D_MODEL)
    with editing_blocks(blocks, [Edit.add(1, direction())], backend.info):
        assert torch.equal(blocks[0](h), h)
        assert_close(blocks[1](h)[0, 0], direction())
    assert torch.equal(blocks[1](h), h)

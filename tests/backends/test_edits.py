"""Edits: the plain functions, what they validate, and what they are as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_lens.backend import Backend, Condition, Edit, EditError, Operation, Positions, Sampling, Schedule, Span
from persona_lens.backend.editing import editing_blocks, hooking_blocks
from persona_lens.backend.edits import apply_edit, as_edits, check_edits
from tests.backends.fixtures import D_MODEL, PROMPTS, TEXT, activations, assert_close, backend_of, direction
from tests.tiny import tiny_model

pytestmark = pytest.mark.cuda

WIDTH = 6


def tensors(*shape: int) -> st.SearchStrategy[Tensor]:
    """Normal numbers of a size between 1e-3 and 1e3, in any order of magnitude."""

    def make(seed: int, exponent: float) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 10**exponent

    return st.builds(make, st.integers(0, 2**31), st.floats(-3, 3))


residuals = tensors(2, 5, WIDTH)
directions = tensors(WIDTH)
coefficients = st.floats(-10, 10)


EVERY_OPERATION: dict[str, Callable[[Tensor], Edit]] = {
    "add": lambda v: Edit.add(0, v, 1.5),
    "relative add": lambda v: Edit.add(0, v, 0.5, relative=True),
    "ablate": lambda v: Edit.ablate(0, v),
    "cap": lambda v: Edit.cap(0, v, -1e6),  # below every projection
    "floor": lambda v: Edit.floor(0, v, 1e6),  # above every projection
    "affine": lambda v: Edit.affine(0, v, 1e6),
}


@settings(max_examples=40, deadline=None)
@given(residuals, directions, coefficients, st.booleans())
def test_adding_then_subtracting_is_the_identity(h: Tensor, v: Tensor, c: float, relative: bool) -> None:
    moved = apply_edit(h, Edit.add(0, v, c, relative=relative), None)
    if relative:  # the norm it counts in is that of the token as the edit finds it
        sizes = h.norm(dim=-1)
        torch.testing.assert_close((moved - h).norm(dim=-1), abs(c) * sizes, rtol=1e-4, atol=1e-6 * float(sizes.max()))
        c *= float(h[0, 0].norm() / moved[0, 0].norm())
    back = apply_edit(moved, Edit.add(0, v, -c, relative=relative), None)
    scale = float(h.abs().max() + moved.abs().max())
    torch.testing.assert_close(back[0, 0], h[0, 0], rtol=0, atol=2e-6 * scale)


@settings(max_examples=40, deadline=None)
@given(residuals, directions)
def test_ablation_leaves_no_projection_and_nothing_else_changes(h: Tensor, v: Tensor) -> None:
    unit = v / v.norm()
    out = apply_edit(h, Edit.ablate(0, v), None)
    scale = float(h.norm(dim=-1).max())
    assert float((out @ unit).abs().max()) <= 1e-5 * scale
    torch.testing.assert_close(out + (h @ unit).unsqueeze(-1) * unit, h, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(apply_edit(out, Edit.ablate(0, v), None), out, rtol=0, atol=1e-5 * scale)


@settings(max_examples=40, deadline=None)
@given(residuals, directions, st.floats(-100, 100), st.sampled_from(["cap", "floor"]))
def test_a_limit_is_kept_and_what_is_within_stays(h: Tensor, v: Tensor, threshold: float, kind: str) -> None:
    edit = Edit.cap(0, v, threshold) if kind == "cap" else Edit.floor(0, v, threshold)
    unit = v / v.norm()
    out = apply_edit(h, edit, None)
    before, after = h @ unit, out @ unit
    scale = float(h.norm(dim=-1).max()) + abs(threshold)
    beyond = (after - threshold) if kind == "cap" else (threshold - after)
    assert float(beyond.max()) <= 1e-5 * scale
    within = before <= threshold if kind == "cap" else before >= threshold
    assert torch.equal(out[within], h[within])
    torch.testing.assert_close(after[~within], torch.full_like(after[~within], threshold), rtol=0, atol=1e-5 * scale)


@settings(max_examples=40, deadline=None)
@given(residuals, directions, st.floats(-100, 100))
def test_an_affine_edit_sets_the_projection_and_is_ablation_at_zero(h: Tensor, v: Tensor, target: float) -> None:
    unit = v / v.norm()
    out = apply_edit(h, Edit.affine(0, v, target), None)
    scale = float(h.norm(dim=-1).max()) + abs(target)
    torch.testing.assert_close(out @ unit, torch.full(h.shape[:2], target), rtol=0, atol=1e-5 * scale)
    rest = out - target * unit
    torch.testing.assert_close(rest, apply_edit(h, Edit.ablate(0, v), None), rtol=0, atol=1e-5 * scale)
    assert torch.equal(apply_edit(h, Edit.affine(0, v, 0.0), None), apply_edit(h, Edit.ablate(0, v), None))


@settings(max_examples=40, deadline=None)
@given(residuals, directions, st.floats(0, 1), st.sampled_from([*EVERY_OPERATION][2:]))
def test_a_fraction_of_a_change_lies_between_none_and_all_of_it(h: Tensor, v: Tensor, part: float, name: str) -> None:
    edit = EVERY_OPERATION[name](v)
    whole = apply_edit(h, edit, None)
    some = apply_edit(h, dataclasses.replace(edit, coefficient=part), None)
    scale = float(h.abs().max() + whole.abs().max())
    torch.testing.assert_close(some, torch.lerp(h, whole, part), rtol=0, atol=2e-6 * scale)
    assert torch.equal(apply_edit(h, dataclasses.replace(edit, coefficient=0.0), None), h)


@settings(max_examples=40, deadline=None)
@given(residuals, directions, st.lists(st.booleans(), min_size=10, max_size=10), st.sampled_from([*EVERY_OPERATION]))
def test_exactly_the_named_positions_change(h: Tensor, v: Tensor, named: list[bool], name: str) -> None:
    where = torch.tensor(named).reshape(2, 5)
    edit = EVERY_OPERATION[name](v)
    original = h.clone()
    out = apply_edit(h, edit, where)
    assert torch.equal(h, original)  # the input is left alone
    assert torch.equal((out != h).any(dim=-1), where)
    assert torch.equal(apply_edit(h, edit, None)[where], out[where])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "edit",
    [
        Edit.add(0, direction()),
        Edit.add(0, direction(), 0.5, relative=True),
        Edit.ablate(0, direction()),
        Edit.cap(0, direction(), 0.1),
        Edit.floor(0, direction(), 0.1),
        Edit.affine(0, direction(), 0.1),
    ],
    ids=EVERY_OPERATION,
)
def test_the_residual_keeps_its_precision_and_the_arithmetic_is_float32(dtype: torch.dtype, edit: Edit) -> None:
    h = torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = apply_edit(h, edit, None)
    assert out.dtype == dtype
    exact = apply_edit(h.double(), dataclasses.replace(edit, direction=edit.direction.double()), None)
    # A rounding or two to the residual's precision, no more: not one for each of the terms of a projection.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=eps * float(edit.direction.abs().max()) + 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        Edit.add,
        lambda layer, v: Edit.add(layer, v, 0.5, relative=True),
        Edit.ablate,
        lambda layer, v: Edit.cap(layer, v, 0.1),
        lambda layer, v: Edit.floor(layer, v, 0.1),
        lambda layer, v: Edit.affine(layer, v, 0.1),
    ],
    ids=EVERY_OPERATION,
)
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
        "floor": Edit.floor(1, v, 2.0),
        "affine": Edit.affine(1, v, 2.0),
        "relative": Edit.add(1, v, 2.0, relative=True),
        "ablate with sinks": dataclasses.replace(Edit.ablate(1, v), sinks=True),
        "half": dataclasses.replace(Edit.ablate(1, v), coefficient=0.5),
        "span": Edit.add(1, v, 2.0, Span(Positions.PROMPT, 1)),
        "other span": Edit.add(1, v, 2.0, Span(Positions.PROMPT, 1, 2)),
        "schedule": Edit(1, v, schedule=Schedule(((0, 1.0), (2, 0.0)))),
        "other schedule": Edit(1, v, schedule=Schedule(((0, 1.0), (3, 0.0)))),
        "condition": Edit(1, v, condition=Condition(1, v, 0.5)),
        "condition on another": Edit(1, v, condition=Condition(1, direction(1), 0.5)),
        "condition elsewhere": Edit(1, v, condition=Condition(0, v, 0.5)),
        "condition below": Edit(1, v, condition=Condition(1, v, 0.5, above=False)),
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
        {"direction": torch.zeros(4), "operation": Operation.ABLATE},
        "ablate needs a direction that is not zero everywhere",
    ),
    "zero cap": (
        {"direction": torch.zeros(4), "operation": Operation.CAP, "threshold": 1.0},
        "cap needs a direction that is not zero everywhere",
    ),
    "relative along nothing": (
        {"direction": torch.zeros(4), "relative": True},
        "a relative coefficient needs a direction that is not zero everywhere",
    ),
    "relative ablation": ({"operation": Operation.ABLATE, "relative": True}, "only add takes a relative coefficient"),
    "twice an ablation": (
        {"operation": Operation.ABLATE, "coefficient": 2.0},
        "coefficient of ablate is the fraction of the change that is made, from 0 to 1",
    ),
    "no threshold": ({"operation": Operation.CAP}, "cap needs a threshold"),
    "no lower threshold": ({"operation": Operation.FLOOR}, "floor needs a threshold"),
    "no target": ({"operation": Operation.AFFINE}, "affine needs a target"),
    "a target in vain": ({"operation": Operation.ABLATE, "target": 0.0}, "ablate takes no target"),
    "infinite threshold": ({"operation": Operation.CAP, "threshold": float("inf")}, "threshold must be finite"),
    "a condition too late": (
        {"condition": Condition(2, torch.ones(4), 0.0)},
        "the condition is at layer 2 and the edit at layer 1",
    ),
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
    "condition": (
        Edit(1, direction(), condition=Condition(1, torch.ones(5), 0.0)),
        "direction of the condition has 5 entries",
    ),
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
    ablate = dataclasses.replace(Edit.ablate(1, v), sinks=True)
    last = activations(backend, edits=[Edit.add(1, v, 3.0), ablate])[:, 1]
    first = activations(backend, edits=[ablate, Edit.add(1, v, 3.0)])[:, 1]
    unit = v / v.norm()
    assert float((last @ unit).nan_to_num().abs().max()) < 1e-4
    assert_close((first @ unit)[~first.isnan().any(dim=-1)].mean(), 3 * v.norm())


def test_a_block_list_is_edited_only_while_the_context_is_open() -> None:
    backend = backend_of("transformers", tiny_model())
    blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    h = torch.zeros(1, 1, D_MODEL)
    with editing_blocks(partial(hooking_blocks, blocks), [Edit.add(1, direction())], backend):
        assert torch.equal(blocks[0](h), h)
        assert_close(blocks[1](h)[0, 0], direction())
    assert torch.equal(blocks[1](h), h)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [[torch.ones(2)], 3, None, "optimistic@18:+1"])
def test_what_is_no_edit_is_said_to_be_none(wrong: Any) -> None:
    with pytest.raises(EditError, match=r"edits are one Edit, several, or a Steering|needs the vectors that it names"):
        as_edits(wrong)

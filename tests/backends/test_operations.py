"""Every operation, part of a row, schedule and condition, on every backend and over several architectures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_lens.backend import Backend, Condition, Edit, Operation, Positions, Sampling, Schedule, Span, TokenBatch
from persona_lens.backend.sinks import sink_limits
from persona_lens.backend.tokens import EditError
from tests.backends.fixtures import (
    ADAPTERS,
    D_MODEL,
    FEW_ARCHITECTURES,
    PROMPTS,
    RESPONSES,
    TEXT,
    activations,
    assert_close,
    backend_of,
    direction,
    greedy,
    tiny_backend,
)
from tests.tiny import device, tiny_model

# beartype, which checks our shapes, draws at random which items it looks at.
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies"),
]

CASES = [(adapter, architecture) for adapter in ADAPTERS for architecture in FEW_ARCHITECTURES]
LAYER = 1

# Any part of a row, said in any way.
kinds = st.sampled_from([Positions.ALL, Positions.RESPONSE, Positions.GENERATING])
spans = st.one_of(
    st.builds(lambda kind, start, more: Span(kind, start, start + more), kinds, st.integers(0, 4), st.integers(1, 4)),
    st.builds(Span, kinds, st.integers(0, 4)),
    st.builds(Span, st.just(Positions.PROMPT), st.integers(-3, 4)),
    st.builds(lambda stop: Span(Positions.PROMPT, -4, stop), st.integers(-3, -1)),
)
positions = st.one_of(st.sampled_from([kind for kind in Positions if kind is not Positions.THINKING]), spans)
schedules = st.one_of(
    st.none(), st.builds(lambda a, b, n: Schedule(((1, a), (1 + n, b))), *[st.floats(-1, 1)] * 2, st.integers(1, 6))
)
conditions = st.one_of(
    st.none(),
    st.builds(
        lambda layer, seed, threshold, above: Condition(layer, direction(seed), threshold, above),
        st.integers(0, LAYER),
        st.integers(0, 3),
        st.floats(-0.5, 0.5),
        st.booleans(),
    ),
)


def make_edit(operation: Operation, relative: bool, seed: int, **parts: Any) -> Edit:
    level = {
        Operation.CAP: {"threshold": -0.3},
        Operation.FLOOR: {"threshold": 0.4},
        Operation.AFFINE: {"target": 1.5},
        Operation.ADD: {"relative": relative, "coefficient": 0.7},
    }.get(operation, {})
    return Edit(LAYER, direction(seed), operation, **level, **parts)  # type: ignore[arg-type]


edits = st.builds(
    lambda operation, relative, seed, where, schedule, condition, sinks: make_edit(
        operation, relative, seed, positions=where, schedule=schedule, condition=condition, sinks=sinks
    ),
    st.sampled_from(list(Operation)),
    st.booleans(),
    st.integers(0, 50),
    positions,
    schedules,
    conditions,
    st.booleans(),
)


def expected(edit: Edit, plain: Tensor, limits: Sequence[float], row: int, prompt: int, response: int) -> Tensor:
    """What the edit makes of one row's residuals [layers, tokens, d_model], written down anew, token by token."""
    h = plain[row, :, -(prompt + response) :].double()

    def is_sink(layer: int, token: int) -> bool:
        return not edit.sinks and (token == 0 or float(h[layer, token].norm()) > limits[layer])

    out = h[LAYER].clone()
    kind = edit.positions.kind if isinstance(edit.positions, Span) else edit.positions
    members = {
        "all": range(prompt + response),
        "prompt": range(prompt),
        "response": range(prompt, prompt + response),
        "answer": range(prompt, prompt + response),
        "generating": range(prompt - 1, prompt + response),
    }[str(kind)]
    chosen = members[edit.positions.start : edit.positions.stop] if isinstance(edit.positions, Span) else members
    v = edit.direction.double()
    unit = v / v.norm()
    for token in chosen:
        if (edit.operation is not Operation.ADD or edit.relative) and is_sink(LAYER, token):
            continue
        if edit.condition is not None:
            if is_sink(edit.condition.layer, token):
                continue
            towards = edit.condition.direction.double()
            found = float(h[edit.condition.layer, token] @ towards / towards.norm())
            if (found > edit.condition.threshold) != edit.condition.above:
                continue
        p = float(out[token] @ unit)
        move = {
            Operation.ADD: out[token].norm() * unit if edit.relative else v,
            Operation.ABLATE: -p * unit,
            Operation.CAP: min(0.0, (edit.threshold or 0.0) - p) * unit,
            Operation.FLOOR: max(0.0, (edit.threshold or 0.0) - p) * unit,
            Operation.AFFINE: ((edit.target or 0.0) - p) * unit,
        }[edit.operation]
        factor = 1.0
        if edit.schedule is not None:
            (first, low), (last, high) = edit.schedule.points
            share = (members.index(token) - first) / (last - first)
            factor = low + min(1.0, max(0.0, share)) * (high - low)
        out[token] += float(edit.coefficient) * factor * move
    return out


@pytest.mark.parametrize(("adapter", "architecture"), CASES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edit=edits)
def test_exactly_what_was_asked_is_done_to_exactly_those_tokens(adapter: str, architecture: str, edit: Edit) -> None:
    """Of a left-padded batch of unlike rows, over existing text."""
    backend = tiny_backend(adapter, architecture)
    plain = activations(backend)
    changed = activations(backend, edits=[edit])
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        want = expected(edit, plain, sink_limits(backend) or (), row, len(prompt), len(response))
        got = changed[row, LAYER, -len(want) :].double()
        scale = float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * scale)
        # Without a condition that a rounding might tip, tokens that are not named are the very same numbers.
        untouched = (want == plain[row, LAYER, -len(want) :].double()).all(dim=-1)
        if edit.condition is None:
            assert torch.equal(got[untouched], plain[row, LAYER, -len(want) :].double()[untouched])


@pytest.mark.parametrize(("adapter", "architecture"), CASES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(several=st.lists(edits, min_size=1, max_size=2), row=st.integers(0, len(PROMPTS) - 1))
def test_a_batch_equals_its_rows_alone_with_and_without_cache(
    adapter: str, architecture: str, several: list[Edit], row: int
) -> None:
    """Greedy tokens and reads while generating; and the same text once it is there."""
    backend = tiny_backend(adapter, architecture)
    together = greedy(backend, several, new=4)
    uncached = greedy(backend, several, new=4, use_cache=False)
    assert uncached.responses == together.responses
    alone = backend.generate([PROMPTS[row]], Sampling(4), several)
    assert alone.responses[0] == together.responses[row]
    if all(edit.condition is None for edit in several):  # a threshold may be met on one side of a rounding
        again = activations(backend, TokenBatch.of(PROMPTS, together.responses), several)
        assert_close(together.reads["activations"], again, 1e-3)
        assert_close(uncached.reads["activations"], again, 1e-3)


@pytest.mark.parametrize(("adapter", "architecture"), CASES)
@pytest.mark.parametrize("operation", list(Operation))
def test_rows_have_strengths_of_their_own_under_every_operation(
    adapter: str, architecture: str, operation: Operation
) -> None:
    backend = tiny_backend(adapter, architecture)
    edit = make_edit(operation, False, 3)
    strengths = [0.0, 1.0, 0.25]
    changed = activations(backend, edits=[replace(edit, coefficient=torch.tensor(strengths))])
    plain = activations(backend)
    assert torch.equal(changed[0].nan_to_num(), plain[0].nan_to_num())  # a row at 0 is unedited to the last bit
    for row, strength in enumerate(strengths[1:], start=1):
        single = activations(backend, edits=[replace(edit, coefficient=strength)])
        assert_close(changed[row], single[row])


@pytest.mark.parametrize("adapter", ["transformers", "nnsight"])
@pytest.mark.parametrize("architecture", FEW_ARCHITECTURES)
@pytest.mark.parametrize("operation", [*Operation, "relative", "condition"])
def test_gradients_flow_through_every_operation_in_a_model(adapter: str, architecture: str, operation: str) -> None:
    """To weights before the edit, as finite differences find them."""
    module: Any = tiny_model(architecture).requires_grad_(False)
    backend = backend_of(adapter, module)
    condition = Condition(0, direction(1), 0.0) if operation == "condition" else None
    name = operation if operation in list(Operation) else Operation.ADD
    edit = make_edit(Operation(name), operation == "relative", 2, condition=condition)
    weight = module.get_input_embeddings().weight
    weight.requires_grad_(True)
    ids = torch.tensor([PROMPTS[2]], device=device)

    def loss() -> Any:
        return module(input_ids=ids, labels=ids).loss

    with backend.editing([edit]):
        value = loss()
        value.backward()
    assert weight.grad is not None
    entry = int(weight.grad[PROMPTS[2][0]].abs().argmax())
    found = float(weight.grad[PROMPTS[2][0], entry])
    with torch.no_grad(), backend.editing([edit]):
        step = 1e-2 * float(weight.abs().mean())
        weight[PROMPTS[2][0], entry] += step
        above = float(loss())
        weight[PROMPTS[2][0], entry] -= 2 * step
        below = float(loss())
    assert found == pytest.approx((above - below) / (2 * step), rel=0.1, abs=2e-3)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_condition_sees_what_edits_of_its_layer_left(adapter: str) -> None:
    backend = tiny_backend(adapter)
    v = direction(1)
    lift = replace(Edit.affine(0, v, 5.0), sinks=True)
    gated = Edit(2, direction(2), condition=Condition(0, v, 4.9), sinks=True)
    plain = activations(backend, edits=[lift])
    assert_close(activations(backend, edits=[lift, gated])[:, 2] - plain[:, 2], _everywhere(plain, direction(2)))
    alone = activations(backend, edits=[gated])
    assert torch.equal(alone.nan_to_num(), activations(backend).nan_to_num())


def _everywhere(like: Tensor, v: Tensor) -> Tensor:
    return torch.where(like[:, 2].isnan(), torch.nan, v.expand(like[:, 2].shape))


def test_a_schedule_of_a_function_is_that_function_at_every_token() -> None:
    schedule = Schedule(tuple((index, 0.5**index) for index in range(30)))
    backend = tiny_backend("transformers")
    edit = Edit(LAYER, direction(), positions=Positions.RESPONSE, schedule=schedule)
    change = (activations(backend, edits=[edit]) - activations(backend))[1, LAYER, -len(RESPONSES[1]) :]
    sizes = [0.5**index * float(direction().norm()) for index in range(len(RESPONSES[1]))]
    assert_close(change.norm(dim=-1), torch.tensor(sizes))


INVALID: dict[str, tuple[Any, type[Exception], str]] = {
    "end of a response": (lambda: Span(Positions.RESPONSE, -3), EditError, r"response\[-3:\] counts from the end"),
    "empty span": (lambda: Span(Positions.ALL, 3, 3), EditError, r"all\[3:3\] holds no token"),
    "backwards": (lambda: Span(Positions.PROMPT, -1, -3), EditError, r"prompt\[-1:-3\] holds no token"),
    "one point": (lambda: Schedule(((0, 1.0),)), EditError, "at least two points"),
    "out of order": (
        lambda: Schedule(((3, 1.0), (1, 0.0))),
        EditError,
        r"must ascend from 0 or more, got \[3, 1\]",
    ),
    "infinite factor": (lambda: Schedule(((0, 1.0), (1, float("inf")))), EditError, "must be finite"),
    "no direction": (lambda: Condition(0, torch.zeros(3), 1.0), EditError, "finite and not zero everywhere"),
    "no threshold": (lambda: Condition(0, torch.ones(3), float("nan")), EditError, "must be finite, got nan"),
}


@pytest.mark.parametrize(("make", "error", "message"), INVALID.values(), ids=INVALID.keys())
def test_what_names_nothing_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("adapter", ["transformers", "nnsight"])
def test_a_plain_pass_knows_no_order_of_tokens(adapter: str) -> None:
    backend: Backend = tiny_backend(adapter)
    schedule = Schedule(((0, 1.0), (5, 0.0)))
    with (
        pytest.raises(EditError, match="leave out the schedule"),
        backend.editing([Edit(0, torch.ones(D_MODEL), schedule=schedule)]),
    ):
        pass
    with (
        pytest.raises(EditError, match="cannot tell prompt from response"),
        backend.editing([Edit(0, torch.ones(D_MODEL), positions=Span(Positions.ALL, 2))]),
    ):
        pass


def test_masks_of_a_text_are_those_of_its_padded_batch() -> None:
    """The reference of this file counts as the code under test does: from ids, in rows of unlike length."""
    assert {len(prompt) for prompt in PROMPTS} == {11, 1, 19}
    assert TEXT.lengths == tuple(len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True))

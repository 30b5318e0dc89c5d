"""An operation of another package: one object, named by an entry point, works wherever ours do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend import Edit, EditError, Operation, Read, ReadKind, TokenBatch, edits
from persona_lens.steering import Steering
from persona_lens.steering.notation import _grammar, parse_terms
from tests.backends.fixtures import PROMPTS, direction, tiny_backend
from tests.steering.test_steering import vectors_for

THEIRS = """
from persona_lens.backend import Operation

def halfway(h, unit, level):
    return (level - h @ unit) / 2

SPEC = Operation("soften", "target", "h + (target - h . v) v / 2", halfway)
"""


@pytest.fixture
def softened(plant: Any) -> Any:
    plant(edits.OPERATIONS.group, THEIRS, soften="SPEC")
    _grammar.cache_clear()
    yield
    _grammar.cache_clear()


@pytest.mark.usefixtures("softened")
@pytest.mark.parametrize("adapter", ["transformers", "nnsight"])
def test_it_is_parsed_carried_out_and_written_as_ours_are(adapter: str) -> None:
    backend, text = tiny_backend(adapter), TokenBatch.of(PROMPTS[:1])
    (term,) = parse_terms("evil@1:soften(2.5) with sinks")
    assert str(term) == "evil@1:soften(2.5) with sinks"
    assert list(Operation)[-1] == term.operation == "soften"
    vectors = vectors_for(backend)
    steering = Steering((term,), {"evil": vectors})
    (edit,) = steering.edits()
    assert (edit.operation, edit.target, edit.threshold) == ("soften", 2.5, None)
    unit = vectors.vector(1) / vectors.vector(1).norm()

    def projections(*given: Edit) -> Tensor:
        found = backend.forward(text, given, (Read(ReadKind.ACTIVATIONS, (1,)),)).reads[ReadKind.ACTIVATIONS]
        values: Tensor = found[0, 0] @ unit
        return values

    torch.testing.assert_close(projections(edit), (projections() + 2.5) / 2, rtol=1e-4, atol=1e-4)
    assert steering != Steering.parse("evil@1:affine(2.5) with sinks", {"evil": vectors})


@pytest.mark.usefixtures("softened")
def test_what_it_lacks_is_said() -> None:
    with pytest.raises(EditError, match="soften needs a target"):
        Edit(1, direction(), Operation("soften"))
    with pytest.raises(ValueError, match="operation is one of add, ablate, cap, floor, affine, soften; got 'harden'"):
        Operation("harden")


def test_without_its_package_there_is_none() -> None:
    with pytest.raises(ValueError, match="operation is one of add, ablate, cap, floor, affine; got 'soften'"):
        Operation("soften")

"""An operation of another package: one object, named by an entry point, works wherever ours do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend import Edit, EditError, Operation, Read, ReadKind, Sampling, TokenBatch, edits
from persona_lens.backend.intervention import Intervention
from persona_lens.backend.sampling import RowSampler
from persona_lens.backend.tokens import pad_left
from persona_lens.steering import Steering
from persona_lens.steering.notation import _grammar, parse_terms
from persona_lens_nnsight.request import register_travelling
from tests.backends.fixtures import D_MODEL, PROMPTS, direction, tiny_backend
from tests.backends.test_travelling import ELSEWHERE
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
def test_it_goes_where_the_model_runs_and_its_package_is_not(tmp_path: Path) -> None:
    from nnsight.intervention.serialization import dumps

    edit = Edit(1, direction(), Operation("soften"), target=2.5, sinks=True)
    tokens = pad_left(TokenBatch.of(PROMPTS), 0)
    sent, residual, result = (tmp_path / name for name in ("sent", "residual", "result"))
    register_travelling()
    sent.write_bytes(dumps((Intervention(tokens, [edit], n_layers=3), RowSampler(Sampling(1, 0.7, seeds=(1, 2, 3))))))
    h = torch.randn(*tokens.ids.shape, D_MODEL)
    torch.save(h, residual)
    code = ELSEWHERE.replace('"tests")', '"tests", "their_package")')
    done = subprocess.run(
        [sys.executable, "-c", code, sent, residual, result], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    here = Intervention(tokens, [edit], n_layers=3)
    here.begin_pass(torch.zeros(h.shape[:2], dtype=torch.long))
    torch.testing.assert_close(torch.load(result)[0], here.block(1, h))


@pytest.mark.usefixtures("softened")
def test_what_it_lacks_is_said() -> None:
    with pytest.raises(EditError, match="soften needs a target"):
        Edit(1, direction(), Operation("soften"))
    with pytest.raises(ValueError, match="operation is one of add, ablate, cap, floor, affine, soften; got 'harden'"):
        Operation("harden")


def test_without_its_package_there_is_none() -> None:
    with pytest.raises(ValueError, match="operation is one of add, ablate, cap, floor, affine; got 'soften'"):
        Operation("soften")

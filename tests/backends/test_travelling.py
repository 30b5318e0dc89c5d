"""What traces use can be sent to a machine that has torch and nnsight, but not this package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from persona_lens.backend import Edit, Positions, Read, ReadKind, Sampling, TokenBatch
from persona_lens.backend.intervention import Intervention
from persona_lens.backend.parts.budget import ThinkingBudget
from persona_lens.backend.sampling import RowSampler
from persona_lens.backend.tokens import pad_left
from persona_lens_nnsight.request import TRAVELLING, plain_config, register_travelling
from tests.backends.fixtures import D_MODEL, PROMPTS, RESPONSES, direction
from tests.conftest import TRAVELLING as UNCHECKED

# A process like a server's: nothing of ours, nor what our annotations need, can be imported.
ELSEWHERE = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("persona_lens", "persona_lens_nnsight", "jaxtyping", "beartype", "tests"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import torch
from nnsight.intervention.serialization import loads
intervention, sampler = loads(open(sys.argv[1], "rb").read())
h = torch.load(sys.argv[2])
intervention.begin_pass(torch.zeros(h.shape[:2], dtype=torch.long))
for layer in intervention.layers:
    h = intervention.block(layer, h)
newest = torch.zeros(len(h), dtype=torch.long)
torch.save([h, intervention.results(), *(sampler(h[:, -1], newest) for _ in range(2))], sys.argv[3])
"""


def everything() -> tuple[Intervention, RowSampler]:
    padded = pad_left(TokenBatch.of(PROMPTS, RESPONSES), 0)
    mask = torch.zeros(padded.ids.shape, dtype=torch.bool)
    mask[1, -2] = True
    edits = [
        Edit.add(0, direction(), torch.tensor([0.0, 1.0, 2.0]), Positions.GENERATING),
        Edit.ablate(1, direction(1), mask),
        Edit.cap(2, direction(2), 0.1, Positions.RESPONSE),
    ]
    reads = [*Read.means(), Read.projections(torch.eye(D_MODEL)[:2], (0, 2)), Read(ReadKind.ACTIVATIONS, (1,))]
    sampling = Sampling(1, 0.7, 0.8, seeds=(1, 2, 3))
    always: Any = {"classes": {}, "following": ((0,),), "thinking": ((True,),), "closing": {0: (5, 6)}}
    sampler = RowSampler(sampling, budgets=[ThinkingBudget(always, 0, most) for most in range(3)])
    return Intervention(padded, edits, reads, n_layers=3, end_ids=(2,)), sampler


def test_an_intervention_runs_where_this_package_is_not(tmp_path: Path) -> None:
    from nnsight.intervention.serialization import dumps

    register_travelling()
    files = [tmp_path / name for name in ("sent", "residual", "result")]
    files[0].write_bytes(dumps(everything()))
    h = torch.randn(3, max(TokenBatch.of(PROMPTS, RESPONSES).lengths), D_MODEL)
    torch.save(h, files[1])
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    there = torch.load(files[2])

    intervention, sampler = everything()
    intervention.begin_pass(torch.zeros(h.shape[:2], dtype=torch.long))
    for layer in intervention.layers:
        h = intervention.block(layer, h)
    assert torch.equal(there[0], h)
    assert there[1].keys() == intervention.results().keys()
    for name, value in intervention.results().items():
        torch.testing.assert_close(there[1][name], value, rtol=0, atol=0, equal_nan=True)
    first, second = (sampler(h[:, -1], torch.zeros(len(h), dtype=torch.long)) for _ in range(2))
    assert torch.equal(there[2], first)
    assert torch.equal(there[3], second)
    assert (int(first[0].argmax()), second[:2].argmax(dim=1).tolist()) == (5, [6, 5])


@pytest.mark.parametrize("module", TRAVELLING, ids=[module.__name__ for module in TRAVELLING])
def test_travelling_modules_need_nothing_but_torch(module: object) -> None:
    """At run time; what type checkers alone import does not count."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))  # type: ignore[attr-defined]
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert imported <= {"__future__", "typing", "torch", *(each.__name__ for each in TRAVELLING)}


def test_travelling_modules_are_not_changed_by_the_shape_checks_of_these_tests() -> None:
    assert {module.__name__.removeprefix("persona_lens.backend.") for module in TRAVELLING} == UNCHECKED


def test_a_view_is_sent_without_what_it_is_a_view_of() -> None:
    from nnsight.intervention.serialization import dumps

    register_travelling()
    padded = pad_left(TokenBatch.of(PROMPTS), 0)

    def size(large: int) -> int:
        wide = torch.randn(3, large, D_MODEL)
        read = Read.projections(wide[:, :1])
        return len(dumps(Intervention(padded, [Edit.add(0, wide[0, 0])], [read], n_layers=3)))

    assert size(10_000) == size(2)


def test_the_models_generation_defaults_are_overruled_by_arguments() -> None:
    make = GenerationConfig
    own = make(num_beams=4, suppress_tokens=[5], repetition_penalty=2.0, eos_token_id=9, bos_token_id=1)  # type: ignore[no-untyped-call]
    ours = make(max_new_tokens=3, do_sample=False, eos_token_id=[2])  # type: ignore[no-untyped-call]
    settings = plain_config(ours, own)
    assert settings["suppress_tokens"] is None
    assert (settings["num_beams"], settings["repetition_penalty"]) == (1, 1.0)
    assert (settings["max_new_tokens"], settings["eos_token_id"]) == (3, [2])
    assert "bos_token_id" not in settings
    mixed = make(**own.to_diff_dict())  # type: ignore[no-untyped-call]
    assert not mixed.update(**settings)  # type: ignore[no-untyped-call]

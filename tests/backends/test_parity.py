"""The parity suite over every adapter and architecture; and that the suite finds what it is there to find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from persona_lens.backend import Edit, ForwardResult, Generation, Positions, Read, Sampling, TokenBatch
from persona_lens.backend.differences import Point
from persona_lens.backend.parity import FULL, HALF, check_parity
from tests.backends.fixtures import (
    ADAPTERS,
    ARCHITECTURES,
    REFERENCE,
    Delegating,
    backend_of,
    matrix,
    tiny_backend,
)
from tests.tiny import WINDOWED, tiny_model

OTHERS = [adapter for adapter in ADAPTERS if adapter != REFERENCE]


def failures(checks: Sequence[Point]) -> list[str]:
    return [f"{c.name}: {c.measured:.2g} > {c.tolerance:.2g}: {c.detail}" for c in checks if not c.passed]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *WINDOWED])
def test_the_reference_agrees_with_itself(architecture: str) -> None:
    """Where attention has a window, it is smaller than the texts."""
    checks = check_parity(tiny_backend("transformers", architecture), max_new_tokens=4)
    assert not failures(checks)
    assert len(checks) >= 20


@pytest.mark.parametrize(("adapter", "architecture"), matrix(adapters=OTHERS))
def test_an_adapter_agrees_with_the_reference(adapter: str, architecture: str) -> None:
    reference = tiny_backend("transformers", architecture)
    checks = check_parity(tiny_backend(adapter, architecture), reference, max_new_tokens=4)
    assert not failures(checks)
    assert {"the same model", "greedy tokens, add", "greedy tokens, ablate", "greedy tokens, cap"} <= {
        check.name for check in checks
    }


def first_row_only(edits: Sequence[Edit], rows: int) -> list[Edit]:
    only = torch.zeros(rows)
    only[0] = 1
    return [
        replace(e, coefficient=torch.as_tensor(e.coefficient) * only) if e.coefficient is not None else e for e in edits
    ]


class SteersOneRow(Delegating):
    def generate(self, prompts: Any, sampling: Sampling, edits: Any = (), reads: Any = ()) -> Generation:
        return self.inner.generate(prompts, sampling, first_row_only(edits, len(prompts)), reads)

    def forward(self, tokens: TokenBatch, edits: Any = (), reads: Any = (), *, logprobs: bool = False) -> ForwardResult:
        return self.inner.forward(tokens, first_row_only(edits, len(tokens)), reads, logprobs=logprobs)


class SteersOnlyThePrompt(Delegating):
    def generate(self, prompts: Any, sampling: Sampling, edits: Any = (), reads: Any = ()) -> Generation:
        kept = [replace(e, positions=Positions.PROMPT) if e.positions is Positions.ALL else e for e in edits]
        return self.inner.generate(prompts, sampling, kept, reads)


class LosesTheLastToken(Delegating):
    def generate(self, prompts: Any, sampling: Sampling, edits: Any = (), reads: Any = ()) -> Generation:
        out = self.inner.generate(prompts, sampling, edits, reads)
        cut = TokenBatch.of(prompts, [response[:-1] for response in out.responses])
        return replace(out, reads={**out.reads, **self.inner.forward(cut, edits, Read.means()).reads} if reads else {})


class CountsLayersFromTheEmbedding(Delegating):
    def forward(self, tokens: TokenBatch, edits: Any = (), reads: Any = (), *, logprobs: bool = False) -> ForwardResult:
        out = self.inner.forward(tokens, edits, reads, logprobs=logprobs)
        return replace(out, reads={name: value.roll(1, dims=1) for name, value in out.reads.items()})


class RemembersTheLastEdit(Delegating):
    """What an exception leaves behind: the edits of the run that failed stay on."""

    left: Sequence[Edit] = ()

    def forward(self, tokens: TokenBatch, edits: Any = (), reads: Any = (), *, logprobs: bool = False) -> ForwardResult:
        try:
            return self.inner.forward(tokens, [*edits, *self.left], reads, logprobs=logprobs)
        except ValueError:
            self.left = [e for e in edits if type(e) is Edit]
            raise


class SamplesFromOneStream(Delegating):
    def generate(self, prompts: Any, sampling: Sampling, edits: Any = (), reads: Any = ()) -> Generation:
        if sampling.seeds:
            sampling = replace(sampling, seeds=tuple(range(1, 1 + len(prompts))))
        return self.inner.generate(prompts, sampling, edits, reads)


FAULTS = {
    SteersOneRow: "changes every one of them in every row",
    SteersOnlyThePrompt: "an edit of all tokens",
    LosesTheLastToken: "reads while generating",
    CountsLayersFromTheEmbedding: "reads at every layer",
    RemembersTheLastEdit: "edits are gone after an error",
    SamplesFromOneStream: "samples do not depend on the batch",
}


@pytest.mark.parametrize(("fault", "found_by"), FAULTS.items(), ids=[fault.__name__ for fault in FAULTS])
def test_the_suite_finds_a_fault(fault: type[Delegating], found_by: str) -> None:
    good = tiny_backend("transformers")
    failed = failures(check_parity(fault(good), good, max_new_tokens=4))
    assert any(found_by in failure for failure in failed), failed


def test_another_model_is_reported_and_nothing_else_compared() -> None:
    other = backend_of("transformers", tiny_model("llama", seed=1))
    (check,) = check_parity(other, tiny_backend("transformers"))
    assert (check.name, check.passed) == ("the same model", False)
    assert "weights" in check.detail


def test_a_check_that_raises_has_failed_and_the_others_still_run() -> None:
    class Raises(Delegating):
        def generate(self, prompts: Any, sampling: Sampling, edits: Any = (), reads: Any = ()) -> Generation:
            raise ValueError("no generation here")

    checks = check_parity(Raises(tiny_backend("transformers")))
    assert any(check.passed for check in checks)
    failed = [check for check in checks if not check.passed]
    assert all(check.measured == float("inf") for check in failed)
    assert "ValueError: no generation here" in failed[0].detail


@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [
        *((adapter, torch.bfloat16) for adapter in ADAPTERS),
        ("transformers", torch.float16),
        *(pytest.param(adapter, torch.float16, marks=pytest.mark.exhaustive) for adapter in OTHERS),
    ],
)
def test_in_16_bits_reads_have_a_looser_bound_and_tokens_are_only_reported(adapter: str, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    first: Any = tiny_model()
    second: Any = tiny_model()
    reference = backend_of("transformers", first.to(dtype))
    checks = check_parity(backend_of(adapter, second.to(dtype)), reference, max_new_tokens=3)
    assert not failures(checks)
    assert {check.tolerance for check in checks} == {0.0, HALF[name].reads, HALF[name].tokens}
    assert HALF[name].reads > FULL.reads

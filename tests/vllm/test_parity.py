"""The parity suite against transformers, in float32, under every way in which an engine makes up its passes."""

from __future__ import annotations

from typing import Any

import pytest

from persona_lens.backend import Backend, open_backend
from persona_lens.backend.parity import check_parity

# Fewer rows at once than there are, prompts in pieces, and rows that are thrown out and begun again.
HARD = {"max_num_seqs": 3, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 18, "max_model_len": 1024}


def disagreements(backend: Backend, reference: Backend, new: int = 4) -> list[str]:
    checks = check_parity(backend, reference, max_new_tokens=new)
    assert len(checks) > 40, [check.detail for check in checks]
    return [f"{c.name}: {c.measured:.2g} > {c.tolerance:.2g}: {c.detail}" for c in checks if not c.passed]


@pytest.mark.real
@pytest.mark.parametrize("options", [HARD], ids=["all at once"])
def test_the_embedded_model(options: dict[str, Any]) -> None:
    reference = open_backend("transformers", "smollm2-135m", dtype="float32", device="cpu")
    assert not disagreements(open_backend("vllm", "smollm2-135m", dtype="float32", **options), reference)

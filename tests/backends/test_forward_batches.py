"""Reading any number of texts gives what reading them alone gives, each text once."""

from __future__ import annotations

import pytest
import torch

from persona_lens import Edit, Read, TokenBatch, wrap_model
from persona_lens.backend import TokenError
from persona_lens.backend.batches import forward_batches, forward_plan, tokens_at_once
from persona_lens.backend.reads import ReadKind
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cuda

TEXTS = TokenBatch.of([[5] * n for n in (3, 9, 1, 4, 7)], [[6] * n for n in (2, 1, 8, 3, 5)])


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(64, None), (2, None), (64, 12), (1, 1)])
def test_every_text_once_and_as_if_alone(max_rows: int, max_tokens: int | None) -> None:
    backend = wrap_model(tiny_model(), tiny_tokenizer())
    seen: list[int] = []
    batches = forward_batches(backend, TEXTS, Read.means(), logprobs=True, max_rows=max_rows, max_tokens=max_tokens)
    for indices, result in batches:
        seen += indices
        for position, index in enumerate(indices):
            alone = backend.forward(TEXTS.rows(index, index + 1), reads=Read.means(), logprobs=True)
            for name, value in alone.reads.items():
                torch.testing.assert_close(result.reads[name][position], value[0], rtol=1e-4, atol=1e-5, equal_nan=True)
            assert result.logprobs is not None
            assert alone.logprobs is not None
            torch.testing.assert_close(result.logprobs[position], alone.logprobs[0], rtol=1e-4, atol=1e-5)
    assert sorted(seen) == list(range(len(TEXTS)))


def test_shared_prompts_set_the_plan_only_where_a_backend_shares_them() -> None:
    """Under a read of every token all rows of a batch run in one pass, so that it must not be larger than a pass."""
    backend = wrap_model(tiny_model().cpu(), tiny_tokenizer())
    tokens = TokenBatch.of([[5] * 700] * 12, [[6] * 300] * 12)
    assert forward_plan(backend, tokens, (), Read.means()) == [list(range(12))]
    assert forward_plan(backend, tokens, (), [*Read.means(), Read(ReadKind.RESPONSE_NORM)]) == [list(range(12))]
    assert forward_plan(backend, tokens) == [list(range(12))]
    for reads in ([Read.projections(torch.ones(1, 16))], [*Read.means(), Read(ReadKind.NORMS)]):
        plan = forward_plan(backend, tokens, (), reads)
        assert all(len(batch) * 1000 <= tokens_at_once("cpu") for batch in plan)
        assert sorted(row for batch in plan for row in batch) == list(range(12))
    assert forward_plan(backend, tokens, [Edit.add(0, torch.ones(16), 1.0)]) == plan


def test_asking_for_nothing_is_refused() -> None:
    backend = wrap_model(tiny_model(), tiny_tokenizer())
    with pytest.raises(TokenError, match="nothing is asked for"):
        next(forward_batches(backend, TEXTS))

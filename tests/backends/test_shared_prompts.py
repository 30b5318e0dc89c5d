"""Rows that begin with the same prompt: it is computed once, and nothing else about the result changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from persona_lens.backend import Backend, Edit, ForwardResult, Read, TokenBatch
from persona_lens.backend.batches import SHORTEST_BEGINNING, forward_batches, tokens_to_run
from persona_lens.backend.reads import ReadKind
from persona_lens.backend.sinks import sink_limits
from tests.backends.fixtures import ADAPTERS, ARCHITECTURES, D_MODEL, matrix, tiny_backend
from tests.tiny import tiny_model

pytestmark = pytest.mark.cuda

PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [9], [3, 4, 5])
# Several responses to each of three prompts, not in order; an empty one among them.
ROWS = [(0, 4), (1, 1), (2, 9), (0, 0), (1, 6), (2, 2), (0, 12), (1, 3)]
BATCH = TokenBatch.of([PROMPTS[p] for p, _ in ROWS], [[20 + p + i for i in range(n)] for p, n in ROWS])


def alone(backend: Backend, row: int, reads: tuple[Read, ...]) -> ForwardResult:
    return backend.forward(BATCH.rows(row, row + 1), reads=reads, logprobs=True)


def assert_as_alone(backend: Backend, found: ForwardResult, rows: list[int], reads: tuple[Read, ...]) -> None:
    for position, row in enumerate(rows):
        wanted = alone(backend, row, reads)
        assert set(found.reads) == set(wanted.reads)
        for name, value in wanted.reads.items():
            torch.testing.assert_close(found.reads[name][position], value[0], rtol=1e-4, atol=1e-4, equal_nan=True)
        if found.logprobs is not None:
            assert wanted.logprobs is not None
            torch.testing.assert_close(found.logprobs[position], wanted.logprobs[0], rtol=1e-4, atol=1e-4)


def widths(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the ids of the passes that the module will run from now on."""
    shapes: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("logprobs", [True, False])
@pytest.mark.parametrize(("adapter", "architecture"), matrix())
def test_as_if_alone(adapter: str, architecture: str, logprobs: bool) -> None:
    backend = tiny_backend(adapter, architecture)
    found = backend.forward(BATCH, reads=Read.means(), logprobs=logprobs)
    assert (found.logprobs is not None) is logprobs
    assert_as_alone(backend, found, list(range(len(BATCH))), Read.means())


COMMON = [3 + i % 40 for i in range(SHORTEST_BEGINNING + 3)]
RUBRIC = TokenBatch.of([COMMON + PROMPTS[p] for p, _ in ROWS], [[20 + p + i for i in range(n)] for p, n in ROWS])


@pytest.mark.parametrize(("adapter", "architecture"), matrix((*ARCHITECTURES, "gemma3_text/window")))
def test_a_common_beginning_changes_nothing(adapter: str, architecture: str) -> None:
    """Also where attention looks back over a window, which padding between two tokens would use up."""
    backend, reads = tiny_backend(adapter, architecture), Read.means()[:1]
    found = backend.forward(RUBRIC, reads=reads, logprobs=True)
    assert reads[0].kind is ReadKind.RESPONSE_MEAN
    for row in range(len(RUBRIC)):
        wanted = backend.forward(RUBRIC.rows(row, row + 1), reads=reads, logprobs=True)
        mean = found.reads["response_mean"][row]
        torch.testing.assert_close(mean, wanted.reads["response_mean"][0], rtol=1e-4, atol=1e-4, equal_nan=True)
        assert found.logprobs is not None
        assert wanted.logprobs is not None
        torch.testing.assert_close(found.logprobs[row], wanted.logprobs[0], rtol=1e-4, atol=1e-4)


def test_a_common_beginning_runs_once() -> None:
    from persona_lens import wrap_model
    from tests.tiny import tiny_tokenizer

    module: Any = tiny_model()
    backend = wrap_model(module, tiny_tokenizer())
    assert sink_limits(backend)  # measured by a pass of its own
    shapes = widths(module)
    backend.forward(RUBRIC, logprobs=True)
    assert shapes[:2] == [(1, len(COMMON)), (3, 7)]
    shapes.clear()
    backend.forward(RUBRIC, reads=Read.means())  # a prompt's mean needs all of the prompt
    assert shapes[0] == (3, len(COMMON) + 7)
    shapes.clear()
    equal = TokenBatch.of([COMMON, [*COMMON, 9], COMMON, COMMON], [[5], [6], [7], [8]])
    backend.forward(equal, logprobs=True)
    assert shapes[:2] == [(1, len(COMMON) - 1), (2, 2)]  # a token of the shortest prompt is left


EQUAL = TokenBatch.of([COMMON] * 4 + [[*COMMON, 9]], [[5, 6], [5, 7], [5], [], [8]])
ALL_DIFFERENT = TokenBatch.of([[5, 6], [7]], [[8], [9, 10]])


@pytest.mark.parametrize("batch", [BATCH, RUBRIC, EQUAL, ALL_DIFFERENT])
@pytest.mark.parametrize("reads", [(), Read.means()[:1], Read.means()[1:], Read.means()])
def test_what_runs_is_known_beforehand(batch: TokenBatch, reads: tuple[Read, ...]) -> None:
    from persona_lens import wrap_model
    from tests.tiny import tiny_tokenizer

    module: Any = tiny_model()
    backend, ran = wrap_model(module, tiny_tokenizer()), [0]
    assert sink_limits(backend)  # measured by a pass of its own

    def count(_: nn.Module, __: object, given: dict[str, Any]) -> None:
        ran[0] += int(given["attention_mask"][:, -given["input_ids"].shape[1] :].sum())

    module.register_forward_pre_hook(count, with_kwargs=True)
    backend.forward(batch, reads=reads, logprobs=not reads)
    assert ran[0] == tokens_to_run(backend, batch, reads=reads, logprobs=not reads)


@pytest.mark.parametrize("layers", [(0,), (1, 2), None])
def test_some_layers_and_some_reads(layers: tuple[int, ...] | None) -> None:
    backend = tiny_backend("transformers")
    lengths = Read(ReadKind.RESPONSE_NORM, layers)
    for reads in (
        (Read.means(layers)[0],),
        Read.means(layers)[1:],
        (Read.means((0,))[0], Read.means(layers)[2]),
        (lengths,),
        (*Read.means(), lengths),
    ):
        found = backend.forward(BATCH, reads=reads)
        assert_as_alone(backend, found, list(range(len(BATCH))), reads)


def test_a_prompt_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from persona_lens import wrap_model
    from persona_lens.backend import batches
    from tests.tiny import tiny_tokenizer

    module: Any = tiny_model()
    backend = wrap_model(module, tiny_tokenizer())
    assert sink_limits(backend)  # measured by a pass of its own
    shapes = widths(module)
    found = backend.forward(BATCH, reads=Read.means())
    assert shapes == [(3, 7), (7, 12)] or shapes == [(3, 7), (8, 12)]
    shapes.clear()
    monkeypatch.setattr(batches, "tokens_at_once", lambda device: 12)
    in_pieces = backend.forward(BATCH, reads=Read.means())
    assert shapes[0] == (3, 7)
    assert len(shapes) > 3
    assert all(rows * width <= 12 for rows, width in shapes[1:])
    for name, value in found.reads.items():
        torch.testing.assert_close(in_pieces.reads[name], value, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_copies_of_a_prompt_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short responses to a long prompt: each takes a copy of its keys and values, so few run at once."""
    from persona_lens import wrap_model
    from persona_lens.backend import batches
    from tests.tiny import tiny_tokenizer

    monkeypatch.setattr(batches, "MAX_TOKENS", 100)
    module: Any = tiny_model().cpu()  # a GPU takes more
    backend, shapes = wrap_model(module, tiny_tokenizer()), widths(module)
    many = TokenBatch.of([COMMON] * 20, [[i, 5] for i in range(20)])
    found = backend.forward(many, logprobs=True)
    assert shapes[0] == (1, len(COMMON))
    assert [rows for rows, _ in shapes[1:]] == [100 // len(COMMON)] * 10
    assert found.logprobs is not None
    for row in (0, 7, 19):
        wanted = backend.forward(many.rows(row, row + 1), logprobs=True).logprobs
        assert wanted is not None
        torch.testing.assert_close(found.logprobs[row], wanted[0], rtol=1e-4, atol=1e-4)


def test_edited_rows_do_not_share() -> None:
    """An edit may differ from row to row, in the prompt too."""
    backend = tiny_backend("transformers")
    edit = Edit.add(0, torch.ones(D_MODEL), torch.arange(float(len(BATCH))))
    found = backend.forward(BATCH, [edit], Read.means())
    first, same_prompt = (found.reads["prompt_last"][row] for row in (0, 3))
    assert not torch.allclose(first, same_prompt, atol=1e-3)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("max_rows", "max_tokens"), [(64, None), (3, None), (64, 20)])
def test_forward_batches(adapter: str, max_rows: int, max_tokens: int | None) -> None:
    backend, seen = tiny_backend(adapter), []
    for rows, found in forward_batches(backend, BATCH, Read.means(), max_rows=max_rows, max_tokens=max_tokens):
        seen += rows
        assert_as_alone(backend, found, rows, Read.means())
    assert sorted(seen) == list(range(len(BATCH)))

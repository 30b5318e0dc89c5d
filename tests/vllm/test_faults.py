"""Seeded faults of an engine: the checks that are always on find each, and the next call is right again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from persona_lens.backend import Backend, BackendError, Edit, Positions, Read, Sampling, TokenBatch, wrap_model
from persona_lens.backend.verification import try_edits
from tests.backends.fixtures import PROMPTS, TEXT, assert_close, direction, engine_of, tokenizer
from tests.tiny import tiny_model

EDITS = (Edit.add(1, direction(), 2.0),)
LONG = TokenBatch.of([[5 + i % 60 for i in range(70)], [7] * 40], [[20, 21, 22], [23]])


@pytest.fixture(scope="module")
def engine() -> Backend:
    """An engine that cuts prompts into pieces of 48 tokens."""
    llm = engine_of(tiny_model(), tokenizer(), max_num_batched_tokens=48, max_num_seqs=4)
    backend = wrap_model(llm, tokenizer(), backend="vllm")
    assert backend.forward(TEXT, (), Read.means()).reads  # what is measured once is
    return backend


def assert_the_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """To the last bit."""
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


@contextmanager
def skipping(layer: int, in_pass: int) -> Iterator[None]:
    """A hook that is not called in one pass, as where a compiled model runs."""
    from persona_lens_vllm.worker import Calls

    at_block, seen = Calls._at_block, {"passes": 0}

    def sometimes(self: Any, number: int, *given: Any) -> Any:
        if number != layer:
            return at_block(self, number, *given)
        seen["passes"] += 1
        return None if seen["passes"] == in_pass else at_block(self, number, *given)

    with patch.object(Calls, "_at_block", sometimes):
        yield


@contextmanager
def hooked_twice() -> Iterator[None]:
    from persona_lens_vllm.worker import Calls

    at_block = Calls._at_block

    def twice(self: Any, layer: int, block: Any, given: Any, output: Any) -> Any:
        changed = at_block(self, layer, block, given, output)
        return at_block(self, layer, block, given, output if changed is None else changed)

    with patch.object(Calls, "_at_block", twice):
        yield


@contextmanager
def steering_the_first_part_only() -> Iterator[None]:
    from persona_lens.backend.writing import Writer

    block = Writer.block

    def first(self: Any, layer: int, h: Any, masks: Any, sinks: Any) -> Any:
        masks.tally, tally = (lambda *_: None) if masks.tallies.passes > 1 else masks.tally, masks.tally
        if masks.tallies.passes > 1:
            return h
        masks.tally = tally
        return block(self, layer, h, masks, sinks)

    with patch.object(Writer, "block", first):
        yield


@contextmanager
def returning_something_else() -> Iterator[None]:
    """A block whose output nobody knows."""
    from persona_lens_vllm import worker
    from persona_lens_vllm.stream import stream_of

    def strange(output: Any) -> Any:
        return stream_of((output, {"hidden": output}))

    with patch.object(worker, "stream_of", strange):
        yield


SEEDED: dict[str, tuple[Callable[[], Any], str]] = {
    "a pass without the hook": (lambda: skipping(1, 2), "blocks 1 ran without being read or edited in some pass"),
    "two hooks at a block": (hooked_twice, "blocks 0, 1, 2 ran"),
    "the first part steered only": (
        steering_the_first_part_only,
        "an edit at layer 1 was made at .* positions of row . instead of",
    ),
    "something else from a block": (returning_something_else, "no residual stream"),
}


@pytest.mark.parametrize(("seeded", "message"), SEEDED.values(), ids=SEEDED.keys())
def test_a_seeded_fault_is_found_and_gone_with_what_caused_it(
    engine: Backend, seeded: Callable[[], Any], message: str
) -> None:
    before = engine.forward(LONG, EDITS, Read.means()).reads
    with seeded(), pytest.raises(Exception, match=message):
        engine.forward(LONG, EDITS, Read.means())
    after = engine.forward(LONG, EDITS, Read.means()).reads
    assert_the_same(after, before)


def test_a_position_that_is_read_again_when_its_row_is_begun_again_is_found() -> None:
    """Four rows of which three have room: one is thrown out, and computed again."""
    from persona_lens.backend.packed.masks import PackedMasks

    llm = engine_of(tiny_model(), tokenizer(), num_gpu_blocks_override=17, max_num_seqs=4)
    backend = wrap_model(llm, tokenizer(), backend="vllm")
    prompts = [[5 + (i + row) % 60 for i in range(110)] for row in range(4)]
    run: Any = lambda rows: backend.generate(rows, Sampling(40), EDITS, Read.means())  # noqa: E731
    together = run(prompts)
    for row, prompt in enumerate(prompts):
        alone = run([prompt])
        assert alone.responses[0] == together.responses[row]
        assert_close(alone.reads, {name: value[row : row + 1] for name, value in together.reads.items()})
    begin_pass = PackedMasks.begin_pass

    def forgetting(self: Any, *given: Any) -> None:
        before = self.tallies.computed
        self.tallies.computed = torch.zeros_like(before)
        begin_pass(self, *given)
        self.tallies.computed = torch.maximum(self.tallies.computed, before)

    found = pytest.raises(BackendError, match=r"positions of row \d instead of \d+")
    with patch.object(PackedMasks, "begin_pass", forgetting), found:
        run(prompts)
    assert run(prompts).responses == together.responses


def test_a_cache_filled_under_another_steering_is_found(engine: Backend) -> None:
    """A request without its salt goes on from what a steered one left."""
    from persona_lens_vllm.engine import Job

    add = Job.add

    def unsalted(self: Any, prompts: Any, salts: Any, noises: Any, **more: Any) -> None:
        add(self, prompts, [""] * len(prompts), noises, **more)

    prompts = [[9 + i % 50 for i in range(200)]]  # more than a block of the cache
    plain = engine.generate(prompts, Sampling(2))
    found = pytest.raises(BackendError, match="went on from a cache that was computed under other edits")
    with patch.object(Job, "add", unsalted), found:
        engine.generate(prompts, Sampling(2), EDITS)
    assert engine.generate(prompts, Sampling(2)).responses == plain.responses


def test_an_edit_that_fails_takes_no_other_call_with_it(engine: Backend) -> None:
    class Failing(Edit):
        def plain(self) -> dict[str, Any]:
            return {**super().plain(), "operation": "fail inside the steering"}

    before = engine.generate(PROMPTS, Sampling(4), EDITS, Read.means())
    with pytest.raises(Exception, match="inside the steering"):
        engine.generate(PROMPTS, Sampling(4), [Failing(1, direction(), positions=Positions.RESPONSE)], Read.means())
    after = engine.generate(PROMPTS, Sampling(4), EDITS, Read.means())
    assert after.responses == before.responses
    assert_the_same(after.reads, before.reads)


@contextmanager
def hooked_on_a_copy() -> Iterator[None]:
    """What is written goes into a copy of the residual, from which nothing goes on; reads show it."""
    from persona_lens_vllm.worker import Calls

    at_block = Calls._at_block

    def copied(self: Any, number: int, block: Any, given: Any, output: Any) -> Any:
        at_block(self, number, block, given, output)

    with patch.object(Calls, "_at_block", copied):
        yield


@contextmanager
def without_salts() -> Iterator[None]:
    """A cache that does not know of edits."""
    from persona_lens_vllm.engine import Job

    add = Job.add

    def unsalted(self: Any, prompts: Any, salts: Any, noises: Any, **more: Any) -> None:
        add(self, prompts, [""] * len(prompts), noises, **more)

    with patch.object(Job, "add", unsalted):
        yield


UNCOUNTED: dict[str, tuple[Callable[[], Any], str]] = {
    "two hooks at a block": (hooked_twice, "edits at every layer are read there"),
    "a copy": (hooked_on_a_copy, "edits at every layer"),
    "a cache that does not know of edits": (without_salts, "a second turn"),
}


@pytest.mark.parametrize(("seeded", "point"), UNCOUNTED.values(), ids=UNCOUNTED.keys())
def test_what_nobody_counts_is_found_by_edits_of_a_known_effect(
    engine: Backend, seeded: Callable[[], Any], point: str
) -> None:
    from persona_lens_vllm import call

    assert all(each.passed for each in try_edits(engine))
    with patch.object(call, "check_outcome", lambda *_: None), seeded():
        found = [each.name for each in try_edits(engine) if not each.passed]
    assert any(point in name for name in found), found
    assert all(each.passed for each in try_edits(engine))

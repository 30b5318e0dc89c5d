"""The parts of the vLLM backend that need no vLLM: its checks, its streams, the keys of its caches, and its loop."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend import BackendError, Edit, Positions, Read, ReadKind, Span, TokenBatch
from persona_lens.backend.packed.checks import FidelityError
from persona_lens.backend.packed.intervention import PackedIntervention
from persona_lens.backend.packed.run import edits_of_text
from persona_lens.backend.parts.machine import Part
from persona_lens_vllm.caches import cache_keys
from persona_lens_vllm.engine import Engine, Job
from persona_lens_vllm.fidelity import check_outcome
from persona_lens_vllm.stream import stream_of, with_stream
from persona_lens_vllm.worker import Order, Outcome
from tests.backends.packs import ALL_READS, LAYERS, SINKS_TOO, D, Rows, beginnings, passes, random_edits, run_pass

OF_RESPONSES = (Read(ReadKind.RESPONSE_MEAN), Read(ReadKind.RESPONSE_NORM))


def outcome_of(rng: random.Random, rows: Rows, edits: Any, reads: Any, begins: list[int]) -> tuple[Order, Outcome]:
    """What a worker does when nothing goes wrong."""
    call = rows.call(edits, reads)
    intervention = PackedIntervention(call)
    for chunks in passes(rng, rows, begins):
        run_pass(rows, intervention, chunks, range(LAYERS))
    order = Order(call, ("",) * len(rows.ids))
    return order, Outcome(intervention.results(), intervention.masks.settled(), None, (), None)


def all_kinds(rows: Rows) -> tuple[bytes, ...]:
    """What all tokens of each row are, those behind its response too."""
    return replace(rows, kept=rows.totals).kinds


def counted(rows: Rows, edit: Edit, row: int, begin: int, stop: int) -> int:
    """The positions of an edit in a part of a row, looked at one by one."""
    prompt, positions = rows.prompts[row], edit.positions
    if isinstance(positions, Tensor):
        left = positions.shape[1] - rows.texts[row]
        return sum(bool(positions[row, left + at]) for at in range(begin, min(stop, rows.texts[row])))
    span = positions if isinstance(positions, Span) else Span(positions)
    if span.kind in (Positions.THINKING, Positions.ANSWER):
        part = Part[span.kind.name]
        of_kind = [at for at, each in enumerate(all_kinds(rows)[row]) if each == part]
        return sum(begin <= at < stop for at in of_kind[span.start : span.stop])
    begins = {"response": prompt, "generating": prompt - 1}.get(str(span.kind), 0)
    of_kind = list(range(begins, prompt if span.kind is Positions.PROMPT else 1000))
    return sum(begin <= at < stop for at in of_kind[span.start : span.stop])


@pytest.mark.parametrize("seed", range(20))
def test_what_was_done_rightly_passes_and_its_edits_are_counted(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = Rows.random(rng, generated=rng.random() < 0.5)
    cached = rng.random() < 0.5
    begins = beginnings(rng, rows) if cached else [0] * len(rows.kept)
    edits, reads = random_edits(rng, rows), OF_RESPONSES if cached else rng.choice([ALL_READS, SINKS_TOO])
    order, outcome = outcome_of(rng, rows, edits, reads, begins)
    partly = [row for row, begin in enumerate(begins) if begin > rows.prompts[row]]
    check_outcome(order, outcome, rows.kept, partly, rows.kinds)
    if any(rows.kept[row] > rows.prompts[row] for row in partly):
        with pytest.raises(FidelityError, match="response_mean of row"):
            check_outcome(order, outcome, rows.kept)
    done = outcome.tallies
    for number, edit in enumerate(edits):
        parts = zip(done.began.tolist(), done.computed.tolist(), strict=True)
        wanted = [counted(rows, edit, row, begin, stop) for row, (begin, stop) in enumerate(parts)]
        assert done.edited[number].tolist() == wanted, edit


def _shifted(tensor: Tensor, row: int, by: int) -> Tensor:
    changed = tensor.clone()
    changed[row] += by
    return changed


def _with(outcome: Outcome, **tallies: Any) -> Outcome:
    return replace(outcome, tallies=replace(outcome.tallies, **tallies))


def _fewer(kind: str, by: int) -> Callable[[Outcome], Outcome]:
    def wrong(outcome: Outcome) -> Outcome:
        read = outcome.reads[kind]
        return replace(outcome, reads={**outcome.reads, kind: {**read, "counts": _shifted(read["counts"], 1, by)}})

    return wrong


WRONG: dict[str, tuple[Callable[[Outcome], Outcome], str]] = {
    "a block was skipped": (
        lambda o: _with(o, blocks={**o.tallies.blocks, 1: o.tallies.blocks[1] - 1}),
        "blocks 1 ran",
    ),
    "blocks never ran": (lambda o: _with(o, blocks=dict.fromkeys(o.tallies.blocks, 0)), "blocks 0, 1, 2 ran"),
    "a cache of something else": (lambda o: replace(o, foreign=(0, 1)), "rows 0, 1 went on from a cache"),
    "a row never ran": (lambda o: _with(o, began=_shifted(o.tallies.began, 0, -1)), "row 0 were not computed"),
    "a row's end is missing": (lambda o: _with(o, computed=_shifted(o.tallies.computed, 1, -1)), "row 1 were not"),
    "a beginning is missing": (lambda o: _with(o, began=_shifted(o.tallies.began, 1, 1)), "row 1 went on from a cache"),
    "an edit was not made": (lambda o: _with(o, edited={}), "an edit at layer 0 was made at 0 positions"),
    "made too often": (lambda o: _with(o, edited={0: _shifted(o.tallies.edited[0], 1, 1)}), "5 positions of row 1"),
    "response": (_fewer("response_mean", -1), "response_mean of row 1 is of 1 tokens instead of 2"),
    "prompt": (_fewer("prompt_mean", 1), "prompt_mean of row 1 is of 4 tokens instead of 3"),
    "prompt, too few": (_fewer("prompt_mean", -1), "prompt_mean of row 1 is of 2 tokens instead of 3"),
    "last": (_fewer("prompt_last", -1), "prompt_last of row 1 is of 0 tokens instead of 1"),
    "norm": (_fewer("response_norm", 3), "response_norm of row 1 is of 5 tokens instead of 2"),
}


@pytest.mark.parametrize(("wrong", "said"), WRONG.values(), ids=WRONG)
def test_every_way_to_be_wrong_is_found(wrong: Callable[[Outcome], Outcome], said: str) -> None:
    torch.manual_seed(0)
    totals = [2, 5]
    residuals = [torch.randn(LAYERS, total, D) for total in totals]
    rows = Rows([1, 3], totals, totals, 0, [torch.ones(total, dtype=torch.long) for total in totals], residuals)
    edits = [Edit.add(0, torch.ones(D), positions=Span(Positions.ALL, 1))]
    order, outcome = outcome_of(random.Random(0), rows, edits, SINKS_TOO, [0, 0])
    check_outcome(order, outcome, totals)
    with pytest.raises(FidelityError, match=said):
        check_outcome(order, wrong(outcome), totals)


def test_the_stream_is_found_in_what_blocks_return_and_put_back() -> None:
    a, b, h = torch.randn(4, D), torch.randn(4, D), torch.randn(4, D)
    kept = object()
    for output, stream in (
        (a, a),
        (a.unsqueeze(0), a),
        ((a, b), a + b),
        ((a, None), a),
        ((a,), a),
        ((a, b, kept), a + b),
    ):
        assert torch.equal(stream_of(output), stream)
        again = with_stream(output, h)
        assert type(again) is type(output)
        assert torch.equal(stream_of(again), h)
        if isinstance(output, tuple):
            assert [type(part) for part in again] == [type(part) for part in output]
            assert again[2:] == output[2:]
    for unknown in (None, (), (None, a), torch.randn(2, 3, D), (a, b[:2]), {"h": a}):
        with pytest.raises(ValueError, match="no residual stream"):
            stream_of(unknown)


TWO = TokenBatch.of([[1, 2, 3], [1, 2, 3]])
MASK = torch.tensor([[True, False, True], [True, False, True]])


def keys(*edits: Edit, tokens: TokenBatch = TWO) -> list[str]:
    return cache_keys(edits, tokens)


def test_rows_share_a_cache_only_where_the_same_is_done_to_them() -> None:
    v = torch.ones(D)
    assert keys() == ["", ""]
    alike = (Edit.add(0, v), Edit.add(0, v, torch.tensor([2.0, 2.0])), Edit.add(1, v, positions=MASK))
    for edit in alike:
        one, other = keys(edit)
        assert one == other
        assert one
    unlike_rows = Edit.add(0, v, torch.tensor([1.0, 2.0])), Edit.add(0, v, positions=MASK ^ MASK.flip(1).triu(2))
    for edit in unlike_rows:
        assert len(set(keys(edit))) == 2
    all_edits = (*alike, *unlike_rows, Edit.add(0, v, 2.0), Edit.add(1, v), Edit.add(0, -v), Edit.ablate(0, v))
    firsts = [keys(edit)[0] for edit in all_edits]
    assert len(set(firsts)) == len(firsts) == len({keys(edit, Edit.add(2, v))[0] for edit in all_edits})
    assert keys(Edit.add(0, v), Edit.add(1, v))[0] != keys(Edit.add(1, v), Edit.add(0, v))[0]


def test_where_a_prompt_ends_matters_to_edits_that_go_by_it() -> None:
    same_text = TokenBatch.of([[1, 2], [1, 2, 3]], [[3, 4], [4]])
    for where in (*Positions, Span(Positions.ALL, 1), Span(Positions.RESPONSE, 1)):
        one, other = keys(Edit.add(0, torch.ones(D), positions=where), tokens=same_text)
        assert (one == other) == (where in (Positions.ALL, Span(Positions.ALL, 1))), where


def test_numbers_of_a_row_do_not_run_into_each_other() -> None:
    """1.0 and a prompt of 12 tokens are not 1.01 and one of 2."""
    tokens = TokenBatch.of([[1] * 12, [1] * 2], [[1] * 8, [1] * 18])
    edit = Edit.add(0, torch.ones(D), torch.tensor([1.0, 1.01], dtype=torch.float64), Positions.RESPONSE)
    assert len(set(keys(edit, tokens=tokens))) == 2


def test_masks_over_prompts_grow_with_what_was_generated() -> None:
    text = TokenBatch.of([[1, 2, 3], [4]], [[5], [6, 7, 8, 9]])
    mask = torch.tensor([[True, False, True], [False, False, True]])
    plain = Edit.add(0, torch.ones(D))
    grown, same = edits_of_text([replace(plain, positions=mask), plain], text)
    assert isinstance(grown.positions, Tensor)
    assert grown.positions.int().tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert same is plain


class EngineDeadError(Exception):
    """As vLLM's is called."""


class ScriptedLLM:
    """An engine that gives each of its requests a token a step, a few requests at a time.

    Args:
        fails: Raised in the step of this number.
    """

    def __init__(self, fails: dict[int, Exception] | None = None) -> None:
        self.llm_engine = self
        self.waiting: dict[str, int] = {}
        self.given: dict[str, list[int]] = {}
        self.aborted: list[str] = []
        self.closed: list[str] = []
        self.steps = 0
        self._fails = fails or {}
        self._alone = threading.Lock()

    def _only(self) -> None:
        if not self._alone.acquire(blocking=False):
            raise AssertionError("two threads in the engine at once")

    def add_request(self, name: str, prompt: int, _: Any) -> None:
        self._only()
        self.waiting[name], self.given[name] = prompt, []
        self._alone.release()

    def abort_request(self, names: list[str]) -> None:
        self._only()
        self.aborted += names
        for name in names:
            self.waiting.pop(name, None)
        self._alone.release()

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self._only()
        if method == "persona_lens_close":
            self.closed.append(args[0])
        self._alone.release()
        return [pickle.dumps(method), None]

    def step(self) -> list[Any]:
        self._only()
        try:
            self.steps += 1
            if self.steps in self._fails:
                raise self._fails.pop(self.steps)
            outputs = []
            for name in list(self.waiting)[:3]:
                self.given[name].append(len(self.given[name]))
                finished = len(self.given[name]) == self.waiting[name]
                outputs.append(
                    SimpleNamespace(
                        request_id=name,
                        finished=finished,
                        prompt_logprobs=None,
                        outputs=[SimpleNamespace(token_ids=list(self.given[name]), logprobs=None)],
                    )
                )
                if finished:
                    del self.waiting[name]
            return outputs
        finally:
            self._alone.release()


def started(engine: Engine, lengths: list[int]) -> Job:
    """A job whose rows get so many tokens."""
    job = engine.start("order")  # type: ignore[arg-type]
    job.unfinished.update(range(len(lengths)))
    engine.add([(job.request(row), length, None) for row, length in enumerate(lengths)])
    return job


def in_threads(work: Callable[[int], None], threads: int) -> None:
    """Run a function at the same time in several threads, each with its number; one that never ends is an error."""
    running = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(20)
    assert not any(thread.is_alive() for thread in running)


def test_jobs_of_several_threads_run_together() -> None:
    """One step at a time; every job hears all of its own, its last tokens before it goes on included."""
    llm = ScriptedLLM()
    engine = Engine(llm)
    finals: dict[str, Any] = {}

    def hear(job: Job, heard: list[tuple[int, int]]) -> None:
        heard.append((sum(map(len, job.tokens.values())), len(job.unfinished)))

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(5):
            lengths = [rng.randint(1, 6) for _ in range(rng.randint(1, 4))]
            job = started(engine, lengths)
            heard: list[tuple[int, int]] = []
            job.run(partial(hear, job, heard))
            assert len(engine.end(job)) == 1
            finals[job.name] = ([len(job.tokens[row]) for row in range(len(lengths))], lengths, heard[-1])

    in_threads(work, 6)
    assert len(finals) == 30
    for got, lengths, last in finals.values():
        assert got == lengths
        assert last == (sum(lengths), 0)
    assert sorted(llm.closed) == sorted(finals)
    assert llm.aborted == []
    assert engine.received > 0


def test_the_last_news_by_another_threads_step_are_told() -> None:
    """Between what is told of one step and the next wait somebody else's step may end the job."""
    engine = Engine(ScriptedLLM())
    mine, others = started(engine, [2]), started(engine, [4])
    told: list[int] = []

    def tell() -> None:
        told.append(len(mine.tokens[0]))
        if len(told) == 1:
            engine.step(others, others.news)

    mine.run(tell)
    assert told == [1, 2]
    assert not engine.step(mine, mine.news)  # nothing is new, and nothing will be: this does not wait


def test_an_error_in_a_step_is_one_threads() -> None:
    llm = ScriptedLLM({3: RuntimeError("no memory")})
    engine = Engine(llm)
    ended: list[str] = []

    def work(_: int) -> None:
        job = started(engine, [4, 4])
        try:
            job.run()
            ended.append("whole")
        except RuntimeError:
            ended.append("failed")
        engine.end(job)
        assert not ({job.request(row) for row in range(2)} & set(llm.waiting))

    in_threads(work, 3)
    assert sorted(ended) == ["failed", "whole", "whole"]
    assert llm.waiting == {}


def test_what_is_left_of_a_job_is_taken_back_and_the_end_of_an_engine_explained() -> None:
    llm = ScriptedLLM({2: EngineDeadError()})
    engine = Engine(llm)
    job = started(engine, [1, 5, 5])
    engine.step(job, job.news)
    job.stop([0, 1])
    assert llm.aborted == [job.request(1)]
    assert job.unfinished == {2}
    with pytest.raises(BackendError, match="the vLLM engine has ended"):
        job.run()
    engine.end(job)
    assert llm.aborted[1:] == [job.request(2)]
    assert llm.closed == [job.name]

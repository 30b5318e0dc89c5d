"""Edits, reads and streams at thinking and at answer, compared with passes under masks that are made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend import (
    Backend,
    Edit,
    EditError,
    Operation,
    Part,
    Parts,
    Positions,
    Read,
    ReadError,
    ReadKind,
    Sampling,
    Schedule,
    Span,
    TokenBatch,
    Watch,
    WatchedTokens,
    watched_generation,
)
from persona_lens.backend.continuous import continuous
from persona_lens.backend.parts.asked import parts_for
from persona_lens.backend.single_rows import SingleRowsBackend
from tests.backends.fixtures import (
    ADAPTERS,
    ALL_ACTIVATIONS,
    PROMPTS,
    REFERENCE,
    assert_close,
    direction,
    encode,
    thinking_backend,
    tiny_backend,
)
from tests.tiny import thinking_tokenizer

OPEN, CLOSE = (thinking_tokenizer().get_vocab()[token] for token in ("<think>", "</think>"))
HEAD = encode("<|im_start|>assistant\n")[0]
HEADS = tuple((*prompt, *HEAD) for prompt in PROMPTS)
REPLIES = (
    (OPEN, *encode("hm")[0], CLOSE, *encode("\nyes")[0]),
    (*encode("not <think>\n")[0], OPEN, *encode("all")[0]),
    (OPEN, CLOSE, *encode("4")[0], OPEN, CLOSE),
)
TEXT = TokenBatch.of(HEADS, REPLIES)
KINDS = (Positions.THINKING, Positions.ANSWER)
PARTS = {Positions.THINKING: Part.THINKING, Positions.ANSWER: Part.ANSWER}
READS = (*Read.means(), Read(ReadKind.THINKING_MEAN), Read(ReadKind.ANSWER_MEAN, (0, 2)), ALL_ACTIVATIONS)


@pytest.fixture(params=[(adapter, architecture) for adapter in ADAPTERS for architecture in ("llama", "gemma2")])
def thinking(request: pytest.FixtureRequest) -> Backend:
    return thinking_backend(*request.param)


def mark(text: TokenBatch, kind: Positions, span: range = range(1000)) -> Tensor:
    """Which tokens are of a part, told by a walk over each response. bool [batch, width]."""
    width = max(text.lengths)
    mask = torch.zeros(len(text), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(text.prompts, text.responses, strict=True)):
        inside, fresh, found = prompt[-1] == OPEN, True, []
        for at, token in enumerate(response):
            part = Part.THINKING if inside else Part.ANSWER
            if token == CLOSE and inside:
                inside, fresh, part = False, True, Part.NEITHER
            elif token == OPEN and not inside and fresh:
                inside, part = True, Part.NEITHER
            elif token in (0, 1, 2):  # control tokens
                inside, fresh, part = False, True, Part.NEITHER
            elif not inside:
                fresh = token in encode("\n")[0] or (fresh and token in encode(" \t\r\v\f")[0])
            if part == PARTS[kind]:
                found.append(at)
        for number, at in enumerate(found):
            mask[row, width - len(response) + at] = number in span
    return mask


def edits_at(positions: Any, *, schedule: bool = False) -> list[Edit]:
    points = Schedule(((0, 1.0), (2, 0.0), (3, 0.5))) if schedule else None
    return [
        Edit(1, direction(3), coefficient=0.7, positions=positions, schedule=points),
        Edit(2, direction(4), Operation.ABLATE, positions=positions),
    ]


def check_reads_of(found: dict[str, Tensor], text: TokenBatch) -> None:
    every = found["activations"]
    for kind, name, layers in ((KINDS[0], "thinking_mean", (0, 1, 2)), (KINDS[1], "answer_mean", (0, 2))):
        mask = mark(text, kind)
        for row in range(len(text)):
            some = every[row][list(layers)][:, mask[row]]
            assert_close(found[name][row], some.mean(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_edited_and_read_as_by_masks(thinking: Backend, kind: Positions) -> None:
    assert mark(TEXT, kind).sum(dim=1).tolist() == ([2, 3, 0] if kind is Positions.THINKING else [4, 12, 3])
    plain = thinking.forward(TEXT, (), READS)
    check_reads_of(dict(plain.reads), TEXT)
    for positions, span in ((kind, range(1000)), (Span(kind, 1), range(1, 1000)), (Span(kind, 0, 2), range(2))):
        got = thinking.forward(TEXT, edits_at(positions), READS, logprobs=True)
        want = thinking.forward(TEXT, edits_at(mark(TEXT, kind, span)), READS, logprobs=True)
        assert_close(dict(got.reads), dict(want.reads))
        check_reads_of(dict(got.reads), TEXT)
        assert not torch.equal(got.reads["activations"].nan_to_num(), plain.reads["activations"].nan_to_num())


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_is_edited_and_read_as_the_text_that_it_makes(
    thinking: Backend, kind: Positions, use_cache: bool
) -> None:
    """Some rows begin in thinking that their prompt opened."""
    prompts = (*HEADS, (*HEADS[0], OPEN), (*HEADS[1], OPEN))
    sampling = Sampling(32, 1.0, seeds=tuple(range(5)), use_cache=use_cache)
    for positions, span in ((kind, range(1000)), (Span(kind, 1, 6), range(1, 6))):
        made = thinking.generate(prompts, sampling, edits_at(positions), READS)
        text = TokenBatch.of(prompts, made.responses)
        there = [mark(text, each).sum() for each in KINDS]
        assert all(there), "the seeds bring both"
        assert any(CLOSE in row for row in made.responses)
        want = thinking.forward(text, edits_at(mark(text, kind, span)), READS).reads
        assert_close(dict(made.reads), dict(want))
        check_reads_of(dict(made.reads), text)


def test_a_schedule_counts_the_tokens_of_its_part(thinking: Backend) -> None:
    for kind in KINDS:
        got = thinking.forward(TEXT, edits_at(kind, schedule=True)[:1], [ALL_ACTIVATIONS]).reads["activations"]
        plain = thinking.forward(TEXT, (), [ALL_ACTIVATIONS]).reads["activations"]
        factors = (1.0, 0.5, 0.0, 0.5, *[0.5] * 20)
        for row, mask in enumerate(mark(TEXT, kind)):
            places = mask.nonzero().flatten().tolist()
            moved = got[row, 1, places] - plain[row, 1, places]
            if places:
                want = torch.stack([0.7 * factor * direction(3) for factor in factors[: len(places)]])
                assert_close(moved, want, rtol=1e-3)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_prompts_that_are_computed_once_and_rows_alone(adapter: str) -> None:
    backend = thinking_backend(adapter)
    prompts = [(*HEADS[0], OPEN)] * 3 + [HEADS[0]] * 3
    text = TokenBatch.of(prompts, REPLIES * 2)
    reads = (Read(ReadKind.THINKING_MEAN), Read(ReadKind.ANSWER_MEAN), Read(ReadKind.RESPONSE_MEAN))
    shared = backend.forward(text, (), reads).reads
    every = backend.forward(text, (), (*reads, ALL_ACTIVATIONS)).reads
    alone = SingleRowsBackend(backend, cached=True).forward(text, (), reads).reads
    for read in reads:
        assert_close(shared[read.kind], every[read.kind])
        assert_close(alone[read.kind], every[read.kind])
    for kind in KINDS:
        mask = mark(text, kind)
        for row in range(len(text)):
            assert_close(shared[f"{kind}_mean"][row], every["activations"][row][:, mask[row]].mean(dim=1))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_rows_that_come_and_go(adapter: str) -> None:
    backend = continuous(thinking_backend(adapter), 3)
    prompts = (*HEADS, (*HEADS[0], OPEN))
    sampling = Sampling(16, 1.0, seeds=(5, 6, 7, 8))
    for kind in KINDS:
        for positions, span in ((kind, range(1000)), (Span(kind, 2), range(2, 1000))):
            made = backend.generate(prompts, sampling, edits_at(positions), READS)
            text = TokenBatch.of(prompts, made.responses)
            want = backend.forward(text, edits_at(mark(text, kind, span)), READS).reads
            assert_close(dict(made.reads), dict(want))
            check_reads_of(dict(made.reads), text)


def test_a_stream_says_what_each_token_is(thinking: Backend) -> None:
    parts = Parts.of(thinking.tokenizer)
    told: list[WatchedTokens] = []
    watch = Watch(direction()[None], told.append, (1,), parts=parts)
    prompts = (*HEADS, (*HEADS[0], OPEN))
    made = watched_generation(thinking, prompts, Sampling(12, 1.0, seeds=(1, 2, 3, 4)), watch)
    assert told[0].parts is None
    for row, response in enumerate(made.responses):
        said = [each.parts[row] for each in told[1:] if each.parts is not None]
        assert tuple(part for part in said if part is not None) == parts.of_response(prompts[row], response)
        assert said[len(response) :] == [None] * (len(said) - len(response))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_model_that_never_thinks_answers_with_all_of_its_response(adapter: str) -> None:
    backend = tiny_backend(adapter)
    reads = (Read(ReadKind.ANSWER_MEAN), Read(ReadKind.RESPONSE_MEAN), ALL_ACTIVATIONS)
    edit = Edit.add(1, direction(), 1.0)
    one, other = (
        backend.generate(PROMPTS, Sampling(5), [replace(edit, positions=at)], reads)
        for at in (Positions.ANSWER, Positions.RESPONSE)
    )
    assert one.responses == other.responses
    assert_close(dict(one.reads), dict(other.reads))
    assert_close(one.reads["answer_mean"], one.reads["response_mean"])
    with pytest.raises(EditError, match=r"no thinking to edit.*no marks of reasoning"):
        backend.generate(PROMPTS, Sampling(5), [replace(edit, positions=Span(Positions.THINKING, 2))])
    with pytest.raises(ReadError, match=r"no thinking to read.*no marks of reasoning"):
        backend.forward(TokenBatch.of(PROMPTS), (), [Read(ReadKind.THINKING_MEAN)])


def test_nothing_is_looked_up_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> Parts:
        raise AssertionError("nobody asked")

    backend = thinking_backend(REFERENCE)
    monkeypatch.setattr(Parts, "of", asked)
    edits = [Edit.add(1, direction(), positions=Positions.RESPONSE)]
    backend.generate(PROMPTS, Sampling(2), edits, Read.means())
    backend.forward(TEXT, edits, Read.means())
    assert parts_for(backend.tokenizer, edits, Read.means()) is None

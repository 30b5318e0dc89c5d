"""What edits do to finished turns: against plain passes over one token after the other, on every adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend import (
    Condition,
    Edit,
    EditError,
    Operation,
    Positions,
    Read,
    ReadKind,
    Sampling,
    Schedule,
    Span,
    TokenBatch,
)
from persona_lens.backend.continuous import continuous
from persona_lens.models import ChatFormat, Message
from persona_lens.steering.history import (
    DEFAULT_HISTORY,
    History,
    TurnPrompt,
    check_history,
    conversation_edits,
    turn_edits,
    turn_prompt,
)
from tests.backends.fixtures import (
    ADAPTERS,
    ALL_ACTIVATIONS,
    D_MODEL,
    REFERENCE,
    assert_close,
    direction,
    tiny_backend,
    tokenizer,
)
from tests.models.test_chat import ALL as TEMPLATES
from tests.models.test_chat import make_format
from tests.tiny import thinking_tokenizer

STEERED, CLEAN = History.STEERED, History.CLEAN
LONG: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What now?"},
    {"role": "assistant", "content": "Tea"},
    {"role": "user", "content": "And then"},
]
SHORT = LONG[1:4]
FIRST: list[Message] = [{"role": "user", "content": "Good day to you"}]
REPLY = tuple(tokenizer().encode("Sleep"))
CHAT = ChatFormat.from_tokenizer(tokenizer())


def parts(messages: Sequence[Message]) -> list[tuple[str, int]]:
    """What the tokens of a prompt are, piece by piece, counted by hand: the tokenizer has one for each byte."""
    found: list[tuple[str, int]] = []
    for message in messages:
        found += [("head", 2 + len(message["role"])), (message["role"], len(message["content"])), ("tail", 2)]
    return [*found, ("head", 2 + len("assistant"))]


def by_token(messages: Sequence[Message]) -> list[tuple[str, int, int]]:
    """For each token of the prompt what it is, which turn it came in, and its number in its piece."""
    found: list[tuple[str, int, int]] = []
    turn = 0
    for what, length in parts(messages):
        if what == "tail" and found[-1][0] == "assistant":
            found += [("end", turn, number) for number in range(length)]
            turn += 1
            continue
        found += [(what, turn, number) for number in range(length)]
    return found


KINDS = [kind for kind in Positions if kind is not Positions.THINKING]  # of a model that never thinks


def wanted(messages: Sequence[Message], positions: Any, history: History) -> list[bool]:
    """Which tokens of the prompt and of the reply are edited, told from what each of them is."""
    tokens = [*by_token(messages), *(("assistant", sum(m["role"] == "assistant" for m in messages), 0) for _ in REPLY)]
    now = tokens[-1][1]
    says = [what == "assistant" for what, _, _ in tokens]
    begins = [not says[at] and at + 1 < len(tokens) and says[at + 1] for at in range(len(tokens))]
    chosen = {
        Positions.ALL: [True] * len(tokens),
        Positions.PROMPT: [not each for each in says],
        Positions.RESPONSE: says,
        Positions.ANSWER: says,
        Positions.GENERATING: [a or b for a, b in zip(says, begins, strict=True)],
    }[positions]
    # What ends a reply is read when the next message comes, but it belongs to the turn that it ends.
    this = [turn == now and what != "end" for what, turn, _ in tokens]
    return [each and (history is STEERED or mine) for each, mine in zip(chosen, this, strict=True)]


def plain(backend: Any, ids: Sequence[int], edit: Edit, factors: Sequence[float]) -> Tensor:
    """Logits after each token, in passes over the model itself, one for each run of tokens that are treated alike.

    Its keys and values are kept from one to the next.

    Args:
        backend: The reference.
        ids: The tokens.
        edit: What is written, wherever it is made.
        factors: For each token the factor with which the edit is made there; 0 leaves it alone.
    """
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    logits = []
    for factor, run in groupby(zip(ids, factors, strict=True), lambda each: each[1]):
        scaled = replace(edit, coefficient=edit.coefficient * factor, positions=Positions.ALL)
        with backend.editing([scaled] if factor else []), torch.no_grad():
            tokens = torch.tensor([[token for token, _ in run]])
            logits.append(backend.module(input_ids=tokens, past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(logits)


def logprobs(logits: Tensor, prompt: int) -> Tensor:
    """Of the reply's tokens."""
    rows = logits.log_softmax(dim=-1)[prompt - 1 : -1]
    return rows.gather(1, torch.tensor(REPLY).unsqueeze(1))[:, 0]


def test_a_prompt_says_what_of_it_is_over_and_what_the_assistant_said() -> None:
    found = turn_prompt(CHAT, LONG)
    said = [at for at, (what, _, _) in enumerate(by_token(LONG)) if what == "assistant"]
    now = next(at for at, (what, turn, _) in enumerate(by_token(LONG)) if turn == 2 and what != "end")
    assert found.ids == tuple(CHAT.encode_messages(LONG))
    assert [token for start, stop in found.said for token in range(start, stop)] == said
    assert found.past == now
    assert turn_prompt(CHAT, LONG, replies=False) == TurnPrompt(found.ids, found.past, found.said[-1:])
    assert turn_prompt(CHAT, FIRST) == TurnPrompt(tuple(CHAT.encode_messages(FIRST)), 0, ())


@pytest.mark.parametrize("name", TEMPLATES)
def test_replies_are_found_whatever_the_template(name: str) -> None:
    chat = make_format(TEMPLATES[name])
    thought: Message = {"role": "assistant", "content": "<think>zebra?</think>zebra kettle"}
    messages = [*LONG[:4], thought, LONG[5]]
    found = turn_prompt(chat, messages)
    texts = [chat.decode(found.ids[start:stop]).strip() for start, stop in found.said]
    assert texts[0] == "Hello."
    assert texts[1] in (thought["content"], "zebra kettle")
    new, old = chat.decode(found.ids[found.past :]), chat.decode(found.ids[: found.past])
    assert ("And then" in new, "And then" in old, new.count("kettle"), old.count("kettle")) == (True, False, 0, 1)
    assert found.said[-1][1] <= found.past < len(found.ids)
    letters: Message = {"role": "assistant", "content": "zWVKJXQZ wvkjxqz"}  # none that a probe could be made of
    found = turn_prompt(chat, [*LONG[:2], letters, *LONG[3:]])
    assert chat.decode(found.ids[slice(*found.said[0])]).strip() == letters["content"]


def test_a_reply_of_nothing_and_one_that_is_left_out_are_not_there() -> None:
    empty = [*LONG[:2], {"role": "assistant", "content": ""}, *LONG[3:]]
    assert len(turn_prompt(CHAT, empty).said) == 1
    last_only = "{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}"
    chat = ChatFormat(tokenizer(), last_only)
    assert turn_prompt(chat, LONG).said == ()


@pytest.mark.parametrize("history", History)
@pytest.mark.parametrize("positions", KINDS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_each_token_is_edited_as_in_its_turn(adapter: str, positions: Positions, history: History) -> None:
    backend, turn = tiny_backend(adapter), turn_prompt(CHAT, LONG)
    edit = Edit.add(1, direction(3), 1.5, positions)
    where = wanted(LONG, positions, history)
    edits = turn_edits(edit, [turn], history, [REPLY])
    got = backend.forward(TokenBatch.of([turn.ids], [REPLY]), edits, logprobs=True).logprobs
    assert got is not None
    want = plain(tiny_backend(REFERENCE), (*turn.ids, *REPLY), edit, [float(each) for each in where])
    assert_close(got[0], logprobs(want, len(turn.ids)), rtol=1e-3)


@pytest.mark.parametrize("history", History)
@pytest.mark.parametrize("positions", KINDS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_generation_is_edited_as_the_text_that_it_makes(adapter: str, positions: Positions, history: History) -> None:
    """Over rows of unlike lengths and numbers of turns, each with a coefficient of its own, and row by row."""
    backend = tiny_backend(adapter)
    batch = [turn_prompt(CHAT, messages) for messages in (LONG, FIRST, SHORT)]
    prompts = [turn.ids for turn in batch]
    edits = [
        Edit(1, direction(3), coefficient=torch.tensor([1.5, -1.0, 0.5]), positions=positions),
        Edit.cap(1, direction(4), 0.1, positions),
    ]
    sampling = Sampling(4)
    made = backend.generate(prompts, sampling, turn_edits(edits, batch, history), [ALL_ACTIVATIONS])
    text = TokenBatch.of(prompts, made.responses)
    whole = backend.forward(text, turn_edits(edits, batch, history, made.responses), [ALL_ACTIVATIONS])
    assert_close(made.reads, whole.reads, rtol=1e-3)
    for row, turn in enumerate(batch):
        own = [replace(edits[0], coefficient=float(edits[0].coefficient[row])), edits[1]]  # type: ignore[index]
        alone = backend.generate([turn.ids], sampling, turn_edits(own, [turn], history), [ALL_ACTIVATIONS])
        assert alone.responses[0] == made.responses[row]
        assert_close(
            alone.reads["activations"][0],
            made.reads["activations"][row, :, -alone.reads["activations"].shape[2] :],
            rtol=1e-3,
        )


def argument(operation: Operation) -> dict[str, Any]:
    """What an edit must give for an operation."""
    return {operation.argument: 0.5} if operation.argument else {}


EVERY: dict[str, Callable[[Tensor], Edit]] = {
    "relative": lambda v: Edit.add(1, v, 0.5, relative=True),
    "conditional": lambda v: Edit(1, v, condition=Condition(0, direction(8), 0.0)),
    **{str(each): partial(Edit, 1, operation=each, **argument(each)) for each in Operation},
}


@pytest.mark.parametrize("history", History)
@pytest.mark.parametrize("name", EVERY)
def test_every_operation_keeps_to_its_turn(name: str, history: History) -> None:
    backend, turn = tiny_backend(REFERENCE), turn_prompt(CHAT, LONG)
    edit = replace(EVERY[name](direction(5)), positions=Positions.GENERATING)
    where = [float(each) for each in wanted(LONG, Positions.GENERATING, history)]
    edits = turn_edits(edit, [turn], history, [REPLY])
    got = backend.forward(TokenBatch.of([turn.ids], [REPLY]), edits, logprobs=True).logprobs
    assert got is not None
    assert_close(got[0], logprobs(plain(backend, (*turn.ids, *REPLY), edit, where), len(turn.ids)), rtol=1e-3)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_with_a_clean_history_what_acts_on_the_reply_is_the_plain_call(adapter: str) -> None:
    backend, turn = tiny_backend(adapter), turn_prompt(CHAT, LONG)
    for positions in (Positions.GENERATING, Positions.RESPONSE, Span(Positions.RESPONSE, 2, 4)):
        edit = Edit(1, direction(3), positions=positions)
        assert turn_edits(edit, [turn], CLEAN) == [edit]
        assert conversation_edits(edit, CHAT, LONG, CLEAN) == [edit]
    edits = conversation_edits([Edit.add(1, direction(3), 2.0)], CHAT, LONG, CLEAN)
    read = Read(ReadKind.ACTIVATIONS)
    plain_read, clean = (
        backend.generate([turn.ids], Sampling(1), given, [read]).reads["activations"][0] for given in ((), edits)
    )
    assert_close(clean[:, : turn.past], plain_read[:, : turn.past])
    assert float((clean[1, turn.past :] - plain_read[1, turn.past :]).norm(dim=-1).min()) > 1


def numbered(messages: Sequence[Message], factor: Callable[[int], float], before: int) -> list[float]:
    """For each token of the prompt and the reply a factor by its number in its reply; 0 outside of replies."""
    tokens = [*by_token(messages), *(("assistant", -1, number) for number in range(len(REPLY)))]
    factors = [factor(number + before) if what == "assistant" else 0.0 for what, _, number in tokens]
    for at, (what, _, number) in enumerate(tokens):
        if before and what == "assistant" and number == 0:
            factors[at - 1] = factor(0)
    return factors


FADING = Schedule(((0, 1.0), (3, -0.5)))


@pytest.mark.parametrize(
    ("positions", "schedule", "factor"),
    [
        (Positions.RESPONSE, FADING, lambda n: 1 - 0.5 * min(n, 3)),
        (Positions.GENERATING, FADING, lambda n: 1 - 0.5 * min(n, 3)),
        (Span(Positions.RESPONSE, 1, 4), None, lambda n: float(1 <= n < 4)),
        (Span(Positions.GENERATING, 2), FADING, lambda n: 1 - 0.5 * min(n, 3) if n >= 2 else 0.0),
        (Span(Positions.GENERATING, 0, 1), None, lambda n: float(n == 0)),
    ],
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_spans_and_schedules_count_in_each_reply(
    adapter: str, positions: Any, schedule: Schedule | None, factor: Callable[[int], float]
) -> None:
    backend, turn = tiny_backend(adapter), turn_prompt(CHAT, LONG)
    edit = Edit(1, direction(3), positions=positions, schedule=schedule)
    before = int("generating" in str(positions))
    factors = numbered(LONG, factor, before)
    edits = turn_edits(edit, [turn], STEERED, [REPLY])
    got = backend.forward(TokenBatch.of([turn.ids], [REPLY]), edits, logprobs=True).logprobs
    assert got is not None
    want = plain(tiny_backend(REFERENCE), (*turn.ids, *REPLY), replace(edit, schedule=None), factors)
    assert_close(got[0], logprobs(want, len(turn.ids)), rtol=1e-3)


def places(edit: Edit) -> list[int]:
    """Where the mask of an edit of one row is true."""
    assert isinstance(edit.positions, Tensor)
    found: list[int] = edit.positions[0].nonzero().flatten().tolist()
    return found


def test_thinking_in_earlier_replies_is_told_from_their_answers() -> None:
    """Where a template leaves it there; it is counted in each reply from its own first token."""
    chat = ChatFormat.from_tokenizer(thinking_tokenizer())
    said = ("<think>abc</think>\nyes", "no", "<think>de</think>ok")
    messages: list[Message] = []
    for text in said:
        messages += [{"role": "user", "content": "so"}, {"role": "assistant", "content": text}]
    turn = turn_prompt(chat, [*messages, {"role": "user", "content": "so"}])
    starts = [start for start, _ in turn.said]
    thinking = [[1, 2, 3], [], [1, 2]]
    answers = [[5, 6, 7, 8], [0, 1], [4, 5]]
    for kind, tokens in ((Positions.THINKING, thinking), (Positions.ANSWER, answers)):
        for positions, some in ((kind, slice(None)), (Span(kind, 1, 3), slice(1, 3))):
            edit = Edit.add(1, direction(), 1.0, positions)
            mask, own = turn_edits(edit, [turn], STEERED)
            assert own == edit
            assert places(mask) == [s + at for s, mine in zip(starts, tokens, strict=True) for at in mine[some]]
            assert turn_edits(edit, [turn], CLEAN) == [edit]


def test_spans_of_prompts_count_in_each_turn() -> None:
    turn = turn_prompt(CHAT, LONG)
    (last,) = turn_edits(Edit(1, direction(), positions=Span(Positions.PROMPT, -3)), [turn], STEERED)
    ends = [start for start, _ in turn.said] + [len(turn.ids)]
    assert places(last) == [at for end in ends for at in range(end - 3, end)]
    (first,) = turn_edits(Edit(1, direction(), positions=Span(Positions.PROMPT, 0, 4)), [turn], STEERED)
    assert places(first) == [0, 1, 2, 3]
    (clean,) = turn_edits(Edit(1, direction(), positions=Span(Positions.PROMPT, -3)), [turn], CLEAN)
    assert places(clean) == list(range(len(turn.ids) - 3, len(turn.ids)))


def test_a_mask_loses_finished_turns_with_a_clean_history_alone() -> None:
    turn = turn_prompt(CHAT, LONG)
    edit = Edit(1, direction(), positions=torch.ones(1, len(turn.ids), dtype=torch.bool))
    assert turn_edits(edit, [turn], STEERED) == [edit]
    (clean,) = turn_edits(edit, [turn], CLEAN)
    assert places(clean) == list(range(turn.past, len(turn.ids)))


def test_edits_of_a_first_turn_and_their_order_stay() -> None:
    edits = [Edit.add(1, direction(n), positions=positions) for n, positions in enumerate(KINDS)]
    for history in History:
        assert turn_edits(edits, [turn_prompt(CHAT, FIRST)], history) == edits
        found = turn_edits(edits, [turn_prompt(CHAT, LONG)], history)
        order = [next(n for n in range(len(KINDS)) if bool((edit.direction == direction(n)).all())) for edit in found]
        assert order == sorted(order)
        assert set(order) == set(range(len(KINDS)))


def test_continuous_batching_keeps_the_turns_apart() -> None:
    backend, turn = tiny_backend(REFERENCE), turn_prompt(CHAT, LONG)
    for history in History:
        edits = turn_edits(
            [Edit.add(1, direction(3), 2.0, Positions.GENERATING), Edit.add(0, direction(4))], [turn], history
        )
        one, other = (
            each.generate([turn.ids], Sampling(5), edits, Read.means()) for each in (backend, continuous(backend))
        )
        assert one.responses == other.responses
        assert_close(one.reads, other.reads, rtol=1e-3)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Edit(1, torch.ones(D_MODEL), schedule=FADING), "counts tokens from the beginning of the conversation"),
        (Edit(1, torch.ones(D_MODEL), positions=Span(Positions.ALL, 2)), r"all\[2:\] counts tokens"),
        (
            Edit(1, torch.ones(D_MODEL), positions=Span(Positions.PROMPT, 0, 4)),
            r"prompt\[0:4\] holds tokens of finished",
        ),
    ],
)
def test_what_counts_from_the_beginning_is_refused_with_a_clean_history(edit: Edit, says: str) -> None:
    with pytest.raises(EditError, match=says):
        turn_edits(edit, [turn_prompt(CHAT, LONG)], CLEAN)
    assert turn_edits(edit, [turn_prompt(CHAT, FIRST)], CLEAN) == [edit]
    if "conversation" in says:
        with pytest.raises(EditError, match=says):
            check_history(edit, CLEAN)
    check_history(edit, STEERED)


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("docs/steering.md", f"Without an option the history is `{DEFAULT_HISTORY}`."),
        ("docs/serving.md", f"not for `/v1/completions` | `{DEFAULT_HISTORY}` |"),
        ("CHANGELOG.md", f"Without an option the history is {DEFAULT_HISTORY},"),
    ],
)
def test_the_usual_history_is_the_one_that_is_said(page: str, says: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    assert says in " ".join(text.split())


def test_a_schedule_of_too_many_factors_and_a_history_that_is_none_are_refused() -> None:
    long: list[Message] = [FIRST[0], {"role": "assistant", "content": "a" * 300}, FIRST[0]]
    edit = Edit(1, direction(), positions=Positions.RESPONSE, schedule=Schedule(((0, 1.0), (300, 0.0))))
    with pytest.raises(EditError, match=r"300 different factors.*clean history"):
        turn_edits(edit, [turn_prompt(CHAT, long)], STEERED)
    with pytest.raises(EditError, match="a history is steered or clean; got 'washed'"):
        History("washed")

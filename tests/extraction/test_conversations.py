"""Conversations held turn by turn: what each turn is asked, read and edited, and that they go on where they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.backend import Backend, Edit, Generation, Read, ReadKind, Sampling, TokenBatch
from persona_lens.backend.batches import ContextError
from persona_lens.core.progress import no_progress
from persona_lens.data.scripted import Scripted
from persona_lens.data.tables import DataError
from persona_lens.extraction.conversations import Conversation, ConversationError, Conversations, Turn
from persona_lens.extraction.experiment import Variant
from persona_lens.models import ChatFormat
from persona_lens.runs import RunError, RunFolder
from persona_lens.runs.rollouts import Request, row_seed
from persona_lens.runs.settings import RolloutSettings
from tests.backends.fixtures import Delegating, tiny_backend
from tests.tiny import tiny_tokenizer

ANN = Scripted("ann", "tea", ("Hello", "What is tea?", "Which cup?"))
BOB = Scripted("bob", "rain", ("Hi", "Will it rain?", "And then?"))
VARIANTS = (Variant({"way": "plain"}), Variant({"way": "told"}, system="Be kind."))
SETTINGS = RolloutSettings(4, batch_size=3)
LAYER = 1


@pytest.fixture(scope="module")
def backend() -> Backend:
    return tiny_backend("transformers")


def chat() -> ChatFormat:
    return ChatFormat.from_tokenizer(tiny_tokenizer())


def conversations(backend: Backend, **changed: Any) -> Conversations:
    reads = [Read(ReadKind.RESPONSE_MEAN, (LAYER,)), Read(ReadKind.PROMPT_LAST)]
    given: dict[str, Any] = {"users": (ANN, BOB), "variants": VARIANTS, "turns": 3, "reads": reads, "seed": 5}
    return Conversations(backend, chat(), settings=SETTINGS, **{**given, **changed})


def held(plan: Conversations, folder: Path | None = None) -> list[Turn]:
    if folder is None:
        return list(plan.hold(None, no_progress))
    with RunFolder(folder, {"kind": "conversations"}) as run:
        return list(plan.hold(run, no_progress))


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def test_each_turn_is_asked_behind_what_was_said_and_read(backend: Backend) -> None:
    turns = held(conversations(backend))
    assert [turn.number for turn in turns] == [1, 2, 3]
    for turn in turns:
        reads = turn.reads()
        for place, (each, rollout) in enumerate(zip(turn.conversations, turn.rollouts, strict=True)):
            user, told = (ANN, BOB)[each.number], each.variant.system is not None
            messages = [{"role": "system", "content": "Be kind."}] if told else []
            for asked, answered in each.exchanges[:-1]:
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            messages.append({"role": "user", "content": user.turns[turn.number - 1]})
            prompt = chat().encode_messages(messages)
            assert rollout.prompt_tokens == len(prompt)
            seed = row_seed(5, "conversation", user.name, turn.number)
            assert rollout.request.seed == seed
            alone = backend.generate([prompt], Sampling(4, 1.0, 1.0, (seed,)))
            assert rollout.response_ids == alone.responses[0]
            assert each.exchanges[-1] == (user.turns[turn.number - 1], rollout.response)
            assert each.messages == [*messages, {"role": "assistant", "content": rollout.response}]
            text = TokenBatch.of([prompt], [rollout.response_ids])
            mean = backend.forward(text, (), [Read(ReadKind.RESPONSE_MEAN, (LAYER,))]).reads["response_mean"]
            torch.testing.assert_close(reads["response_mean"][place], mean[0], rtol=1e-4, atol=1e-5, equal_nan=True)
        assert reads["prompt_last"].shape == (4, 3, 32)
    assert turns[2].rollouts[1].request.labels == {
        "way": "told",
        "question_number": 0,
        "sample": 0,
        "user": "ann",
        "domain": "tea",
        "turn": 3,
    }


def test_edits_are_made_for_each_batch_by_what_it_asks(backend: Backend) -> None:
    seen: list[tuple[str, int, int]] = []
    direction = torch.full((32,), 3.0)

    def edits_for(requests: Sequence[Request]) -> list[Edit]:
        seen.extend((r.labels["way"], r.labels["turn"], len(r.examples)) for r in requests)
        return [Edit.add(LAYER, direction, torch.tensor([1.0 if r.system else 0.0 for r in requests]))]

    steered = held(conversations(backend, edits_for=edits_for))
    plain = held(conversations(backend))
    assert {(turn, examples) for _, turn, examples in seen} == {(1, 0), (2, 1), (3, 2)}
    for turn, other in zip(steered, plain, strict=True):
        assert [each.exchanges for each in turn.conversations[::2]] == [
            each.exchanges for each in other.conversations[::2]
        ]
        moved = (turn.reads()["response_mean"] - other.reads()["response_mean"])[:, 0].norm(dim=-1)
        assert (moved[::2] < 1e-5).all()  # batches of other lengths round otherwise
        assert (moved[1::2] > 1).all()


def test_users_may_say_what_comes_to_their_minds_which_is_asked_for_once(backend: Backend, tmp_path: Path) -> None:
    asked: list[int] = []

    def asks(there: Sequence[Conversation]) -> list[str]:
        asked.append(len(there[0].exchanges))
        return [f"{each.user.name} {len(each.exchanges)}" for each in there]

    plan = conversations(backend, asks=asks, turns=2)
    turns = held(plan, tmp_path / "run")
    assert [each.exchanges[1][0] for each in turns[1].conversations] == ["ann 1", "ann 1", "bob 1", "bob 1"]
    assert asked == [0, 1]
    again = held(plan, tmp_path / "run")
    assert asked == [0, 1]
    assert [turn.rollouts for turn in again] == [turn.rollouts for turn in turns]
    with pytest.raises(ConversationError, match="1 messages were given for 4 conversations"):
        held(conversations(backend, asks=lambda there: ["one"]))


class Dying(Delegating):
    """Dies at a call."""

    def __init__(self, inner: Backend, calls: int) -> None:
        super().__init__(inner)
        self.calls = calls

    def generate(self, *given: Any, **named: Any) -> Generation:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().generate(*given, **named)


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5])
def test_what_was_killed_goes_on_and_gives_the_same_bytes(backend: Backend, tmp_path: Path, calls: int) -> None:
    whole = held(conversations(backend), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        held(conversations(Dying(backend, calls)), tmp_path / "killed")
    again = held(conversations(backend), tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert "turn-03-rollouts.jsonl" in files(tmp_path / "whole")
    for one, other in zip(whole, again, strict=True):
        assert one.rollouts == other.rollouts
        assert all(torch.equal(one.reads()[name], other.reads()[name]) for name in one.reads())
    held(conversations(Dying(backend, 0)), tmp_path / "killed")  # nothing is left to do


def test_a_reply_that_was_changed_is_refused(backend: Backend, tmp_path: Path) -> None:
    held(conversations(backend), tmp_path)
    file = tmp_path / "turn-01-rollouts.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0].replace('"user": "ann"', '"user": "eve"'), *lines[1:]]))
    with pytest.raises(RunError, match=r"line 1 of .*turn-01-rollouts\.jsonl is damaged"):
        held(conversations(backend), tmp_path)


def test_what_it_would_ask_is_known_before(backend: Backend) -> None:
    (work,) = conversations(backend).work()
    assert (work.rows, work.label) == (12, "rollouts")
    assert work.tokens > sum(
        rollout.prompt_tokens for turn in held(conversations(backend)) for rollout in turn.rollouts
    )


def test_what_cannot_be_held_is_refused_before_it_begins(backend: Backend) -> None:
    with pytest.raises(ConversationError, match="user ann has 3 messages, and 4 turns are asked for"):
        conversations(backend, turns=4)
    with pytest.raises(ConversationError, match="at least 1 turn"):
        conversations(backend, turns=0)
    with pytest.raises(DataError, match="two users are called 'ann'"):
        conversations(backend, users=(ANN, ANN))
    conversations(backend).check()
    with pytest.raises(ContextError, match="ask for fewer new tokens"):
        conversations(backend, users=(Scripted("eve", "tea", ("tea " * 300,) * 3),)).check()

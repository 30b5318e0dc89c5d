"""A conversation that is steered and read, reply by reply, on a tiny random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from persona_lens import PersonaLensError
from persona_lens.backend import Backend, StopGeneration
from persona_lens.monitoring import Alarm, Alert, ConversationMonitor, MonitoringError, Panel
from persona_lens.serve.said import Made, SessionError
from persona_lens.serve.session import Session
from persona_lens.serve.talk import Talk
from persona_lens.steering.history import DEFAULT_HISTORY
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import backend_of
from tests.tiny import D_MODEL, N_LAYERS, tiny_model


@pytest.fixture(scope="module")
def backend() -> Backend:
    made = tiny_model()
    made.config.max_position_embeddings = 2048
    return backend_of("transformers", made)


def panel(backend: Backend) -> Panel:
    rows = torch.randn(2, N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(0))
    each = [
        PersonaVectors(name, backend.info, {"response_mean": row})
        for name, row in zip(("evil", "kind"), rows, strict=True)
    ]
    return Panel.of(each, [0, 2])


def test_replies_are_those_of_a_monitor_and_are_kept_with_what_was_read(backend: Backend) -> None:
    own, heard = panel(backend), list[Alert]()
    talk = Talk(backend, own, system="Be brief.", alarms=[Alarm("evil", -1e6, heard.append, 0)])
    monitor = ConversationMonitor(backend, own, system="Be brief.")
    for seed, text in enumerate(("Hello", "And now?")):
        how: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.8, "seed": seed}
        turn, expected = talk.say(text, edits="kind@2:affine(3)", **how), monitor.reply(
            text, edits="kind@2:affine(3)", vectors=[gauge.vectors for gauge in own.gauges[1:3]], **how
        )  # fmt: skip
        assert (turn.text, turn.readings, turn.number) == (expected.text, expected.readings, seed)
        said = talk.session.path[-1]
        assert said.content == turn.text
        assert said.made == Made("kind@2:affine(3)", 0.8, 1.0, 6, seed, DEFAULT_HISTORY.value if seed else None)
        assert said.readings is not None
        assert said.readings.means == pytest.approx([each.mean for each in turn.readings], abs=1e-4)
        assert said.readings.prompt_last == pytest.approx([each.prompt_last for each in turn.readings], abs=1e-4)
        assert [token.id for token in said.readings.tokens] == list(talk.ids)
        assert torch.tensor([token.values for token in said.readings.tokens]).numpy() == pytest.approx(
            turn.token_values.numpy() if turn.token_values is not None else None, abs=1e-4
        )
        (sounded,) = said.readings.alarms
        assert (sounded.alarm, sounded.gauge, sounded.token) == ("evil@0>-1e+06", 0, 0)
    assert len(heard) == 2
    assert talk.session.messages == [dict(message) for message in monitor.messages]
    assert Session.from_jsonl(talk.session.to_jsonl()).to_jsonl() == talk.session.to_jsonl()


def test_a_reply_is_made_again_and_branches_do_not_know_each_other(backend: Backend) -> None:
    talk = Talk(backend, panel(backend))
    with pytest.raises(SessionError, match="nothing has been said"):
        talk.again()
    first = talk.say("Hello", max_new_tokens=5)
    talk.say("And now?", max_new_tokens=5)
    told = talk.again(max_new_tokens=5, edits="evil@0:+40")
    assert talk.session.path[-1].made == Made("evil@0:+40", max_tokens=5, seed=0, history=DEFAULT_HISTORY.value)
    assert [each.content for each in talk.session.children(talk.session.path[-2].id)][1] == told.text
    asked = talk.back()
    assert asked is not None
    assert talk.session.messages[-1] == {"role": "assistant", "content": first.text}
    talk.back()
    assert talk.say("Hello", max_new_tokens=5).text == first.text  # as if nothing had been said before
    assert len(talk.session.children(None)) == 1
    here = talk.session.current
    with pytest.raises(PersonaLensError):
        talk.again(edits="sad@1:+1")
    with pytest.raises(MonitoringError, match="too long"):
        talk.say("x", max_new_tokens=5000)
    assert talk.session.current == here


def test_a_reply_may_find_earlier_turns_clean_and_says_so(backend: Backend) -> None:
    before = {}
    for history in ("steered", "clean"):
        talk = Talk(backend, panel(backend))
        talk.say("Hello", edits="evil@0:+4 on generating", max_new_tokens=6, history=history)
        assert talk.session.path[-1].made == Made("evil@0:+4 on generating", max_tokens=6, seed=0)
        turn = talk.say("And now?", edits="evil@0:+4 on generating", max_new_tokens=6, history=history)
        before[history] = [each.prompt_last for each in turn.readings if each.layer == 2]
        made = Session.from_jsonl(talk.session.to_jsonl()).path[-1].made
        assert made is not None
        assert str(made) == f"evil@0:+4 on generating, {history} history; greedy"
        assert talk.say("Then?", max_new_tokens=2, history=history).number == 2
        assert talk.session.path[-1].made == Made(max_tokens=2, seed=0)
        assert f"{history} history" in talk.session.html()
    assert before["steered"] != pytest.approx(before["clean"], abs=1e-3)


def test_a_session_is_gone_on_with(backend: Backend) -> None:
    own = panel(backend)
    before = Session.from_jsonl('[{"role": "user", "content": "Hello"}]')
    talk = Talk(backend, own, session=before)
    assert (talk.waits, len(before)) == (True, 1)
    turn = talk.again(max_new_tokens=5)
    assert (turn.text, turn.number) == (Talk(backend, own).say("Hello", max_new_tokens=5).text, 0)
    assert (talk.waits, len(before)) == (False, 2)
    with pytest.raises(SessionError, match="has begun"):
        Talk(backend, own, session=before, system="Be brief.")


def test_an_alarm_ends_a_reply_and_is_kept(backend: Backend) -> None:
    def stop(_: Alert) -> None:
        raise StopGeneration

    talk = Talk(backend, panel(backend), alarms=[Alarm("evil", -1e6, stop, 0)])
    turn = talk.say("Hello", max_new_tokens=20)
    assert turn.stopped
    read = talk.session.path[-1].readings
    assert read is not None
    assert (len(read.tokens), len(read.alarms)) == (1, 1)

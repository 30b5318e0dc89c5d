"""A conversation monitored turn by turn: by hand-computed values, with alarms, and with flat memory."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from persona_lens.backend import (
    Backend,
    Edit,
    ForwardResult,
    Positions,
    Read,
    Sampling,
    Schedule,
    StopGeneration,
    TokenBatch,
)
from persona_lens.monitoring import Alarm, Alert, ConversationMonitor, Gauge, MonitoringError, Panel, TokenReading
from persona_lens.steering.history import History, HistoryError, turn_edits, turn_prompt
from persona_lens.vectors import PersonaVectors, Tuned, VectorsError
from tests.backends.fixtures import Delegating, backend_of, tiny_backend
from tests.tiny import D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer, with_template

KINDS = ["prompt_last", "token", "running_mean", "turn_mean"]


@pytest.fixture(scope="module")
def backend() -> Backend:
    """One that takes long conversations."""
    return long_backend("transformers")


def long_backend(adapter: str) -> Backend:
    model: Any = tiny_model()
    model.config.max_position_embeddings = 16_384
    return backend_of(adapter, model)


def vectors(backend: Backend, trait: str = "evil", seed: int = 0) -> PersonaVectors:
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return PersonaVectors(trait, backend.info, {"response_mean": rows})


def panel(backend: Backend) -> Panel:
    """Two traits at one layer, and one of them at another layer too."""
    evil, kind = vectors(backend), vectors(backend, "kind", 1)
    return Panel((Gauge(kind, 2), Gauge(evil, 0), Gauge(evil, 2)))


def by_hand(backend: Backend, monitor: ConversationMonitor, message: int, edits: Any = ()) -> Any:
    """Float32 [prompt and response tokens, gauges] of one turn, each trait projected by itself."""
    chat: Any = monitor._chat
    prompt = chat.encode_messages(monitor.messages[:message])
    answer = chat.encode_answer(monitor.messages[message]["content"])
    text = TokenBatch.of([prompt], [answer])
    columns = []
    for gauge in monitor.panel.gauges:
        read = Read.projections(gauge.direction[None], (gauge.layer,))
        columns.append(backend.forward(text, edits, [read]).reads["projections"][0, 0, :, 0])
    return torch.stack(columns, dim=1)[len(prompt) - 1 :]


def check_turn(backend: Backend, monitor: ConversationMonitor, number: int, edits: Any = ()) -> None:
    turn = monitor.turns[number]
    values = by_hand(backend, monitor, turn.message, edits)
    assert turn.token_values is not None
    torch.testing.assert_close(turn.token_values, values[1:], rtol=1e-4, atol=1e-4)
    for index, (reading, gauge) in enumerate(zip(turn.readings, monitor.panel.gauges, strict=True)):
        own = values[1:, index]
        assert (reading.turn, reading.trait, reading.layer, reading.tokens) == (
            number,
            gauge.trait,
            gauge.layer,
            len(own),
        )
        assert reading.prompt_last == pytest.approx(float(values[0, index]), abs=1e-4)
        assert reading.mean == pytest.approx(float(own.mean()), abs=1e-4)
        assert reading.highest == pytest.approx(float(own.max()), abs=1e-4)


@pytest.mark.parametrize("adapter", ["transformers", "transformer_lens", "nnsight"])
def test_a_reply_is_read_while_it_is_generated(adapter: str) -> None:
    backend = long_backend(adapter)
    told: list[TokenReading] = []
    monitor = ConversationMonitor(backend, panel(backend), system="be brief", on_token=told.append)
    edits = [Edit.add(1, torch.ones(D_MODEL), 0.2)]
    for number, user in enumerate(("hello", "and now?")):
        turn = monitor.reply(user, max_new_tokens=6, edits=edits, history="steered")
        assert (turn.number, turn.message, turn.stopped) == (number, 2 + 2 * number, False)
        assert monitor.messages[-2:] == ({"role": "user", "content": user}, {"role": "assistant", "content": turn.text})
        own = [each for each in told if each.turn == number]
        assert [each.index for each in own] == list(range(turn.readings[0].tokens))
        assert turn.token_values is not None
        assert torch.equal(torch.stack([each.values for each in own]), turn.token_values)
        torch.testing.assert_close(own[-1].means, turn.token_values.mean(dim=0))
        # The tokens themselves, since a random model's bytes are not always text.
        chat: Any = monitor._chat
        prompt = chat.encode_messages(monitor.messages[: turn.message])
        text = TokenBatch.of([prompt], [[each.id for each in own]])
        read = backend.forward(text, edits, [monitor.panel.read]).reads["projections"][0]
        values = monitor.panel.values(read[:, len(prompt) - 1 :])
        torch.testing.assert_close(turn.token_values, values[1:], rtol=1e-4, atol=1e-4)
        assert [r.prompt_last for r in turn.readings] == pytest.approx(values[0].tolist(), abs=1e-4)
    assert [r.turn for r in monitor.trajectory()] == [0, 0, 0, 1, 1, 1]


CONVERSATION = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "who are you?"},
    {"role": "assistant", "content": "a friend of yours"},
    {"role": "user", "content": "really? 你好"},
    {"role": "assistant", "content": "yes 🙂"},
    {"role": "user", "content": "good"},
]


def test_messages_from_elsewhere_are_read_in_one_pass_each_answer_after_its_prompt(backend: Backend) -> None:
    calls: list[int] = []

    class Counting(Delegating):
        def forward(self, tokens: TokenBatch, *rest: Any, **options: Any) -> ForwardResult:
            calls.append(len(tokens))
            return super().forward(tokens, *rest, **options)

    monitor = ConversationMonitor(Counting(backend), panel(backend))
    assert [turn.message for turn in monitor.observe(CONVERSATION)] == [2, 4]
    assert calls == [1]  # both answers in one text
    check_turn(backend, monitor, 0)
    check_turn(backend, monitor, 1)
    assert monitor.observe(CONVERSATION) == ()
    more = [*CONVERSATION, {"role": "assistant", "content": "bye"}]
    assert [turn.number for turn in monitor.observe(more)] == [2]
    assert calls == [1, 1]
    check_turn(backend, monitor, 2)


def test_turns_seen_one_by_one_equal_those_seen_together(backend: Backend) -> None:
    together = ConversationMonitor(backend, panel(backend))
    together.observe(CONVERSATION)
    one_by_one = ConversationMonitor(backend, panel(backend))
    for stop in range(1, len(CONVERSATION) + 1):
        one_by_one.observe(CONVERSATION[:stop])
    for a, b in zip(together.trajectory(), one_by_one.trajectory(), strict=True):
        assert (a.turn, a.trait, a.layer, a.tokens) == (b.turn, b.trait, b.layer, b.tokens)
        assert (a.mean, a.highest, a.prompt_last) == pytest.approx((b.mean, b.highest, b.prompt_last), abs=1e-4)


@pytest.mark.parametrize("positions", [Positions.ALL, Positions.GENERATING])
def test_earlier_turns_are_found_as_they_were_steered_or_clean(backend: Backend, positions: Positions) -> None:
    edits = [Edit.add(0, torch.ones(D_MODEL), 0.5, positions)]
    for history in History:
        monitor = ConversationMonitor(backend, panel(backend))
        monitor.observe(CONVERSATION, edits, history=history)
        chat = monitor._chat
        for number, message in enumerate((2, 4)):
            turn = turn_prompt(chat, CONVERSATION[:message])
            answer = chat.encode_answer(CONVERSATION[message]["content"])
            check_turn(backend, monitor, number, turn_edits(edits, [turn], history, [answer]))
        replied = monitor.reply("good?", max_new_tokens=3, edits=edits, history=history)
        asked = turn_prompt(chat, [*CONVERSATION, {"role": "user", "content": "good?"}])
        own = backend.generate([asked.ids], Sampling(3), turn_edits(edits, [asked], history))
        assert replied.text == chat.answer(own.responses[0])
    first, second = (
        ConversationMonitor(backend, panel(backend)).observe(CONVERSATION, edits, history=history)
        for history in ("steered", "clean")
    )
    assert first[0].readings[2].mean == pytest.approx(second[0].readings[2].mean, abs=1e-4)
    assert abs(first[1].readings[2].mean - second[1].readings[2].mean) > 1e-3


def test_a_history_that_an_edit_cannot_have_is_refused_and_nothing_is_said(backend: Backend) -> None:
    monitor = ConversationMonitor(backend, panel(backend))
    fading = Edit(1, torch.ones(D_MODEL), schedule=Schedule(((0, 1.0), (9, 0.0))))
    monitor.reply("hello", max_new_tokens=2, edits=fading, history="clean")
    with pytest.raises(HistoryError, match="from the beginning of the conversation"):
        monitor.reply("and now?", edits=fading, history="clean")
    with pytest.raises(HistoryError, match="a history is steered or clean; got 'new'"):
        monitor.reply("and now?", edits=fading, history="new")
    assert len(monitor.messages) == 2


def test_a_template_that_rewrites_earlier_turns_gets_a_text_for_each_answer(backend: Backend) -> None:
    tokenizer = tiny_tokenizer()
    # Counts the messages at the head, so that no prompt begins as another one does.
    template = "{{ messages | length }}:" + str(tokenizer.chat_template)
    from persona_lens.models import ChatFormat

    monitor = ConversationMonitor(
        backend, panel(backend), chat=ChatFormat.from_tokenizer(with_template(tokenizer, template))
    )
    monitor.observe(CONVERSATION)
    check_turn(backend, monitor, 0)
    check_turn(backend, monitor, 1)


def test_a_conversation_goes_on_here_after_it_was_held_elsewhere(backend: Backend) -> None:
    monitor = ConversationMonitor(backend, panel(backend))
    monitor.observe(CONVERSATION[:5])
    turn = monitor.reply("more", max_new_tokens=3)
    assert (turn.number, turn.message) == (2, 6)
    assert monitor.observe(monitor.messages) == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("above", [True, False])
def test_an_alarm_sounds_when_its_value_goes_beyond_and_again_after_it_was_back(
    backend: Backend, kind: str, above: bool
) -> None:
    quiet = ConversationMonitor(backend, panel(backend))
    values = quiet.observe(CONVERSATION)[0].token_values
    assert values is not None
    series = {
        "prompt_last": torch.tensor([quiet.turns[0].readings[1].prompt_last]),
        "token": values[:, 1],
        "running_mean": values[:, 1].cumsum(0) / torch.arange(1, len(values) + 1),
        "turn_mean": values[:, 1].mean(0, keepdim=True),
    }[kind]
    threshold = float(series.median()) if len(series) > 1 else float(series[0]) + (-0.1 if above else 0.1)
    beyond = (series > threshold) if above else (series < threshold)
    expected = [i for i, now in enumerate(beyond.tolist()) if now and not (i and bool(beyond[i - 1]))]
    alerts: list[Alert] = []
    alarm = Alarm("evil", threshold, alerts.append, layer=0, kind=kind, above=above)
    ConversationMonitor(backend, panel(backend), alarms=[alarm]).observe(CONVERSATION[:3])
    assert expected
    assert [alert.token for alert in alerts] == (expected if kind in ("token", "running_mean") else [None])
    for index, alert in zip(expected, alerts, strict=True):
        assert alert.value == pytest.approx(float(series[index]), abs=1e-4)
        assert (alert.layer, alert.turn, alert.alarm) == (0, 0, alarm)
    never = replace(alarm, threshold=1e6 if above else -1e6)
    alerts.clear()
    ConversationMonitor(backend, panel(backend), alarms=[never]).observe(CONVERSATION[:3])
    assert alerts == []


@pytest.mark.parametrize(("kind", "tokens"), [("prompt_last", 0), ("token", 1), ("running_mean", 1), ("turn_mean", 8)])
def test_an_alarm_may_stop_the_reply_and_the_others_still_sound(backend: Backend, kind: str, tokens: int) -> None:
    heard: list[Alert] = []

    def stop(alert: Alert) -> None:
        raise StopGeneration

    alarms = [
        Alarm("evil", -1e6, stop, layer=0, kind=kind),
        Alarm("kind", -1e6, heard.append, kind=kind),
    ]
    monitor = ConversationMonitor(backend, panel(backend), alarms=alarms)
    turn = monitor.reply("hello", max_new_tokens=8)
    assert turn.readings[0].tokens == tokens
    assert turn.stopped == (kind != "turn_mean")
    assert len(heard) == 1
    assert len(monitor.messages) == 2
    if not tokens:
        assert turn.text == ""
        assert math.isnan(turn.readings[0].mean)


def test_an_error_in_an_alarm_leaves_the_conversation_as_it_was(backend: Backend) -> None:
    def fail(alert: Alert) -> None:
        raise LookupError("of the user's own")

    monitor = ConversationMonitor(backend, panel(backend), alarms=[Alarm("kind", -1e6, fail)])
    with pytest.raises(LookupError, match="of the user's own"):
        monitor.reply("hello", max_new_tokens=3)
    assert (monitor.messages, monitor.turns) == ((), ())


def test_gauges_stand_where_their_vectors_were_tuned(backend: Backend) -> None:
    tuned = vectors(backend).with_tuned(Tuned(1, 2.0), {})
    assert [str(gauge) for gauge in Panel.of(tuned).gauges] == ["evil@1"]
    both = Panel.of([tuned, vectors(backend, "kind")], (0, 2))
    assert [str(gauge) for gauge in both.gauges] == ["evil@0", "evil@2", "kind@0", "kind@2"]
    assert both.layers == (0, 2)


def bad_layer(backend: Backend) -> object:
    return Panel.of(vectors(backend), 9)


WRONG: dict[str, Callable[[Backend], object]] = {
    "layer 9 does not exist": bad_layer,
    "no layer was tuned for the vectors of 'evil'": lambda b: Panel.of(vectors(b)),
    "there is nothing to monitor": lambda b: Panel.of([]),
    "evil@1 is monitored twice": lambda b: Panel.of([vectors(b), vectors(b, seed=3)], 1),
    "are zero at every layer": lambda b: Gauge(vectors(b) * 0.0, 1),
    "rude is not monitored: there are kind@2, evil@0, evil@2": lambda b: monitored(b, Alarm("rude", 1.0, print)),
    "evil is read at several layers; name one": lambda b: monitored(b, Alarm("evil", 1.0, print)),
    "an alarm listens to prompt_last, token, running_mean, turn_mean; got 'loud'": lambda b: Alarm(
        "evil", 1.0, print, kind="loud"
    ),
    "the threshold of an alarm must be finite, got nan": lambda b: Alarm("evil", math.nan, print),
    "message 1 is not the one seen before": lambda b: seen(b, [CONVERSATION[0], CONVERSATION[3]]),
    "message 3 is not the one seen before": lambda b: seen(b, CONVERSATION[:3]),
    "the conversation begins with the assistant": lambda b: monitored(b).observe(CONVERSATION[2:3]),
    "the conversation has become too long: .* tokens and up to 99999 new ones, and the model takes 16384": lambda b: (
        monitored(b).reply("hello", max_new_tokens=99_999)
    ),
}


def monitored(backend: Backend, *alarms: Alarm) -> ConversationMonitor:
    return ConversationMonitor(backend, panel(backend), alarms=alarms)


def seen(backend: Backend, then: Any) -> object:
    monitor = monitored(backend)
    monitor.observe(CONVERSATION)
    return monitor.observe(then)


@pytest.mark.parametrize(("message", "make"), WRONG.items(), ids=WRONG)
def test_what_cannot_be_monitored(backend: Backend, message: str, make: Callable[[Backend], object]) -> None:
    with pytest.raises((MonitoringError, VectorsError), match=message):
        make(backend)


def test_vectors_of_another_model_are_refused_unless_allowed(backend: Backend) -> None:
    other = tiny_backend("transformers", "qwen2")
    with pytest.raises(VectorsError, match="belong to another model"):
        ConversationMonitor(backend, panel(other))
    ConversationMonitor(backend, panel(other), allow_other_model=True)


def floats_alive() -> int:
    """Bytes of all tensors that anything still holds."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.layout is torch.strided:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


# Fifty turns hold 8,000 tokens.
@pytest.mark.parametrize(
    ("keep_tokens", "turns"), [(True, 15), (False, 8), pytest.param(True, 50, marks=pytest.mark.exhaustive)]
)
def test_turns_of_thousands_of_tokens_keep_a_few_numbers(backend: Backend, keep_tokens: bool, turns: int) -> None:
    monitor = ConversationMonitor(backend, panel(backend), keep_tokens=keep_tokens)
    held: dict[int, int] = {}
    for number in range(turns):
        turn = monitor.reply(f"{number}: " + "what do you think of this? " * 5, max_new_tokens=6)
        assert turn.readings[0].tokens <= 6
        if number in (4, turns - 1):
            held[number] = floats_alive()
        if number == 4:
            tokens = sum(turn.readings[0].tokens for turn in monitor.turns)
    chat: Any = monitor._chat
    assert len(chat.encode_messages(monitor.messages)) > 160 * turns
    more = sum(turn.readings[0].tokens for turn in monitor.turns) - tokens
    gauges = len(monitor.panel.gauges)
    assert held[turns - 1] - held[4] == (4 * gauges * more if keep_tokens else 0)
    assert len(monitor.trajectory()) == turns * gauges

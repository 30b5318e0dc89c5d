"""What the server answers: OpenAI's protocol, each request steered and watched in its own way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from persona_lens.backend import Sampling, TokenBatch
from persona_lens.serve.server import Running
from persona_lens.serve.session import Session
from persona_lens.steering import Steering
from persona_lens.steering.history import DEFAULT_HISTORY, History, conversation_edits
from tests.backends.fixtures import ADAPTERS
from tests.serve.running import HELLO, LAYERS, TRAITS, Client, tokens_of, vectors_of, workbench


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Running(workbench()) as running:
        yield Client(running)


def wanted(
    client: Client, messages: Any = HELLO, edits: str = "", temperature: float = 0.0, seed: int = 0, new: int = 12
) -> list[int]:
    """What `Backend.generate` gives."""
    bench = client.running.server.workbench
    seeds = (seed,) if temperature else None
    written = Steering.parse(edits, bench.shelf.vectors).edits() if edits else ()
    hooked: Any = bench.backend
    found = hooked.hooked.generate([bench.encode(messages)], Sampling(new, temperature, 1.0, seeds), written)
    return list(found.responses[0])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_streamed_tokens_are_those_of_the_backend(adapter: str) -> None:
    with Running(workbench(adapter)) as running:
        client = Client(running)
        for edits in ("", "evil@1:+1.5", "kind@all:ablate, evil@2:-2 on response"):
            for temperature in (0.0, 1.0):
                lens = {"edits": edits}
                events = list(client.streamed(temperature=temperature, seed=5, persona_lens=lens))
                assert tokens_of(events) == wanted(client, edits=edits, temperature=temperature, seed=5)
                assert events[0]["persona_lens"]["edits"] == (
                    str(Steering.parse(edits, running.server.workbench.shelf.vectors)) if edits else ""
                )


def test_a_stream_tells_what_is_read_and_ends_as_openai_does(client: Client) -> None:
    events = list(client.streamed(temperature=1, seed=1, stream_options={"include_usage": True}))
    first, *middle, last, used = events
    names = [f"{trait}@{layer}" for trait in TRAITS for layer in LAYERS]
    assert [gauge["name"] for gauge in first["persona_lens"]["gauges"]] == names
    assert len(first["persona_lens"]["prompt_last"]) == len(names)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["persona_lens"]["seed"] == 1
    values = [token["values"] for event in middle for token in event["persona_lens"]["tokens"]]
    assert len(values) == used["usage"]["completion_tokens"]
    means = [sum(column) / len(values) for column in zip(*values, strict=True)]
    assert last["persona_lens"]["means"] == pytest.approx(means, abs=1e-4)
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    assert used["choices"] == []
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in (first, *middle, last))
    plain = client.http.post(
        "/v1/chat/completions", json={"messages": HELLO, "max_tokens": 12, "temperature": 1, "seed": 1}
    ).json()
    assert plain["choices"][0]["message"]["content"] == text
    assert [token["values"] for token in plain["choices"][0]["persona_lens"]["tokens"]] == values
    assert plain["usage"] == used["usage"]


def test_many_clients_with_many_edits_each_get_what_they_get_alone(client: Client) -> None:
    def ask(number: int) -> list[int]:
        edits = f"{TRAITS[number % 2]}@{number % 3}:{number / 8 - 2:+g}"
        how: dict[str, Any] = {"temperature": float(number % 3), "seed": number, "max_tokens": 5 + number}
        return tokens_of(list(client.streamed(persona_lens={"edits": edits}, **how)))

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    for number, found in enumerate(together):
        edits = f"{TRAITS[number % 2]}@{number % 3}:{number / 8 - 2:+g}"
        assert found == wanted(client, HELLO, edits, float(number % 3), number, 5 + number), number


def test_choices_are_samples_of_their_own_and_repeatable(client: Client) -> None:
    found = client.chat(n=4, seed=3, temperature=1.5).json()["choices"]
    assert [choice["index"] for choice in found] == [0, 1, 2, 3]
    assert len({choice["message"]["content"] for choice in found}) == 4
    again = client.chat(n=4, seed=3, temperature=1.5).json()["choices"]
    assert [choice["message"] for choice in again] == [choice["message"] for choice in found]
    drawn = client.chat(temperature=1.5).json()["choices"][0]
    same = client.chat(temperature=1.5, seed=drawn["persona_lens"]["seed"]).json()["choices"][0]
    assert same["message"] == drawn["message"]


def test_a_text_that_stops_a_reply_is_no_part_of_it(client: Client) -> None:
    whole = client.chat(max_tokens=40, temperature=1, seed=9).json()["choices"][0]
    text = whole["message"]["content"]
    stop = text[5:8]
    cut = client.chat(max_tokens=40, temperature=1, seed=9, stop=["never to be said", stop]).json()["choices"][0]
    assert cut["message"]["content"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"
    events = list(
        client.streamed(
            messages=[{"role": "user", "content": "Hello"}], max_tokens=40, temperature=1, seed=9, stop=stop
        )
    )
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in events) == text[: text.index(stop)]


def test_a_models_name_may_steer(client: Client) -> None:
    name = client.get("/v1/models").json()["data"][0]["id"]
    steered = client.chat(lens={"edits": "evil@1:+2"}, temperature=0).json()["choices"][0]
    for short in (f"{name}:evil@1+2", f"{name}:evil@1:+2"):
        found = client.chat(model=short, temperature=0).json()["choices"][0]
        assert found["message"] == steered["message"]
        assert found["persona_lens"]["edits"] == "evil@1:+2"
    assert client.chat(model="another").status_code == 404
    assert client.chat(model=f"{name}:evil@1+2", lens={"edits": "evil@1:+2"}).status_code == 400


def test_presets_are_kept_by_name(client: Client) -> None:
    address = "/v1/persona_lens/presets/nice"
    assert client.http.put(address, json={"edits": "kind@2 : +1"}).json() == {"name": "nice", "edits": "kind@2:+1"}
    name = client.running.server.name
    assert f"{name}:nice" in [each["id"] for each in client.get("/v1/models").json()["data"]]
    assert client.chat(model=f"{name}:nice").json()["choices"][0]["persona_lens"]["edits"] == "kind@2:+1"
    assert client.chat(lens={"edits": "nice"}).json()["choices"][0]["persona_lens"]["edits"] == "kind@2:+1"
    assert client.http.put(address, json={"edits": "kind@2:nonsense"}).status_code == 400
    assert client.http.delete(address).status_code == 200
    assert client.http.delete(address).status_code == 400
    assert client.get("/v1/persona_lens/presets").json() == {"presets": {}}


def test_alarms_sound_and_may_end_a_reply(client: Client) -> None:
    heard = client.chat(lens={"alarms": ["evil@1>-1000"], "alarm_on": "token"}).json()["choices"][0]
    (alarm,) = heard["persona_lens"]["alarms"]
    assert (alarm["trait"], alarm["layer"], alarm["token"]) == ("evil", 1, 0)
    ended = client.chat(lens={"alarms": ["evil@1>-1000"], "stop_on_alarm": True}).json()["choices"][0]
    assert len(ended["persona_lens"]["tokens"]) == 1
    assert ended["persona_lens"]["ended"] == "alarm"
    missing = client.chat(lens={"alarms": ["evil@1>2sd"]})
    assert missing.status_code == 400
    assert "monitor baseline" in missing.json()["error"]["message"]


def test_log_probabilities_are_told(client: Client) -> None:
    found = client.chat(logprobs=True, top_logprobs=3, temperature=0).json()["choices"][0]
    content = found["logprobs"]["content"]
    assert len(content) == len(found["persona_lens"]["tokens"])
    for each in content:
        assert len(each["top_logprobs"]) == 3
        assert each["logprob"] == each["top_logprobs"][0]["logprob"]  # the likeliest is taken
    events = list(client.streamed(messages=[{"role": "user", "content": "Hello"}], logprobs=True, temperature=0))
    streamed = [each for event in events for each in (event["choices"][0]["logprobs"] or {}).get("content", ())]
    assert [each["logprob"] for each in streamed] == pytest.approx([each["logprob"] for each in content], abs=1e-5)


def test_completions_go_on_from_any_tokens(client: Client) -> None:
    def ask(prompt: Any, **options: Any) -> Any:
        return client.http.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **options}).json()

    found = ask("Once upon a time", max_tokens=9)
    tokenizer = client.running.server.workbench.backend.tokenizer
    ids = tokenizer("Once upon a time")["input_ids"]
    assert ask(ids, max_tokens=9)["choices"][0]["text"] == found["choices"][0]["text"]
    both = ask(["Once upon a time", "b"], max_tokens=9)["choices"]
    assert [choice["index"] for choice in both] == [0, 1]
    assert both[0]["text"] == found["choices"][0]["text"]
    assert (
        ask("Once upon a time", max_tokens=9, echo=True)["choices"][0]["text"] == f"Once upon a time{both[0]['text']}"
    )
    assert ask("ab", max_tokens=0, echo=True)["choices"][0]["text"] == "ab"
    assert len(ask("ab", max_tokens=4, logprobs=2)["choices"][0]["logprobs"]["top_logprobs"][0]) == 2
    assert "64 replies" in ask(["ab"] * 5, n=16)["error"]["message"]
    assert "without stream" in ask("ab", echo=True, stream=True)["error"]["message"]


def test_a_prompt_is_echoed_with_its_log_probabilities(client: Client) -> None:
    def ask(prompt: Any, **options: Any) -> Any:
        return client.http.post("/v1/completions", json={"prompt": prompt, "echo": True, **options}).json()

    bench = client.running.server.workbench
    tokenizer, vectors = bench.backend.tokenizer, bench.shelf.vectors
    texts = ["Once upon a time", "b", "two né"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    for edits in ("", "evil@1:+2", "kind@1:-3 on prompt"):
        told = {"temperature": 0, "logprobs": 2, "persona_lens": {"edits": edits}}
        found = ask(prompts, max_tokens=1, **told)
        # The prompts stand as responses here, but for their first tokens, so the edits are to be everywhere.
        written = Steering.parse(edits.removesuffix(" on prompt"), vectors).edits() if edits else ()
        for choice, text, ids in zip(found["choices"], texts, prompts, strict=True):
            (said,) = choice["persona_lens"]["tokens"]
            assert choice["text"] == text + said["text"] + choice["persona_lens"]["rest"]
            values = choice["logprobs"]
            assert values["tokens"] == [tokenizer.decode([token]) for token in (*ids, said["id"])]
            assert {len(values[name]) for name in ("token_logprobs", "top_logprobs")} == {len(ids) + 1}
            assert values["token_logprobs"][0] is values["top_logprobs"][0] is None
            whole = TokenBatch.of([ids[:1]], [(*ids[1:], said["id"])])
            (expected,) = bench.backend.forward(whole, written, logprobs=True).logprobs or ()
            assert values["token_logprobs"][1:] == pytest.approx(expected.tolist(), abs=1e-4)
            places = zip(values["top_logprobs"][1:], values["token_logprobs"][1:], strict=True)
            assert all(max(top.values()) >= own for top, own in places)
            assert max(values["top_logprobs"][-1].values()) == values["token_logprobs"][-1]  # the likeliest is taken
        none = ask(prompts, max_tokens=0, **told)
        assert [choice["text"] for choice in none["choices"]] == texts
        assert none["usage"]["completion_tokens"] == 0
        for choice, longer in zip(none["choices"], found["choices"], strict=True):
            assert choice["finish_reason"] == "length"
            assert choice["persona_lens"]["tokens"] == []
            shorter = choice["logprobs"]["token_logprobs"][1:]
            assert shorter == pytest.approx(longer["logprobs"]["token_logprobs"][1:-1], abs=1e-4)


def test_several_choices_are_echoed(client: Client) -> None:
    asked = {"prompt": ["ab", "abc"], "echo": True, "logprobs": 0, "n": 3, "max_tokens": 4, "seed": 5}
    choices = client.http.post("/v1/completions", json=asked).json()["choices"]
    assert [choice["text"][:3] == "abc" for choice in choices] == [False] * 3 + [True] * 3
    for first, choice in zip([choices[0]] * 3 + [choices[3]] * 3, choices, strict=True):
        own, others = choice["logprobs"], first["logprobs"]
        prompt = 2 + (choice["index"] > 2)
        assert own["token_logprobs"][1:prompt] == pytest.approx(others["token_logprobs"][1:prompt], abs=1e-4)
        assert len(own["tokens"]) == prompt + 4
        assert own["top_logprobs"] == [None, *({} for _ in own["tokens"][1:])]


def test_the_token_that_ends_a_reply_is_among_what_is_echoed(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that drops the last token, because it is generated, drops none of the prompt."""

    def ask(**options: Any) -> Any:
        asked = {"prompt": "Once upon", "echo": True, "logprobs": 1, "temperature": 0, **options}
        return client.http.post("/v1/completions", json=asked).json()["choices"][0]

    plain = ask(max_tokens=1)
    monkeypatch.setattr(client.running.server.workbench.backend, "end_ids", (plain["persona_lens"]["tokens"][0]["id"],))
    ended = ask(max_tokens=1)
    assert ended["finish_reason"] == "stop"
    assert ended["text"] == "Once upon"
    assert ended["logprobs"] == plain["logprobs"]


def test_vectors_are_listed_brought_and_removed(client: Client) -> None:
    listed = client.get("/v1/persona_lens/vectors").json()
    assert [each["name"] for each in listed["vectors"]] == list(TRAITS)
    assert [len(each["norms"]) for each in listed["vectors"]] == [3, 3]
    brought = vectors_of(client.running.server.workbench.backend, "proud", 9)
    post: dict[str, Any] = {"url": "/v1/persona_lens/vectors", "headers": {"x-name": "proud"}}
    assert client.http.post(**post, content=brought.to_bytes()).status_code == 201
    assert client.chat(lens={"edits": "proud@1:+1", "watch": ["proud@0"]}).json()["choices"][0]["persona_lens"]["means"]
    assert client.http.post(**post, content=brought.to_bytes()).status_code == 400  # the name is taken
    assert client.http.delete("/v1/persona_lens/vectors/proud").status_code == 200
    assert "stay" in client.http.delete("/v1/persona_lens/vectors/evil").json()["error"]["message"]
    for content in (b"", b"no vectors", brought.to_bytes()[:200], b"\x80\x04\x95pickled"):
        refused = client.http.post(**post, content=content)
        assert refused.status_code == 400
        assert "/tmp" not in refused.text


def test_a_conversation_is_read_and_a_steering_previewed(client: Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am né"}, *HELLO, {"role": "assistant", "content": "Yes"}]
    found = client.http.post("/v1/persona_lens/read", json={"messages": messages}).json()
    assert [turn["message"] for turn in found["turns"]] == [1, 3]
    assert "".join(token["text"] for token in found["turns"][0]["tokens"]) == "I am né"
    shown = client.http.post("/v1/persona_lens/preview", json={"edits": "evil@1 : +1 on response"}).json()
    assert shown["edits"] == "evil@1:+1 on response"
    assert "response" in shown["preview"]
    assert client.http.post("/v1/persona_lens/preview", json={"edits": "evil@99:+1"}).status_code == 400
    long = [{"role": "user", "content": "a" * 100_000}]
    refused = client.http.post("/v1/persona_lens/preview", json={"edits": "evil@1:+1", "messages": long})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_earlier_turns_are_found_as_they_were_steered_or_clean(client: Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am a model."}, {"role": "user", "content": "And now?"}]
    backend = client.running.server.workbench.backend
    chat = client.running.server.workbench.chat
    edits = "evil@1:+2 on generating, kind@2:+1"
    found = {}
    for history in (None, *History):
        lens = {"edits": edits} | ({} if history is None else {"history": history})
        told = client.chat(lens=lens, messages=messages, temperature=0).json()["choices"][0]["persona_lens"]
        steering = client.running.server.workbench.shelf.steering(edits)
        assert steering is not None
        written = conversation_edits(steering, chat, messages, history or DEFAULT_HISTORY)
        own = backend.generate([chat.encode_messages(messages)], Sampling(12), written).responses[0]
        assert [token["id"] for token in told["tokens"]][: len(own)] == list(own)
        assert told["history"] == (history or DEFAULT_HISTORY)
        found[history] = told["prompt_last"]
    assert found[History.STEERED] != pytest.approx(found[History.CLEAN], abs=1e-3)
    assert found[None] == pytest.approx(found[DEFAULT_HISTORY], abs=1e-4)
    assert (
        client.chat(lens={"edits": edits, "history": "clean"}).json()["choices"][0]["persona_lens"]["history"] is None
    )
    assert client.chat(messages=messages).json()["choices"][0]["persona_lens"]["history"] is None
    assert client.get("/v1/persona_lens/vectors").json()["history"] == DEFAULT_HISTORY


def test_a_preview_and_readings_are_of_the_history_that_is_asked_for(client: Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am a model."}, {"role": "user", "content": "And now?"}]
    shown, read = {}, {}
    for history in ("steered", "clean"):
        asked = {"edits": "evil@1:+1", "messages": messages, "history": history}
        rows = client.http.post("/v1/persona_lens/preview", json=asked).json()["preview"].splitlines()
        shown[history] = sum("+1" in row for row in rows[4:])
        finished = [*messages, {"role": "assistant", "content": "Tea."}]
        turns = client.http.post("/v1/persona_lens/read", json={**asked, "messages": finished}).json()["turns"]
        read[history] = [turn["readings"][1]["mean"] for turn in turns]
    assert 0 < shown["clean"] < shown["steered"] - len("I am a model.")
    assert read["clean"][0] == pytest.approx(read["steered"][0], abs=1e-4)
    assert read["clean"][1] != pytest.approx(read["steered"][1], abs=1e-3)
    fading = {"edits": "evil@1:+1 schedule(0:1 9:0)", "history": "clean"}
    for answer in (
        client.http.post("/v1/persona_lens/preview", json=fading),  # said before there is a turn that is over
        client.chat(lens=fading, messages=messages),
        client.chat(lens=fading, messages=messages, stream=True),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, None)
        assert "from the beginning of the conversation" in answer.json()["error"]["message"]
    assert client.chat(lens=fading).status_code == 200
    refused = client.http.post("/v1/completions", json={"prompt": "x", "persona_lens": {"history": "clean"}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "persona_lens.history"


def test_a_session_is_exported_as_a_page(client: Client) -> None:
    session = Session(client.running.server.name)
    session.add("user", "<b>Hello</b>")
    answer = client.http.post("/v1/persona_lens/export", content=session.to_jsonl())
    assert answer.headers["content-type"].startswith("text/html")
    assert "&lt;b&gt;Hello" in answer.text
    assert client.http.post("/v1/persona_lens/export", content=b"nothing").status_code == 400


def test_what_is_counted_is_told(client: Client) -> None:
    client.chat()
    text = client.get("/metrics").text
    for name in (
        "requests_total",
        "tokens_total",
        "first_token_seconds_count",
        "rows_running 0.0",
        "requests_waiting 0.0",
    ):
        assert f"persona_lens_{name}" in text


BAD: list[tuple[str, Any]] = [
    ("the body is to be a JSON object", []),
    ("messages", {}),
    ("messages", {"messages": []}),
    ("role", {"messages": [{"role": "tool", "content": "x"}]}),
    ("image_url", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
    ("temperature", {"messages": HELLO, "temperature": -1}),
    ("temperature", {"messages": HELLO, "temperature": "hot"}),
    ("top_p", {"messages": HELLO, "top_p": 0}),
    ("n:", {"messages": HELLO, "n": 1000}),
    ("max_tokens", {"messages": HELLO, "max_tokens": 0}),
    ("model takes", {"messages": HELLO, "max_tokens": 100000}),
    ("stop", {"messages": HELLO, "stop": ["a"] * 5}),
    ("seed", {"messages": HELLO, "seed": 1.5}),
    ("persona_lens.editz", {"messages": HELLO, "persona_lens": {"editz": "x"}}),
    ("no trait", {"messages": HELLO, "persona_lens": {"watch": ["good@1"]}}),
    ("layer", {"messages": HELLO, "persona_lens": {"watch": ["evil@99"]}}),
    ("messages.0.content: ", {"messages": [{"role": "user", "content": None}]}),
    ("evil@20", {"messages": HELLO, "persona_lens": {"watch": ["evil@x"]}}),
    ("good", {"messages": HELLO, "persona_lens": {"edits": "good@1:+1"}}),
    ("alarm", {"messages": HELLO, "persona_lens": {"alarms": ["evil!"]}}),
    ("'steered' or 'clean'", {"messages": HELLO, "persona_lens": {"history": "new"}}),
    ("alarm_on", {"messages": HELLO, "persona_lens": {"alarm_on": "never"}}),
]


@pytest.mark.parametrize(("said", "body"), BAD)
def test_bad_requests_get_an_error_in_openais_form(client: Client, said: str, body: Any) -> None:
    for stream in (False, True):
        asked = {**body, "stream": stream} if isinstance(body, dict) else body
        answer = client.http.post("/v1/chat/completions", content=json.dumps(asked))
        error = answer.json()["error"]
        assert answer.status_code == 400, answer.text
        assert error["type"] == "invalid_request_error"
        assert said in error["message"]
    assert client.chat(max_tokens=1).status_code == 200


UNDONE: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "logit_bias": {"50256": -100},
    "presence_penalty": 0.5,
    "frequency_penalty": -0.1,
    "audio": {"voice": "alloy", "format": "wav"},
    "modalities": ["text", "audio"],
    "web_search_options": {"search_context_size": "low"},
}
COMPLETIONS_UNDONE = {"logit_bias": {"1": 1}, "presence_penalty": 1, "suffix": "end", "best_of": 3}
HARMLESS: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "function_call": None,
    "response_format": {"type": "text"},
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "audio": None,
    "modalities": ["text"],
    "n": 1,
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "parallel_tool_calls": True,
    "service_tier": "auto",
    "best_of": 1,
}


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_done_is_refused_by_name(client: Client, stream: bool) -> None:
    for path, undone in (("chat/completions", UNDONE), ("completions", COMPLETIONS_UNDONE)):
        for name, value in undone.items():
            body = {"messages": HELLO, "prompt": "Hello", "max_tokens": 1, "stream": stream}
            answer = client.http.post(f"/v1/{path}", json={**body, name: value})
            assert answer.status_code == 400, name
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("unsupported_parameter", name)
            assert name in error["message"]
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function"}]}
    error = client.chat(messages=[*HELLO, called, *HELLO]).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "messages.tool_calls")


def test_what_clients_send_who_ask_for_nothing_by_it_is_taken(client: Client) -> None:
    plain = client.chat(temperature=0).json()["choices"][0]["message"]
    for body in (HARMLESS, dict.fromkeys(HARMLESS), {"tool_choice": "auto"}):
        found = client.chat(temperature=0, **body)
        assert found.status_code == 200, found.text
        assert found.json()["choices"][0]["message"] == plain
    assert client.http.post("/v1/completions", json={"prompt": "a", **HARMLESS}).status_code == 200


def test_an_assistant_that_said_nothing_is_taken_at_its_word(client: Client) -> None:
    def ask(**message: Any) -> Any:
        messages = [*HELLO, {"role": "assistant", **message}, {"role": "user", "content": "Well?"}]
        answer = client.chat(messages=messages, temperature=0, max_tokens=4)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]

    wanted = ask(content="")
    assert ask(content=None) == ask() == wanted
    assert ask(content=None, tool_calls=None, refusal=None, audio=None, annotations=[]) == wanted
    messages = [*HELLO, {"role": "assistant", "content": None}]
    assert client.http.post("/v1/persona_lens/read", json={"messages": messages}).status_code in (200, 400)


def test_null_is_as_if_it_were_not_there(client: Client) -> None:
    names = ("model", "n", "stop", "seed", "max_tokens", "temperature", "top_p", "persona_lens", "stream_options")
    body = {"messages": HELLO, "max_completion_tokens": 2, **dict.fromkeys((*names, "logprobs", "stream"))}
    answer = client.http.post("/v1/chat/completions", json=body).json()
    assert answer["model"] == client.running.server.name
    assert answer["usage"]["completion_tokens"] == 2


def test_what_is_no_json_and_what_is_not_there(client: Client) -> None:
    for content in (b"", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"messages": ' + b'{"a":' * 5000):
        assert client.http.post("/v1/chat/completions", content=content).status_code == 400
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert client.get("/v1/chat/completions").json()["error"]["code"] in ("not_found", "method_not_allowed")

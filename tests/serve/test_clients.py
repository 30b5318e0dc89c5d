"""Clients that others wrote, and the project's own, speak to the server as to any other of OpenAI's protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persona_lens.backend import Sampling
from persona_lens.extraction import ExtractionSettings, plan_requests
from persona_lens.extraction.responses import generate_responses
from persona_lens.models.server import (
    Completion,
    CompletionCache,
    CompletionRequest,
    CompletionServer,
    Refused,
    ServerError,
    ServerSettings,
)
from persona_lens.runs.settings import RolloutSettings
from persona_lens.serve.server import Running
from persona_lens.steering import Steering
from persona_lens.traits import load_trait
from tests.analysis.capability.tasks import write_tasks
from tests.serve.running import HELLO, Client, expected, workbench

openai = pytest.importorskip("openai", reason="needs the extra openai")

EDITS = "evil@1:+2"
KEY = "SERVED_MODEL_KEY"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with Running(workbench()) as running:
        yield running


@pytest.fixture
def model(running: Running, monkeypatch: pytest.MonkeyPatch) -> str:
    """The model's name, in an environment whose key is the server's token and which has no way around it."""
    for name in ("OPENAI_API_KEY", KEY):
        monkeypatch.setenv(name, running.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return running.server.name


def official(running: Running, **options: Any) -> Any:
    given = {"base_url": f"{running.address}/v1", "api_key": running.token, "max_retries": 0, **options}
    return openai.OpenAI(**given, http_client=openai.DefaultHttpxClient(trust_env=False))


def test_the_official_client(running: Running, model: str) -> None:
    client = official(running)
    assert [each.id for each in client.models.list()] == [model]
    how: dict[str, Any] = {"model": model, "messages": HELLO, "max_completion_tokens": 8, "temperature": 0}
    plain = client.chat.completions.create(**how)
    assert plain.choices[0].message.content == expected(running)
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    steered = client.chat.completions.create(
        **how, logprobs=True, top_logprobs=2, extra_body={"persona_lens": {"edits": EDITS, "watch": ["evil@2"]}}
    ).choices[0]
    assert steered.message.content == expected(running, EDITS)
    assert steered.persona_lens["edits"] == EDITS
    assert [gauge["name"] for gauge in steered.persona_lens["gauges"]] == ["evil@2"]
    assert [len(each.top_logprobs) for each in steered.logprobs.content] == [2] * 8
    assert len(client.chat.completions.create(**{**how, "temperature": 1.5}, n=3, seed=1).choices) == 3
    by_name = client.chat.completions.create(**{**how, "model": f"{model}:evil@1+2"})
    assert by_name.choices[0].message.content == steered.message.content
    completed = client.completions.create(model=model, prompt="Once", max_tokens=5, temperature=0, logprobs=2)
    assert len(completed.choices[0].logprobs.top_logprobs) == 5


def test_the_official_client_reads_streams(running: Running, model: str) -> None:
    client = official(running)
    how: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 8, "temperature": 0}
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(running)
    assert chunks[-1].usage.completion_tokens == 8
    assert sum(len(chunk.persona_lens.get("tokens", ())) for chunk in chunks if chunk.choices) == 8
    with client.chat.completions.stream(**how) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == text
    words = client.completions.create(model=model, prompt="Once", max_tokens=5, temperature=0, stream=True)
    whole = client.completions.create(model=model, prompt="Once", max_tokens=5, temperature=0)
    assert "".join(chunk.choices[0].text for chunk in words) == whole.choices[0].text


def test_the_official_client_knows_what_is_wrong(running: Running, model: str) -> None:
    how: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 8}
    client = official(running)
    with pytest.raises(openai.AuthenticationError, match="token"):
        official(running, api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="the model here is"):
        client.chat.completions.create(**{**how, "model": "gpt"})
    with pytest.raises(openai.BadRequestError, match="no trait"):
        client.chat.completions.create(**how, extra_body={"persona_lens": {"watch": ["good"]}})
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(**{**how, "max_tokens": 100_000})
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="weaken it"):  # nothing to be tried again
        client.chat.completions.create(**how, extra_body={"persona_lens": {"edits": "evil@1:+1e30"}})
    with pytest.raises(openai.APIError, match="weaken it"):
        list(client.chat.completions.create(**how, stream=True, extra_body={"persona_lens": {"edits": "evil@1:+1e30"}}))


def test_many_of_the_official_client_at_once(running: Running, model: str) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{running.address}/v1",
            api_key=running.token,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as client:

            async def ask(number: int) -> str:
                stream = await client.chat.completions.create(
                    model=f"{model}:evil@1:{number / 4:+g}",
                    messages=HELLO,
                    max_tokens=8,
                    temperature=0,
                    stream=True,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            left = await client.chat.completions.create(model=model, messages=HELLO, max_tokens=400, stream=True)
            await left.close()
            return await asyncio.gather(*map(ask, range(1, 9)))

    assert asyncio.run(main()) == [expected(running, f"evil@1:{number / 4:+g}") for number in range(1, 9)]


def test_inspect(running: Running, model: str) -> None:
    pytest.importorskip("inspect_ai", reason="needs the extra inspect")
    from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model

    served = get_model(
        f"openai-api/served/{model}", base_url=f"{running.address}/v1", api_key=running.token, memoize=False
    )
    config = GenerateConfig(
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"persona_lens": {"edits": EDITS}},
    )
    answer = asyncio.run(served.generate([ChatMessageUser(content=HELLO[0]["content"])], config=config))
    assert answer.completion == expected(running, EDITS).strip() or answer.completion == expected(running, EDITS)
    assert answer.stop_reason == "max_tokens"
    assert answer.choices[0].logprobs is not None


def test_lm_evaluation_harness(running: Running, model: str) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    for name, edits in ((model, ""), (f"{model}:{EDITS}", EDITS)):
        served = LocalChatCompletion(
            base_url=f"{running.address}/v1/chat/completions", model=name, max_retries=1, num_concurrent=1
        )
        prompt = JsonChatStr(served.apply_chat_template(HELLO).prompt)
        until = {"until": ["never said"], "max_gen_toks": 8}
        asked = Instance("generate_until", {}, (prompt, dict(until)), 0)
        assert served.generate_until([asked], disable_tqdm=True) == [expected(running, edits)]
        completes = LocalCompletionsAPI(
            base_url=f"{running.address}/v1/completions",
            model=name,
            tokenizer_backend=None,
            tokenized_requests=False,
            max_retries=1,
            num_concurrent=1,
        )
        both = [Instance("generate_until", {}, (text, dict(until)), at) for at, text in enumerate(("One", "Two"))]
        found = [
            Client(running)
            .http.post("/v1/completions", json={"model": name, "prompt": text, "max_tokens": 8, "temperature": 0})
            .json()["choices"][0]["text"]
            for text in ("One", "Two")
        ]
        assert completes.generate_until(both, disable_tqdm=True) == found


def test_lm_evaluation_harness_scores_choices(running: Running, model: str, tmp_path: Path) -> None:
    """Its numbers are those of the harness's model on the backend, for text and for tokens, one prompt or several."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    from persona_lens.analysis.capability.harness import BackendLM

    name, *_ = write_tasks(tmp_path)
    bench = running.server.workbench
    bench.backend.tokenizer.save_pretrained(tmp_path / "tokenizer")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def results(evaluated: Any) -> Any:
        found = simple_evaluate(evaluated, tasks=[name], task_manager=manager, bootstrap_iters=0, limit=3)
        assert found is not None
        return {key: value for key, value in found["results"][name].items() if key.startswith("acc")}

    for edits, served_as, size in (("", model, 1), (EDITS, f"{model}:{EDITS}", 3)):
        served = LocalCompletionsAPI(
            base_url=f"{running.address}/v1/completions",
            model=served_as,
            tokenizer_backend="huggingface",
            tokenizer=str(tmp_path / "tokenizer"),
            max_length=512,
            max_retries=1,
            num_concurrent=size,
            batch_size=2,
        )
        written = Steering.parse(edits, bench.shelf.vectors).edits() if edits else ()
        ours = BackendLM(bench.backend, edits=written)
        texts = [("The sun", " is hot"), ("One", " two"), ("Long " * 20, "end")]
        pairs = [tuple(bench.backend.tokenizer(part)["input_ids"] for part in text) for text in texts]
        pairs += [(start, [*bench.backend.generate([start], Sampling(3), written).responses[0]]) for start, _ in pairs]
        got, wanted = (each._loglikelihood_tokens([(None, *pair) for pair in pairs]) for each in (served, ours))
        assert [flag for _, flag in got] == [flag for _, flag in wanted] == [False] * 3 + [True] * 3
        assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], abs=1e-3)
        assert results(served) == results(ours)


def test_our_own_client_judges_and_writes_responses(running: Running, model: str, tmp_path: Path) -> None:
    def server(name: str = model, **options: Any) -> CompletionServer:
        settings = ServerSettings(name, f"{running.address}/v1", KEY, attempts=1, timeout=60, **options)
        return CompletionServer(settings, CompletionCache(tmp_path / "cache"))

    one = CompletionRequest((("user", HELLO[0]["content"]),), 1, top_logprobs=20)
    [answer] = server().complete([one])
    assert isinstance(answer, Completion)
    assert answer.top_logprobs is not None
    assert len(answer.top_logprobs) == 20
    with pytest.raises(ServerError, match="the model here is"):
        server("gpt").complete([one])
    [refused] = server().complete([CompletionRequest((("user", "As JSON."),), 4, schema={"type": "object"})])
    assert isinstance(refused, Refused)  # authors ask without it then
    assert "response_format" in refused.reason

    settings = RolloutSettings(max_new_tokens=6, temperature=1.0)
    requests = plan_requests(load_trait("optimistic"), ExtractionSettings(questions=2, rollouts=settings))[:4]
    made = generate_responses(server(f"{model}:{EDITS}"), requests, settings, tmp_path / "responses.jsonl")
    assert (made.rows, made.refused) == (len(requests), 0)


def test_the_servers_place_is_free_after_all_of_it(running: Running) -> None:
    client = Client(running)
    assert client.chat().status_code == 200
    assert "persona_lens_requests_waiting 0.0" in client.get("/metrics").text

"""Programs that speak OpenAI's protocol speak to the server: the official client, and those that evaluate models."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from persona_lens.serve.server import Running
from tests.serve.running import HELLO, Client, workbench

LENS: dict[str, Any] = {"persona_lens": {"edits": "evil@1:+1.5", "watch": ["kind@2"]}}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Running(workbench()) as running:
        yield Client(running)


@pytest.fixture
def official(client: Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{client.running.address}/v1", api_key=client.running.token, max_retries=0) as made:
        yield made


def test_the_official_client(client: Client, official: openai.OpenAI) -> None:
    model = official.models.list().data[0].id
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "max_completion_tokens": 9, "seed": 4}
    whole = official.chat.completions.create(**asked, extra_body=LENS, logprobs=True, top_logprobs=2, n=2)
    assert [choice.index for choice in whole.choices] == [0, 1]
    told: Any = whole.choices[0]
    assert told.persona_lens["edits"] == "evil@1:+1.5"
    assert [gauge["name"] for gauge in told.persona_lens["gauges"]] == ["kind@2"]
    assert told.logprobs.content[0].top_logprobs[1].logprob <= told.logprobs.content[0].top_logprobs[0].logprob
    text = ""
    for chunk in official.chat.completions.create(**asked, extra_body=LENS, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content
    assert official.completions.create(model=model, prompt="Once", max_tokens=5).usage is not None
    with pytest.raises(openai.BadRequestError, match="no trait"):
        official.chat.completions.create(**asked, extra_body={"persona_lens": {"watch": ["good"]}})
    with pytest.raises(openai.NotFoundError, match="the model here is"):
        official.chat.completions.create(**{**asked, "model": "gpt-4"})
    with pytest.raises(openai.AuthenticationError):
        official.with_options(api_key="wrong").models.list()


def test_the_official_client_in_an_event_loop(client: Client) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{client.running.address}/v1", api_key=client.running.token, max_retries=0
        ) as made:

            async def one(seed: int) -> str:
                said = await made.chat.completions.create(
                    model=client.running.server.name,
                    messages=[{"role": "user", "content": "Hello, who are you?"}],
                    max_tokens=6,
                    seed=seed,
                )
                return str(said.choices[0].message.content)

            return await asyncio.gather(*map(one, (1, 1, 2)))

    first, same, _ = asyncio.run(main())
    assert first == same


def test_inspect_ai(client: Client) -> None:
    from inspect_ai.model import GenerateConfig, get_model

    address, token = f"{client.running.address}/v1", client.running.token
    model = get_model(f"openai-api/lens/{client.running.server.name}", base_url=address, api_key=token)

    async def main() -> Any:
        return await model.generate("Hello", config=GenerateConfig(max_tokens=7, seed=3, temperature=0.5))

    output = asyncio.run(main())
    assert output.completion
    assert output.usage.output_tokens <= 7


def test_lm_evaluation_harness(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", client.running.token)
    shared = {"model": client.running.server.name, "tokenized_requests": False, "num_concurrent": 1, "max_retries": 1}
    until = {"until": ["\n"], "max_gen_toks": 6, "temperature": 0}
    made = LocalCompletionsAPI(base_url=f"{client.running.address}/v1/completions", tokenizer_backend=None, **shared)
    asked = [Instance("generate_until", {}, (text, dict(until)), index) for index, text in enumerate(("One", "Two"))]
    found = made.generate_until(asked, disable_tqdm=True)
    assert len(found) == 2
    chat = LocalChatCompletion(
        base_url=f"{client.running.address}/v1/chat/completions", tokenizer_backend=None, **shared
    )
    message = chat.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert len(chat.generate_until([Instance("generate_until", {}, (message, dict(until)), 0)], disable_tqdm=True)) == 1

"""A model that thinks before it answers: what the server tells apart, and how the page shows it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from persona_lens.backend import Sampling
from persona_lens.data.growing_text import UNFINISHED
from persona_lens.models import ChatFormat
from persona_lens.serve.server import Running
from persona_lens.serve.session import Session
from persona_lens.serve.shelf import Shelf
from persona_lens.serve.workbench import Workbench
from tests.backends.fixtures import backend_of
from tests.families import FAMILIES
from tests.serve.browsing import DESK, Page, browser
from tests.serve.running import LAYERS, TRAITS, Client, vectors_of
from tests.thinking import ASKED, NEW, thinking_model

MESSAGES = [{"role": "user", "content": ASKED}]
CLOSING = "</think>"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    backend = backend_of("transformers", thinking_model(), FAMILIES["qwq"].tokenizer())
    vectors = [vectors_of(backend, trait, seed) for seed, trait in enumerate(TRAITS)]
    with Running(Workbench(backend, Shelf(backend, vectors, LAYERS))) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: Running) -> Client:
    return Client(running)


def test_thinking_stands_beside_the_content(client: Client) -> None:
    plain = client.chat(ASKED, max_tokens=NEW, temperature=0).json()["choices"][0]
    message, tokens = plain["message"], plain["persona_lens"]["tokens"]
    prompt = client.running.server.workbench.encode(MESSAGES)
    whole = client.http.post(
        "/v1/completions", json={"prompt": list(prompt), "max_tokens": NEW, "temperature": 0}
    ).json()
    thought, _, answer = whole["choices"][0]["text"].partition(CLOSING)
    assert thought
    assert answer
    assert (message["reasoning_content"], message["content"]) == (thought, answer)
    kinds = [token.get("part") for token in tokens]
    at = kinds.index("mark")
    assert kinds == ["thinking"] * at + ["mark"] + [None] * (len(tokens) - at - 1)
    assert len(tokens) == NEW


def test_a_stream_tells_thinking_and_content_apart(client: Client) -> None:
    deltas = [
        event["choices"][0]["delta"] for event in client.streamed(messages=MESSAGES, max_tokens=NEW, temperature=0)
    ]
    message = client.chat(ASKED, max_tokens=NEW, temperature=0).json()["choices"][0]["message"]
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == message[name]
    assert not any("content" in delta and "reasoning_content" in delta for delta in deltas)


@pytest.fixture(scope="module")
def spacious() -> Iterator[tuple[Client, int]]:
    """Of a model that says line feeds and ends its thinking often, and a seed with which it does so in that order."""
    tokenizer, model = FAMILIES["qwq"].tokenizer(), copy.deepcopy(thinking_model())
    ids = tokenizer.get_vocab()
    with torch.no_grad():
        model.get_output_embeddings().weight[[ids["\u010a"], ids[CLOSING]]] *= 3
    backend = backend_of("transformers", model, tokenizer)
    prompt, seeds = ChatFormat.from_tokenizer(tokenizer).encode_messages(MESSAGES), range(600)
    said = backend.generate([prompt] * len(seeds), Sampling(NEW, 1.0, seeds=tuple(seeds))).responses
    wanted = re.compile(r"[^<]+</think>\n+[!-;?-~]")
    seed = next(seed for seed in seeds if wanted.match(str(tokenizer.decode(list(said[seed])))))
    with Running(Workbench(backend, Shelf(backend, [vectors_of(backend, "kind", 0)], LAYERS))) as server:
        yield Client(server), seed


@pytest.mark.parametrize("more", [{}, {"stop": ["\n\n\n\n\n"]}], ids=["freely", "while text waits"])
def test_content_does_not_begin_with_the_line_feeds_behind_the_thinking(
    spacious: tuple[Client, int], more: Any
) -> None:
    client, seed = spacious
    given: Any = {"max_tokens": NEW, "temperature": 1.0, "seed": seed, **more}
    prompt = client.running.server.workbench.encode(MESSAGES)
    text = client.http.post("/v1/completions", json={"prompt": list(prompt), **given}).json()["choices"][0]["text"]
    thought, _, answer = text.partition(CLOSING)
    assert answer.startswith("\n")
    assert answer.strip("\n")
    choice = client.chat(ASKED, **given).json()["choices"][0]
    assert choice["message"]["content"] == answer.lstrip("\n")
    assert choice["message"]["reasoning_content"].rstrip(UNFINISHED) == thought.rstrip(UNFINISHED)
    told = choice["persona_lens"]["tokens"]
    assert "".join(token["text"] for token in told) + choice["persona_lens"]["rest"] == text
    if not more:
        assert next(token.get("part") for token in told if token["text"] == "\n") == "mark"
    deltas = [event["choices"][0]["delta"] for event in client.streamed(messages=MESSAGES, **given)]
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == choice["message"][name]


def test_thinking_that_never_ends_leaves_no_content(client: Client) -> None:
    message = client.chat(ASKED, max_tokens=2, temperature=0).json()["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"]


@pytest.mark.parametrize(
    "asked", [{"thinking_budget": 2}, {"thinking_token_budget": 2}, {"reasoning": {"max_tokens": 2, "effort": "low"}}]
)
def test_thinking_is_limited_by_the_names_that_clients_use(client: Client, asked: dict[str, Any]) -> None:
    choice = client.chat(ASKED, max_tokens=NEW, temperature=0, **asked).json()["choices"][0]
    kinds = [token.get("part") for token in choice["persona_lens"]["tokens"]]
    assert kinds == ["thinking"] * 2 + ["mark"] + [None] * (NEW - 3)
    assert choice["message"]["content"]


def test_a_budget_below_nothing_is_refused(client: Client) -> None:
    refused = client.chat(ASKED, thinking_budget=-1)
    assert refused.status_code == 400
    assert "thinking_budget" in refused.text


def test_the_page_shows_the_thinking_in_a_block_of_its_own(running: Running, tmp_path: Any) -> None:
    with browser() as chromium:
        page = Page(chromium.new_context(viewport=DESK, accept_downloads=True), running.link)
        page.set(Tokens_at_most=NEW, Temperature=0)
        page.send(ASKED)
        own = Client(running).chat(ASKED, max_tokens=NEW, temperature=0).json()["choices"][0]["message"]
        block = page.page.locator(".message.assistant details.thinking")
        outside = ".message.assistant .tokens > .token"

        def shown() -> tuple[str, str]:
            spans = block.locator(".token").all_text_contents()
            return "".join(spans), "".join(page.page.locator(outside).all_text_contents())

        assert shown() == (own["reasoning_content"] + CLOSING, own["content"])
        block.locator("summary").click()
        assert not block.locator(".token").first.is_visible()
        page.page.reload()  # from what the browser kept
        page.ready()
        assert shown() == (own["reasoning_content"] + CLOSING, own["content"])
        page.page.click("#saving summary")
        with page.page.expect_download() as saving:
            page.page.click("#save")
        saving.value.save_as(tmp_path / "session.jsonl")
        assert not page.faults
    session = Session.load(tmp_path / "session.jsonl")
    (reply,) = [message for message in session.path if message.role == "assistant"]
    assert reply.content == own["content"]
    assert reply.readings is not None
    assert [token.part for token in reply.readings.tokens].count("mark") == 1
    assert '<div class="part thinking">' in session.html()


def test_thinking_is_limited_on_the_page_and_a_reply_says_so(running: Running, tmp_path: Any) -> None:
    field = "Thinking tokens at most"

    def thought(page: Page, number: int = -1) -> int:
        return int(page.page.locator(".message.assistant").nth(number).locator("details.thinking .token").count()) - 1

    with browser() as chromium:
        context = chromium.new_context(viewport=DESK, accept_downloads=True)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = Page(context, running.link)
        page.set(Tokens_at_most=NEW, Temperature=0)
        page.send(ASKED)
        free = thought(page)
        assert free > 1
        page.page.get_by_label(field, exact=True).fill("1")
        page.page.keyboard.press("Tab")
        page.act("Again")
        assert thought(page) == 1
        assert page.made() == ["not steered · greedy, thinking up to 1 token"]
        python, curl = page.copied("Python"), page.copied("curl")
        assert 'extra_body={"thinking_budget":1,' in python
        assert '"thinking_budget":1' in curl
        page.page.get_by_label(field, exact=True).fill("0")
        page.page.keyboard.press("Tab")
        page.page.reload()
        page.ready()
        assert page.page.get_by_label(field, exact=True).input_value() == "0"
        page.page.evaluate("document.getElementById('sampling').open = true")
        page.act("Again")
        assert page.page.locator(".message.assistant .token[data-token='0']").inner_text() == CLOSING
        page.act("Branch before")
        page.act("Use its settings")
        assert page.page.get_by_label(field, exact=True).input_value() == "1"
        page.act("Branch before")
        page.act("Use its settings")
        assert page.page.get_by_label(field, exact=True).input_value() == ""
        page.act("Again")
        assert thought(page) == free
        assert "thinking_budget" not in page.copied("Python") + page.copied("curl")
        page.page.click("#saving summary")
        with page.page.expect_download() as saving:
            page.page.click("#save")
        saving.value.save_as(tmp_path / "session.jsonl")
        assert not page.faults
    session = Session.load(tmp_path / "session.jsonl")
    made = [message.made for message in session if message.role == "assistant"]
    assert [each and each.thinking_budget for each in made] == [None, 1, 0, None]
    assert str(made[1]) == "not steered; greedy, thinking up to 1 token"

"""A trait written by a real model on a real server, as far as so small a model gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from persona_lens.models.server import CompletionCache, CompletionServer, ServerSettings
from persona_lens.traits.generate import AuthoringError, Draft, Limits, ServerAuthor, plan, write_trait
from persona_lens.traits.generate.authors import reply_schema
from persona_lens.traits.generate.draft import NamesReply
from tests.servers.server import LlmServer

pytestmark = pytest.mark.real


@pytest.fixture
def author(llm_server: LlmServer, tmp_path: Path) -> ServerAuthor:
    settings = ServerSettings(llm_server.model, llm_server.base_url, attempts=2, timeout=300)
    return ServerAuthor(CompletionServer(settings, CompletionCache(tmp_path / "cache")), max_new_tokens=60, seed=3)


def test_an_author_keeps_to_the_schema(author: ServerAuthor) -> None:
    schema = reply_schema(NamesReply)
    replies = [author.write("You tell stories in prose.", "Tell a story about a cat.", schema) for _ in range(2)]
    assert all(re.match(r'\s*\{\s*"positive"\s*:\s*"', text) for text in replies), replies
    assert replies[0] != replies[1]  # each has its own seed
    assert author.describe()["structured_output"] is True


def test_an_author_writes_a_trait_or_says_what_is_missing(author: ServerAuthor, tmp_path: Path) -> None:
    file, said = tmp_path / "draft.json", None
    draft = Draft(name="grumpy", description="Complains about everything.", origin=author.describe())
    limits = Limits(attempts=2, instructions=1, questions=4, repairs=1, repair_requests=1)
    try:
        write_trait(author, draft, limits=limits, save=lambda draft: draft.save(file))
    except AuthoringError as error:
        said = str(error)
    assert Draft.load(file) == draft
    assert json.loads(file.read_text())["origin"]["structured_output"] is True
    assert 0 < draft.requests == author.server.spending.used.requests <= sum(step.at_most for step in plan(limits))
    if said is None:
        assert draft.missing == []
    else:
        assert ", ".join(draft.missing) in said.partition("Still missing: ")[2]

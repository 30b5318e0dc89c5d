"""Traits written by a model on a server: one that keeps to schemas, one that does not take them, some that fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from persona_lens.cli import commands
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import CACHE_VARIABLE
from persona_lens.models.server import CompletionCache, CompletionServer, ServerError, ServerSettings
from persona_lens.traits import USER_FOLDER_VARIABLE, read_trait
from persona_lens.traits.generate import AuthoringError, Draft, ServerAuthor, open_author, write_trait
from persona_lens.traits.generate.authors import reply_schema
from persona_lens.traits.generate.draft import QuestionsReply
from tests.models.server.loopback import Loopback, completion, serving
from tests.scripted import QUESTIONS, Good

app = commands.app_of("traits", commands.COMMANDS["traits"])

DESCRIPTION = "Complains about everything, without wishing anybody ill."
NEW = ("new", "grumpy", "--description", DESCRIPTION, "--author-model", "openai:org/big:latest")
SCHEMA = reply_schema(QuestionsReply)
Body = dict[str, Any]
Answer = Body | tuple[int, Body]
TOO_LONG = (400, {"error": {"message": "the prompt exceeds the context size"}})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(USER_FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kind_of(request: str) -> str:
    """The kind of a request, by the form of the reply that stands in it."""
    form = json.loads(request.rpartition("\n")[2])
    kinds = {"positive": "names", "instructions": "instructions", "questions": "questions", "definition": "rubric"}
    return kinds[next(iter(form))]


def writer(bad: int | None = None) -> Callable[[Body], Answer]:
    """A model that writes a whole trait; its reply number ``bad`` is of no use."""
    good, count = Good(), 0

    def respond(body: Body) -> Answer:
        nonlocal count
        count += 1
        request = body["messages"][-1]["content"]
        return completion("No." if count == bad else json.dumps(good.data(kind_of(request), request)))

    return respond


def without_schemas(respond: Callable[[Body], Answer]) -> Callable[[Body], Answer]:
    """The same on a server that refuses structured output."""
    said = {"error": {"message": "Invalid parameter: 'response_format' of type 'json_schema' is not supported"}}
    return lambda body: (400, said) if "response_format" in body else respond(body)


def author_at(loopback: Loopback, folder: Path, **given: Any) -> ServerAuthor:
    settings = ServerSettings("big", loopback.url, attempts=1)
    return ServerAuthor(CompletionServer(settings, CompletionCache(folder / "answers")), **given)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, PersonaLensError), result.output
    return str(result.exception)


def test_a_server_writes_a_trait(elsewhere: Path) -> None:
    with serving(respond=writer()) as loopback:
        address = loopback.url.replace("http://", "http://me:password@")
        options = ("--author-url", address, "--prices", "1,2", "--seed", "40")
        result = run(*NEW, *options, "--temperature", "0.5", "--max-new-tokens", "99")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Wrote traits/grumpy.yaml in 7 requests, with no warnings" in result.stdout
    assert "author: 7 answers and 0 from the cache, 707 tokens, $0.0007" in result.stderr
    assert [body["seed"] for body in loopback.bodies] == [40, 41, 42, 43, 44, 45, 46]
    for body in loopback.bodies:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("org/big:latest", 0.5, 99)
        schema = body["response_format"]["json_schema"]["schema"]
        assert list(schema["properties"]) == list(json.loads(body["messages"][1]["content"].rpartition("\n")[2]))
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
    text = (elsewhere / "traits/grumpy.yaml").read_text()
    head = {"# model: org/big:latest", f"# server: {loopback.url}", "# structured_output: True", "# seed: 40"}
    assert head <= set(text.splitlines())
    assert "password" not in text
    assert list(read_trait(elsewhere / "traits/grumpy.yaml").extraction_questions) == QUESTIONS[::2]
    assert [path.name for path in (elsewhere / "traits").iterdir()] == ["grumpy.yaml"]


def test_a_server_that_refuses_schemas_is_asked_without_them(elsewhere: Path) -> None:
    with serving(respond=without_schemas(writer())) as loopback:
        result = run(*NEW, "--author-url", loopback.url, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout)["structured_output"] is False
    assert "# structured_output: False" in (elsewhere / "traits/grumpy.yaml").read_text().splitlines()
    assert ["response_format" in body for body in loopback.bodies] == [True] + 7 * [False]
    assert [body["seed"] for body in loopback.bodies] == [0, 0, 1, 2, 3, 4, 5, 6]


def test_what_is_refused_for_another_reason_is_an_error_and_schemas_are_tried_again(tmp_path: Path) -> None:
    with serving(respond=lambda body: TOO_LONG) as loopback:
        author = author_at(loopback, tmp_path)
        with pytest.raises(AuthoringError, match=r"status 400\): the prompt exceeds the context size"):
            author.write("Be brief.", "Write.", SCHEMA)
        assert "structured_output" not in author.describe()
        loopback.respond = lambda body: completion("{}")
        assert author.write("Be brief.", "Write.", SCHEMA) == "{}"
        assert author.describe()["structured_output"] is True
        assert "response_format" in loopback.bodies[-1]


def test_a_reply_of_no_use_does_not_come_back_from_the_cache(tmp_path: Path) -> None:
    """Not in a run, nor when one goes on; a run that is repeated from its beginning pays nothing."""
    with serving(respond=writer(bad=2)) as loopback:
        for asked in (8, 0):
            draft = Draft(name="grumpy", description=DESCRIPTION, origin={})
            author = author_at(loopback, tmp_path, seed=5)
            assert write_trait(author, draft).requests == 8
            assert author.server.spending.used.requests == asked
        assert [body["seed"] for body in loopback.bodies] == list(range(5, 13))
        loopback.respond = lambda body: completion("No.")
        author = author_at(loopback, tmp_path, first_request=20)
        texts = [author.write("Be brief.", "Write.", SCHEMA) for _ in range(2)]
        later = author_at(loopback, tmp_path, first_request=22)
        loopback.respond = lambda body: completion("{}")
        texts.append(later.write("Be brief.", "Write.", SCHEMA))
    assert texts == ["No.", "No.", "{}"]
    assert [body["seed"] for body in loopback.bodies[-3:]] == [20, 21, 22]


def test_a_spending_limit_keeps_the_draft_and_the_same_command_goes_on(elsewhere: Path) -> None:
    """A request is expected to cost about 1500 dollars here, and costs a hundred or so."""
    with serving(respond=writer()) as loopback:
        options = ("--author-url", loopback.url, "--prices", "1000,1000000", "--max-spend", "1504")
        said = run(*NEW, *options)
        assert isinstance(said.exception, AuthoringError)
        assert "the spending limit of $1,504.00 is reached" in str(said.exception)
        assert "with a higher limit goes on. Still missing: 20 of 40 questions, the rubric" in str(said.exception)
        assert "author: 4 answers and 0 from the cache, 404 tokens, $4.4" in said.stderr
        draft = Draft.load(elsewhere / "traits/grumpy.partial.json")
        assert draft is not None
        assert (draft.requests, draft.questions, draft.origin["structured_output"]) == (5, QUESTIONS[:20], True)
        result = run(*NEW, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "going on from traits/grumpy.partial.json, after 5 requests" in result.stderr
    assert "author: 3 answers" in result.stderr
    assert [body["seed"] for body in loopback.bodies] == [0, 1, 2, 3, 5, 6, 7]
    assert list(read_trait(elsewhere / "traits/grumpy.yaml").extraction_questions) == QUESTIONS[::2]


def test_another_server_does_not_go_on_with_a_draft(elsewhere: Path) -> None:
    with serving(respond=writer(bad=1)) as loopback:
        loopback.respond = lambda body: completion("No.")
        assert "wrote 0 of 1 adjectives" in refused(*NEW, "--author-url", loopback.url)
        said = refused(*NEW, "--author-url", "http://127.0.0.1:1/v1")
    assert f"server: '{loopback.url}' there, 'http://127.0.0.1:1/v1' now" in said
    assert "structured_output" not in said


def test_a_key_that_is_not_accepted(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with serving(respond=lambda body: (401, {"error": {"message": "sk-very-secret is wrong"}})) as loopback:
        said = refused(*NEW, "--author-url", loopback.url, "--author-key", "MY_KEY")
    assert "does not accept the key in MY_KEY: … is wrong" in said
    assert loopback.headers["authorization"] == "Bearer sk-very-secret"
    assert "Still missing: the adjectives" in said
    assert "secret" not in said + (elsewhere / "traits/grumpy.partial.json").read_text()
    assert sum(loopback.seen.values()) == 1


def test_what_is_missing_is_said_before_anything_is_written(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(*NEW) == "https://api.openai.com/v1 needs a key: set OPENAI_API_KEY"
    assert "needs a key: set MY_KEY" in refused(*NEW, "--author-key", "MY_KEY")
    with pytest.raises(ServerError, match="needs a key"):
        open_author("openai:big")
    monkeypatch.delitem(sys.modules, "persona_lens.models.sending", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    assert refused(*NEW).startswith("asking a server needs more packages: pip install 'aiolimiter>=")
    assert list(elsewhere.iterdir()) == []


def test_an_author_is_opened_as_it_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    author = open_author("openai:org/big:latest", seed=1, temperature=0.0, max_new_tokens=9, first_request=3)
    assert isinstance(author, ServerAuthor)
    assert (author.seed, author.temperature, author.first_request) == (1, 0.0, 3)
    assert author.server.settings.timeout > ServerSettings("x").timeout
    assert author.describe() == {"model": "org/big:latest", "server": "http://127.0.0.1:9/v1", "max_new_tokens": 9}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--author-model", "m", "--author-url", "http://x/v1", "--max-spend", "3"), "--author-url, --max-spend: only"),
        (("--author-model", "m", "--author-key", "K", "--prices", "1,2"), "only for --author-model openai:NAME"),
        (("--author-model", "openai:m", "--dtype", "float32"), "--dtype: only for a model that runs here"),
        (("--author-model", "openai:m", "--backend", "b", "--device", "d"), "--backend, --device: only for a model"),
        (("--author-model", "openai:m", "--max-spend", "3"), "needs prices"),
        (("--author-model", "openai:m", "--prices", "1"), "--prices takes 2 numbers, got '1'"),
        (("--author-model", "openai:m", "--author-url", "x"), "an address looks like"),
        (("--author-model", "openai:"), "needs the name of a model"),
        (("--author-model", "m", "--backend", "fortran"), "fortran"),
        (("--prices", "1,2"), "--prices is for a trait that a model writes"),
        (("--device", "cpu"), "--device is for a trait that a model writes"),
        (("--author-model", "m", "--prices", "1,2", "--dry-run"), "--prices: only for"),
    ],
)
def test_options_that_do_not_fit(elsewhere: Path, arguments: tuple[str, ...], expected: str) -> None:
    said = refused("new", "grumpy", "--description", DESCRIPTION, *arguments)
    assert expected in said.replace("a server's address", "an address")
    assert list(elsewhere.iterdir()) == []

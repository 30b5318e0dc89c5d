"""Responses that a server generates: asked for as planned, written whole, paid for once, and read by an extraction."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from persona_lens import PersonaLensError
from persona_lens.cli import app
from persona_lens.extraction import ExtractionSettings, plan_requests
from persona_lens.extraction.means import ExtractionError
from persona_lens.extraction.responses import Generated, generate_responses, planned_usage, read_responses
from persona_lens.models.server import (
    CompletionCache,
    CompletionServer,
    Prices,
    ServerError,
    ServerSettings,
    Spending,
    SpendingLimitError,
)
from persona_lens.runs.rollouts import Request
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from tests.models.server.loopback import Loopback, completion, serving
from tests.tiny import saved_model

TRAIT = load_trait("optimistic")
SETTINGS = RolloutSettings(max_new_tokens=16, temperature=0.7, top_p=0.9)
REQUESTS = plan_requests(TRAIT, ExtractionSettings(questions=2, samples=2, rollouts=SETTINGS))
POSITIVE = {request.system for request in REQUESTS if request.labels["arm"] == "positive"}
Body = dict[str, Any]


def chatting(body: Body) -> Body:
    """Answers by the system prompt, and a number by the seed; also a judge that looks for "sunny"."""
    if body["messages"][0]["role"] != "system":
        prompt = body["messages"][0]["content"]
        if prompt.startswith("Reply with the number 57"):
            return completion("57")
        number = "95" if "sunny" in prompt or "coheren" in prompt else "5"
        return completion(number)
    mood = "sunny" if body["messages"][0]["content"] in POSITIVE else "grey"
    answer = completion(f"{mood}\u2028 №{body['seed'] % 100} ")
    answer["choices"][0]["finish_reason"] = ("stop", "length", None)[body["seed"] % 3]
    return answer


def refusing(body: Body) -> Body | tuple[int, Body]:
    """As `chatting`, but for one of the questions."""
    if REQUESTS[0].question in json.dumps(body, ensure_ascii=False):
        return 400, {"error": {"message": "the prompt \ud800 is too long"}}
    return chatting(body)


def server_at(loopback: Loopback, cache: Path, spending: Spending | None = None) -> CompletionServer:
    settings = ServerSettings("tiny", loopback.url, concurrency=4, timeout=10.0, attempts=2)
    return CompletionServer(settings, CompletionCache(cache), spending or Spending())


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("persona_lens.models.sending.FIRST_WAIT", 0.01)
    monkeypatch.setattr("persona_lens.models.endpoint.cache_folder", lambda: tmp_path / "home")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


# The file


def test_each_request_is_asked_as_planned_and_becomes_a_row(tmp_path: Path) -> None:
    out, told = tmp_path / "new" / "responses.jsonl", []
    with serving(respond=chatting) as loopback:
        server = server_at(loopback, tmp_path / "cache")
        made = generate_responses(
            server, REQUESTS, SETTINGS, out, progress=lambda done, total, label: told.append((done, total, label))
        )
        (key,) = {tuple(sorted(body)) for body in loopback.bodies}
        bodies = {(b["messages"][0]["content"], b["messages"][1]["content"], b["seed"]): b for b in loopback.bodies}
    assert key == ("max_tokens", "messages", "model", "seed", "temperature", "top_p")
    assert told == [(n, len(REQUESTS), "generating") for n in range(1, len(REQUESTS) + 1)]
    assert made == Generated(len(REQUESTS), 0, 0, None, server.spending.used)
    assert made.usage.prompt_tokens == 100 * len(REQUESTS)
    assert sum(loopback.served.values()) == len(loopback.served) == len(REQUESTS), "each sample has a seed of its own"
    rows = rows_of(out)
    seen = 0
    for request, row in zip(REQUESTS, rows, strict=True):
        seed = request.seed % 2**31
        mood = "sunny" if request.labels["arm"] == "positive" else "grey"
        assert row == {
            **request.labels,
            "system": request.system,
            "question": request.question,
            "response": f"{mood}\u2028 №{seed % 100} ",
            "ended": (True, False, None)[seed % 3],
        }
        body = bodies.get((request.system, request.question, seed))  # of the last twenty
        if body is not None:
            seen += 1
            assert (body["max_tokens"], body["temperature"], body["top_p"]) == (16, 0.7, 0.9)
            assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert seen == len(bodies) > 10
    assert [path.name for path in out.parent.iterdir()] == ["responses.jsonl"]
    given = read_responses(out)
    assert [response.response for response in given] == [row["response"] for row in rows]
    assert [response.ended for response in given] == [row["ended"] for row in rows]


def test_a_request_without_a_system_prompt_is_asked_without_one(tmp_path: Path) -> None:
    with serving() as loopback:
        server = server_at(loopback, tmp_path / "cache")
        generate_responses(server, [Request(None, "Well?", 2**62)], SETTINGS, tmp_path / "out.jsonl")
        assert [body["messages"] for body in loopback.bodies] == [[{"role": "user", "content": "Well?"}]]
        assert [body["seed"] for body in loopback.bodies] == [0]


def test_a_run_that_was_stopped_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    """Stopped by the spending limit, by a server that dies, and once finished run again."""
    out, cache = tmp_path / "responses.jsonl", tmp_path / "cache"
    dead = threading.Event()

    def dying(body: Body) -> Body | tuple[int, Body]:
        return (500, {"error": {"message": "gone"}}) if dead.is_set() else chatting(body)

    def limited(dollars: float | None) -> CompletionServer:
        return server_at(loopback, cache, Spending(Prices(1000.0, 1000.0), dollars))

    with serving(respond=dying) as loopback:
        with pytest.raises(SpendingLimitError, match="goes on"):
            generate_responses(limited(1.0), REQUESTS, SETTINGS, out)
        first = sum(loopback.served.values())
        assert 0 < first < len(REQUESTS)
        dead.set()
        with pytest.raises(ServerError, match="gone"):
            generate_responses(limited(None), REQUESTS, SETTINGS, out)
        assert not list(tmp_path.glob("responses*"))
        dead.clear()
        server = limited(None)
        made = generate_responses(server, REQUESTS, SETTINGS, out)
        assert set(loopback.served.values()) == {1}
        assert len(loopback.served) == len(REQUESTS)
        assert (server.spending.cached.requests, server.spending.used.requests) == (first, len(REQUESTS) - first)
        seen = sum(loopback.seen.values())
        content = out.read_bytes()
        again = limited(None)
        assert generate_responses(again, REQUESTS, SETTINGS, out) == made
        assert again.spending.cached.requests == len(REQUESTS)
        assert sum(loopback.seen.values()) == seen
        assert out.read_bytes() == content


@pytest.mark.parametrize("change", ["seed", "text", "line", "refusal", "nonsense", "cache"])
def test_a_file_with_other_content_stays_and_nothing_is_asked(change: str, tmp_path: Path) -> None:
    out, cache = tmp_path / "responses.jsonl", tmp_path / "cache"
    requests: Sequence[Request] = REQUESTS
    with serving(respond=refusing) as loopback:
        generate_responses(server_at(loopback, cache), requests, SETTINGS, out)
        seen, lines = sum(loopback.seen.values()), out.read_bytes().split(b"\n")
        if change == "seed":
            requests = plan_requests(TRAIT, ExtractionSettings(questions=2, samples=2, seed=1))
        elif change == "text":
            lines[-2] = lines[-2].replace("№".encode(), b"#")
        elif change == "line":
            del lines[3]
        elif change == "refusal":
            lines[0] = lines[0].replace(b'"reason": "', b'"reason": 7, "was": "')
        elif change == "nonsense":
            lines[0] = b"\xff" + b"[" * 100_000
        else:
            cache = tmp_path / "other"
        out.write_bytes(b"\n".join(lines))
        with pytest.raises(ExtractionError, match=r"responses\.jsonl is there already .* stays as it is"):
            generate_responses(server_at(loopback, cache), requests, SETTINGS, out)
        assert sum(loopback.seen.values()) == seen
        assert out.read_bytes() == b"\n".join(lines)


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "responses.jsonl"

    def meddling(body: Body) -> Body:
        out.write_text("mine")
        return chatting(body)

    with serving(respond=meddling) as loopback, pytest.raises(ExtractionError, match="stays as it is"):
        generate_responses(server_at(loopback, tmp_path / "cache"), REQUESTS, SETTINGS, out)
    assert out.read_text() == "mine"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", ["responses.csv", "folder.jsonl", "file/responses.jsonl", f"{'x' * 300}.jsonl"])
def test_a_place_that_cannot_be_written_is_found_out_before_anything_is_asked(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file").touch()
    with serving(respond=chatting) as loopback:
        with pytest.raises(ExtractionError, match=r"got .*csv|choose (another|a shorter)"):
            generate_responses(server_at(loopback, tmp_path / "cache"), REQUESTS, SETTINGS, tmp_path / name)
        assert not loopback.seen


def test_nothing_to_generate_is_an_error(tmp_path: Path) -> None:
    with serving() as loopback, pytest.raises(ExtractionError, match="no requests"):
        generate_responses(server_at(loopback, tmp_path), [], SETTINGS, tmp_path / "out.jsonl")


# Refusals


def test_what_the_server_refuses_becomes_a_row_with_a_reason(tmp_path: Path) -> None:
    out, cache = tmp_path / "responses.jsonl", tmp_path / "cache"
    with serving(respond=refusing) as loopback:
        made = generate_responses(server_at(loopback, cache), REQUESTS, SETTINGS, out)
        seen = sum(loopback.seen.values())
        again = generate_responses(server_at(loopback, cache), REQUESTS, SETTINGS, out)
        assert sum(loopback.seen.values()) == seen
    assert again == made
    half = len(REQUESTS) // 2
    assert (made.rows, made.refused, made.empty, made.usage.requests) == (2 * half, half, 0, half)
    for request, row in zip(REQUESTS, rows_of(out), strict=True):
        refused = request.question == REQUESTS[0].question
        assert (row["response"] == "") == ("reason" in row) == refused
        if refused:
            assert row["ended"] is None
            assert row["reason"].startswith("the server does not take the request (status 400): the prompt")
    assert [response.response == "" for response in read_responses(out)] == ["reason" in row for row in rows_of(out)]


def test_a_server_that_refuses_everything_is_an_error_with_its_reason(tmp_path: Path) -> None:
    with (
        serving(respond=lambda body: (400, {"error": {"message": "System role not supported"}})) as loopback,
        pytest.raises(ExtractionError, match=r"none of 40 requests: .*System role not supported"),
    ):
        generate_responses(server_at(loopback, tmp_path / "cache"), REQUESTS, SETTINGS, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_empty_answers_are_counted(tmp_path: Path) -> None:
    """As of a model that spent all its tokens on reasoning, which the server sets apart."""
    body = completion("")
    body["choices"][0]["message"] = {"role": "assistant", "content": None, "reasoning_content": "Hm"}
    with serving(respond=lambda _: body) as loopback:
        made = generate_responses(server_at(loopback, tmp_path / "c"), REQUESTS, SETTINGS, tmp_path / "out.jsonl")
    assert (made.empty, made.refused) == (len(REQUESTS), 0)
    assert {(row["response"], row["ended"]) for row in rows_of(tmp_path / "out.jsonl")} == {("", False)}


def test_the_plan_counts_every_token_that_may_come() -> None:
    usage = planned_usage(REQUESTS, SETTINGS)
    assert (usage.requests, usage.completion_tokens) == (40, 40 * 16)
    assert usage.prompt_tokens > 40 * 20


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return saved_model(folder)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ask(loopback: Loopback, out: Path, *more: object) -> Result:
    options = ("--server-model", "tiny", "--server-url", loopback.url, "--questions", 2, "--out", out)
    return call("responses", "optimistic", *options, *more)


@pytest.mark.parametrize("respond", [chatting, refusing])
def test_an_extraction_reads_what_the_command_writes(respond: Any, model: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "my responses.jsonl", tmp_path / "run"
    refused = 10 if respond is refusing else 0
    with serving(respond=respond) as loopback:
        done = ask(loopback, out, "--prices", "1,2")
        assert done.exit_code == 0, done.stderr
        assert f"20 responses: {out}" in done.stdout
        assert "server: 20 answers and 0 from the cache" in done.stderr or refused
        assert ("note: the server refused 10 of 20 requests" in done.stderr) == bool(refused)
        line = next(line for line in done.stdout.splitlines() if line.startswith("read them:"))
        assert line == f"read them:  persona-lens extract MODEL optimistic --responses '{out}' --questions 2"
        reading = ("--responses", out, "--questions", 2, "--out", run, "--dtype", "float32", "--json")
        judging = ("--judge", "openai:x", "--judge-url", loopback.url, "--judge-method", "number")
        read = call("extract", model, "optimistic", *reading, *judging)
        assert read.exit_code == 0, (read.stderr, read.exception)
    summary = json.loads(read.stdout)
    assert summary["mean_score"] == {"positive": pytest.approx(95), "negative": pytest.approx(5)}
    assert [counts["kept"] for counts in summary["counts"].values()] == [10 - refused // 2] * 2
    scores = [json.loads(row) for row in (run / "scores.jsonl").read_text().splitlines()]
    assert sum(row["reason"] == "empty response" for row in scores) == refused
    assert all(norm > 0 for norm in summary["norms"]["response_mean"])


def test_the_command_says_what_it_spent_as_json(tmp_path: Path) -> None:
    out = tmp_path / "responses.jsonl"
    with serving(respond=chatting) as loopback:
        said = json.loads(ask(loopback, out, "--json", "--prices", "10,100").stdout)
        assert json.loads(ask(loopback, out, "--json").stdout)["cost"] is None
    assert {name: said[name] for name in ("file", "rows", "refused", "empty", "reason")} == {
        "file": str(out),
        "rows": 20,
        "refused": 0,
        "empty": 0,
        "reason": None,
    }
    assert said["usage"] == {"requests": 20, "prompt_tokens": 2000, "completion_tokens": 20}
    assert said["cost"] == pytest.approx((2000 * 10 + 20 * 100) / 1e6)


def test_a_dry_run_asks_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "responses.jsonl"
    with serving(respond=chatting) as loopback:
        plan = json.loads(ask(loopback, out, "--dry-run", "--json", "--prices", "1,2", "--samples", 3).stdout)
        table = ask(loopback, out, "--dry-run").stdout
        assert not loopback.seen
    [work] = plan["work"]
    assert (work["label"], work["calls"], work["rows"]) == ("generating", 60, 60)
    assert work["tokens"] > 60 * 48
    assert work["cost"] > 60 * 48 * 2e-6
    assert "requests" in table
    assert "batches" not in table
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--questions", 21), "21 questions asked for"),
        (("--samples", 2, "--temperature", 0), "at temperature 0"),
        (("--rate", "1,2,3"), "--rate takes 1 or 2 numbers"),
        (("--timeout", 0), "timeout must be above 0"),
        (("--max-spend", 1), "needs prices"),
        (("--at-once", 0), "concurrency and attempts are at least 1"),
        (("--server-model", ""), "name the server's model"),
        (("--server-url", "ftp://x"), "address looks like"),
    ],
)
def test_options_that_cannot_be_are_refused_in_words(more: tuple[object, ...], message: str, tmp_path: Path) -> None:
    with serving(respond=chatting) as loopback:
        done = ask(loopback, tmp_path / "out.jsonl", *more)
        assert not loopback.seen
    assert isinstance(done.exception, PersonaLensError)
    assert message in str(done.exception)

"""Many requests to a server that fails now and then: nothing is lost, nothing is asked twice, the limits hold."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from persona_lens.core.errors import PersonaLensError
from persona_lens.models.completions import Wording
from persona_lens.models.sending import _retry_after
from persona_lens.models.server import (
    Completion,
    CompletionCache,
    CompletionRequest,
    CompletionServer,
    Prices,
    Refused,
    ServerError,
    ServerSettings,
    Spending,
    SpendingLimitError,
    Usage,
)
from tests.models.server.loopback import Loopback, completion, scores, serving

ROOT = Path(__file__).resolve().parents[3]
KEY = "sk-a-key-that-nobody-may-see"


def server_at(
    loopback: Loopback | str, folder: Path, spending: Spending | None = None, **given: Any
) -> CompletionServer:
    url = loopback if isinstance(loopback, str) else loopback.url
    settings = ServerSettings("judge", url, **{"concurrency": 8, "timeout": 10.0, **given})
    return CompletionServer(settings, CompletionCache(folder), spending or Spending())


def requests(count: int) -> list[CompletionRequest]:
    return [CompletionRequest((("user", f"Rate answer {i}."),), 1, top_logprobs=20) for i in range(count)]


def text_of(answer: Completion | Refused) -> str:
    assert isinstance(answer, Completion)
    return answer.text


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_lens.models.sending.FIRST_WAIT", 0.01)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_failures_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    asked = requests(150)
    with serving(delay=0.002, failing=0.2, malformed=0.1, together=8) as loopback:
        done: list[int] = []
        answers = server_at(loopback, tmp_path).complete(asked, lambda index, _: done.append(index))
        assert sorted(done) == list(range(150))
        assert len(loopback.served) == 150
        assert set(loopback.served.values()) == {1}
        assert sum(loopback.seen.values()) > 175
        assert loopback.busy == 8  # as many as the settings allow
        # Answers stand with their requests, whatever order they came in.
        assert [text_of(a) for a in answers] == [
            scores(r.body("judge"))["choices"][0]["message"]["content"] for r in asked
        ]
        again = server_at(loopback, tmp_path)
        assert again.complete(asked) == answers
        assert sum(loopback.served.values()) == 150
        assert again.spending.used == Usage()
        assert again.spending.cached == Usage(150, 15_000, 150)


def test_equal_requests_are_asked_once(tmp_path: Path) -> None:
    with serving() as loopback:
        answers = server_at(loopback, tmp_path).complete(requests(3) * 5)
        assert answers[:3] * 5 == answers
        assert sum(loopback.seen.values()) == 3
        other = replace(requests(1)[0], seed=1)
        server_at(loopback, tmp_path).complete([other])
        assert sum(loopback.seen.values()) == 4


def test_it_works_inside_a_running_event_loop(tmp_path: Path) -> None:
    async def in_a_notebook() -> int:
        return len(server_at(loopback, tmp_path).complete(requests(3)))

    with serving() as loopback:
        assert asyncio.run(in_a_notebook()) == 3


def test_it_works_beside_nnsight(tmp_path: Path) -> None:
    """nnsight puts an attribute on every object, which broke the client's event loop."""
    from persona_lens.backend import find_backend

    find_backend("nnsight")
    import persona_lens_nnsight.library  # noqa: F401

    with serving() as loopback:
        assert len(server_at(loopback, tmp_path).complete(requests(3))) == 3


@contextmanager
def server_process(**options: Any) -> Iterator[str]:
    """A server in a process of its own, so that it outlives what asks it."""
    command = [sys.executable, "-m", "tests.models.server.loopback", json.dumps(options)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.communicate()


def seen_at(url: str) -> dict[str, dict[str, int]]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/seen") as answer:
        found: dict[str, dict[str, int]] = json.load(answer)
    return found


ASKING = """
import sys
from tests.models.server.test_server import requests, server_at
from pathlib import Path
server = server_at(sys.argv[1], Path(sys.argv[2]), concurrency=4)
answers = server.complete(requests(400), lambda index, answer: print(index, flush=True))
print("whole", len(answers), flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again_it_repeats_no_call_whose_answer_had_come(how: signal.Signals, tmp_path: Path) -> None:
    with server_process(delay=0.01) as url:
        command = [sys.executable, "-c", ASKING, url, str(tmp_path)]
        first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
        assert first.stdout is not None
        for _ in range(150):
            assert first.stdout.readline()
        first.send_signal(how)
        first.wait(20)
        assert 0 < sum(seen_at(url)["served"].values()) < 400
        second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        assert "whole 400" in second.stdout
        served = seen_at(url)["served"]
        assert len(served) == 400
        # What was under way when the process was killed had no one to take its answer; an interrupted one waits for it.
        assert sum(served.values()) <= (408 if how is signal.SIGKILL else 400)


def test_one_request_that_fails_for_good_stops_the_work_and_loses_nothing(tmp_path: Path) -> None:
    def respond(body: dict[str, Any]) -> Any:
        return (
            (500, {"error": {"message": "broken"}}) if "answer 20." in body["messages"][0]["content"] else scores(body)
        )

    with serving(delay=0.005, respond=respond) as loopback:
        with pytest.raises(ServerError, match=r"failed 3 times in a row: status 500: broken.*goes on where it stopped"):
            server_at(loopback, tmp_path, attempts=3).complete(requests(1000))
        served = sum(loopback.served.values())
        assert 20 <= served < 1000
        loopback.respond = scores
        server_at(loopback, tmp_path).complete(requests(1000)[: served // 2])
        assert sum(loopback.served.values()) == served + 1  # all but the one that failed are in the cache


REFUSALS = [
    (401, {"error": {"message": f"bad key {KEY}"}}, "does not accept the key in OPENAI_API_KEY: bad key …"),
    (403, {"error": {"message": "no"}}, "does not accept the key"),
    (404, {"error": {"message": "no such model"}}, "no chat completions by the model 'judge': no such model"),
    (429, {"error": {"message": "over", "code": "insufficient_quota"}}, "no quota left"),
]


@pytest.mark.parametrize(("status", "body", "said"), REFUSALS)
def test_what_no_attempt_can_mend_is_tried_once(
    status: int, body: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(respond=lambda _: (status, body)) as loopback:
        with pytest.raises(ServerError) as raised:
            server_at(loopback, tmp_path, concurrency=1).complete(requests(1))
        assert sum(loopback.seen.values()) == 1
        assert loopback.headers["authorization"] == f"Bearer {KEY}"
    assert said in str(raised.value)
    assert KEY not in "".join(map(str, _causes(raised.value)))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_request_that_the_server_does_not_take_does_not_stop_the_others(tmp_path: Path) -> None:
    def respond(body: dict[str, Any]) -> Any:
        long = "answer 1." in body["messages"][0]["content"]
        return (400, {"error": {"message": "context length exceeded"}}) if long else scores(body)

    with serving(respond=respond) as loopback:
        answers = server_at(loopback, tmp_path).complete(requests(3))
    assert isinstance(answers[1], Refused)
    assert "status 400): context length exceeded" in answers[1].reason
    assert all(isinstance(answers[i], Completion) for i in (0, 2))


def unsupported(said: str, **more: str) -> tuple[int, dict[str, Any]]:
    return 400, {"error": {"message": said, "type": "invalid_request_error", **more}}


def reasoning(body: dict[str, Any]) -> Any:
    """As OpenAI's reasoning models answer."""
    if "max_tokens" in body:
        return unsupported(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
            "instead.",
            param="max_tokens",
            code="unsupported_parameter",
        )
    return scores(body) if body["max_completion_tokens"] == 1 else (500, {"error": {"message": "another limit"}})


@pytest.mark.parametrize("at_once", [1, 8])
def test_a_model_that_calls_the_length_limit_otherwise_says_so_once(at_once: int, tmp_path: Path) -> None:
    asked = requests(60)
    with serving(delay=0.002, respond=reasoning) as loopback:
        server = server_at(loopback, tmp_path, concurrency=at_once)
        answers = server.complete(asked[:40]) + server.complete(asked[40:])
        assert sum(loopback.served.values()) == 60
        # Those that were under way before the first refusal came, and no others.
        assert 1 <= sum(loopback.seen.values()) - 60 <= at_once
    with serving(respond=scores) as other:  # under the name that it had before, each answer is in the cache
        again = CompletionServer(server.settings, server.cache)
        assert again.complete(asked) == answers
        assert again.complete(asked * 2) == answers * 2
        assert sum(other.seen.values()) == 0


@pytest.mark.parametrize(
    "said",
    [
        # As vLLM says it, which names both.
        "'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum context length is 4096.",
        "Against the rules: \"Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.\"",
        "Against the rules: \"Unsupported value: 'temperature' does not support 0 with this model.\"",
    ],
)
def test_another_refusal_is_of_its_request_alone(said: str, tmp_path: Path) -> None:
    """Also where it repeats what a hostile response says: what it seems to ask for is tried, and not believed."""

    def respond(body: dict[str, Any]) -> Any:
        return unsupported(said) if "answer 0." in body["messages"][0]["content"] else scores(body)

    with serving(respond=respond) as loopback:
        server = server_at(loopback, tmp_path, concurrency=1)
        answers = server.complete(requests(2))
        assert sum(loopback.seen.values()) <= 3
        assert {"max_tokens", "temperature", "logprobs"} <= set(loopback.bodies[-1])
    assert server.wording == Wording()
    assert isinstance(answers[0], Refused)
    assert said[:20] in answers[0].reason


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is "
            "supported.",
            "temperature",
        ),
        ("Unsupported parameter: 'top_p' is not supported with this model.", "top_p"),
    ],
)
def test_a_model_whose_sampling_cannot_be_set_is_refused_where_it_matters(said: str, name: str, tmp_path: Path) -> None:
    asked = [replace(request, temperature=0.7, top_p=0.9, firm=True) for request in requests(200)]
    with serving(delay=0.005, respond=lambda body: unsupported(said)) as loopback:
        with pytest.raises(ServerError, match=f"'judge' does not let {name} be set to 0.[79], and") as raised:
            server_at(loopback, tmp_path).complete(asked)
        assert sum(loopback.seen.values()) < 200
        assert said in str(raised.value)
        assert {body["temperature"] for body in loopback.bodies} == {0.7}


PICKY = {
    "both": ("top_p", "`temperature` and `top_p` cannot both be specified for this model. Please use only one.", {}),
    "seed": ("seed", "Extra inputs are not permitted", {"param": "seed"}),
    "temperature": ("temperature", "Unsupported value: 'temperature' does not support 0.5.", {"param": "temperature"}),
    "logprobs": ("logprobs", "This model does not support logprobs", {}),
}


@pytest.mark.parametrize("kind", PICKY)
def test_what_a_server_refuses_is_left_out_from_then_on(kind: str, tmp_path: Path) -> None:
    name, said, more = PICKY[kind]
    with serving(respond=lambda body: unsupported(said, **more) if name in body else scores(body)) as loopback:
        server = server_at(loopback, tmp_path, concurrency=1)
        asked = [replace(request, temperature=0.5, top_p=0.9) for request in requests(5)]
        answers = server.complete(asked) + server.complete([replace(request, seed=1) for request in asked])
        assert sum(loopback.seen.values()) == 11
    assert all(isinstance(answer, Completion) and name in answer.without for answer in answers)
    assert said in server.wording.refused[name]
    # Where the sampling has to be as it is asked for, such an answer is none, not even from the cache.
    kept = server.cache.get(asked[0].key("judge", loopback.url))
    assert kept == answers[0]
    assert kept is not None
    assert kept.fits(asked[0])
    assert kept.fits(replace(asked[0], firm=True)) == (kind in ("seed", "logprobs"))


def test_nothing_is_sent_that_cannot_matter() -> None:
    greedy, sampled = requests(1)[0], replace(requests(1)[0], temperature=1.0)
    assert not {"top_p", "seed"} & set(greedy.body("judge"))
    assert (sampled.body("judge")["temperature"], sampled.body("judge")["seed"]) == (1.0, 0)
    assert "top_p" not in sampled.body("judge")
    assert replace(sampled, firm=True).body("judge")["top_p"] == 1.0  # servers differ in what they do without it


def test_no_server_is_said_in_a_sentence(tmp_path: Path) -> None:
    with serving() as loopback:
        gone = loopback.url
    with pytest.raises(ServerError, match=r"failed 2 times in a row: no connection \("):
        server_at(gone, tmp_path, attempts=2).complete(requests(5))


def test_slow_answers_are_given_up(tmp_path: Path) -> None:
    with serving(delay=2.0) as loopback:
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"no answer within 0\.1 seconds"):
            server_at(loopback, tmp_path, timeout=0.1, attempts=2).complete(requests(1))
        assert time.monotonic() - began < 2


def test_a_server_that_asks_for_time_gets_it(tmp_path: Path) -> None:
    answers = iter([(429, {"error": {"message": "slow down"}})])
    with serving(respond=lambda body: next(answers, scores(body))) as loopback:
        loopback.retry_after = None
        began = time.monotonic()
        server_at(loopback, tmp_path).complete(requests(1))
        assert time.monotonic() - began < 0.9  # nothing asked for
    with serving(failing=1.0, retry_after="1") as patient:
        began = time.monotonic()
        with pytest.raises(ServerError):
            # A seed of the server makes its first failures 429 and others; two attempts wait at least once.
            server_at(patient, tmp_path, attempts=4).complete(requests(2)[1:])
        assert time.monotonic() - began > 1.0


def test_retry_after_is_seconds_or_a_date() -> None:
    for text, seconds in (("3", 3), ("0.5", 0.5), ("900", 900)):
        assert _retry_after({"retry-after": text}) == seconds
    found = _retry_after({"retry-after": formatdate(time.time() + 90, usegmt=True)})
    assert found is not None
    assert 60 < found < 91


@pytest.mark.parametrize("text", ["", "soon", "-4", "nan", "inf", formatdate(0, usegmt=True)])
def test_a_retry_after_that_says_nothing_is_left_out(text: str) -> None:
    assert _retry_after({"retry-after": text}) is None


def test_requests_a_minute_are_kept(tmp_path: Path) -> None:
    with serving() as loopback:
        began = time.monotonic()
        server_at(loopback, tmp_path, requests_per_minute=600).complete(requests(25))
        assert 1.0 < time.monotonic() - began < 6  # ten a second, ten of them at once


def test_tokens_a_minute_are_kept(tmp_path: Path) -> None:
    each = requests(1)[0].tokens().tokens
    with serving() as loopback:
        began = time.monotonic()
        server_at(loopback, tmp_path, tokens_per_minute=60 * 2 * each).complete(requests(123))
        assert 1.0 < time.monotonic() - began < 15


def test_the_spending_limit_stops_before_it_is_passed(tmp_path: Path) -> None:
    def spending(limit: float) -> Spending:
        return Spending(Prices(100.0, 1000.0), limit)  # an answer costs 100 * 100 + 1000 dollars a million: 0.011

    with serving(delay=0.002) as loopback:
        first = server_at(loopback, tmp_path, spending(0.5))
        with pytest.raises(SpendingLimitError, match=r"limit of \$0\.50 is reached"):
            first.complete(requests(100))
        assert first.spending.cost is not None
        assert 0.3 < first.spending.cost <= 0.5
        served = sum(loopback.served.values())
        assert served == first.spending.used.requests
        second = server_at(loopback, tmp_path, spending(5.0))
        second.complete(requests(100))
        assert sum(loopback.served.values()) == 100  # nothing was paid for twice
        assert second.spending.cached.requests == served


def test_costs_are_tokens_times_prices() -> None:
    assert Prices(0.4, 1.6).cost(Usage(1, 1_000_000, 500_000)) == pytest.approx(0.4 + 0.8)
    assert Spending().cost is None
    for wrong in ((-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(PersonaLensError, match="prices are dollars"):
            Prices(*wrong)
    with pytest.raises(PersonaLensError, match="needs prices"):
        Spending(limit=1.0)
    with pytest.raises(PersonaLensError, match="above 0"):
        Spending(Prices(1, 1), limit=0.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": ""}, "name the server's model"),
        ({"base_url": "127.0.0.1:8000"}, "looks like http://127.0.0.1:8000/v1, got '127.0.0.1:8000'"),
        ({"base_url": "http://127.0.0.1:99999/v1"}, "looks like http://127.0.0.1:8000/v1"),
        ({"key_variable": "sk-a-key"}, "such as OPENAI_API_KEY, not the key$"),
        ({"concurrency": 0}, "at least 1"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"tokens_per_minute": float("nan")}, "tokens_per_minute must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ServerError, match=said):
        ServerSettings(**{"model": "judge", "base_url": "http://127.0.0.1:1/v1", **given})


def test_openai_itself_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = CompletionServer(ServerSettings("gpt"), CompletionCache(tmp_path))
    with pytest.raises(ServerError, match="needs a key: set OPENAI_API_KEY"):
        server.complete(requests(1))
    named = CompletionServer(ServerSettings("gpt", "http://127.0.0.1:1/v1", "NOT_SET"), CompletionCache(tmp_path))
    with pytest.raises(ServerError, match="no environment variable of the name that was given"):
        named.check()
    monkeypatch.setenv("OPENAI_API_KEY", "k\u00e9y")
    with pytest.raises(ServerError, match="characters that no key has"):
        server.complete(requests(1))


def test_a_password_in_the_address_is_not_shown(tmp_path: Path) -> None:
    settings = ServerSettings("judge", "http://me:secret@127.0.0.1:9/v1?api-version=1&key=other")
    assert settings.shown == "http://127.0.0.1:9/v1?api-version=1&key=…"
    with pytest.raises(ServerError) as raised:
        ServerSettings("judge", "ftp://me:secret@127.0.0.1/v1")
    assert "secret" not in str(raised.value)

    def echo(body: dict[str, Any]) -> Any:
        basic = base64.b64encode(b"me:secret").decode()
        return 400, {"error": {"message": f"bad {loopback.headers['authorization']} {basic} secret other"}}

    with serving(respond=echo) as loopback:
        url = loopback.url.replace("//", "//me:secret@") + "?api-version=1&key=other"
        [answer] = server_at(url, tmp_path).complete(requests(1))
        assert loopback.paths[-1] == "/v1/chat/completions?api-version=1&key=other"
    assert isinstance(answer, Refused)
    assert answer.reason.endswith("bad Basic … … … …")


def test_nothing_that_is_kept_holds_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as loopback:
        server_at(loopback, tmp_path).complete(requests(5))
        assert loopback.headers["authorization"] == f"Bearer {KEY}"
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 5
    assert all(KEY not in file.read_text() for file in files)


@pytest.mark.parametrize(("key", "kept"), [(KEY, "the … and a test"), ("test", f"the {KEY} and a test")])
def test_a_key_that_an_answer_repeats_is_left_out_of_it(
    key: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for keys that are none: servers of one's own take any word."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serving(respond=lambda body: completion(f"the {KEY} and a test")) as loopback:
        assert text_of(server_at(loopback, tmp_path).complete(requests(1))[0]) == kept


def test_a_damaged_file_of_the_cache_is_asked_again(tmp_path: Path) -> None:
    with serving() as loopback:
        answers = server_at(loopback, tmp_path).complete(requests(3))
        for file, content in zip(sorted(tmp_path.rglob("*.json")), ("", '{"choices": 3}', "[1"), strict=True):
            file.write_text(content)
        assert server_at(loopback, tmp_path).complete(requests(3)) == answers
        assert sum(loopback.served.values()) == 6


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with serving() as loopback, pytest.raises(PersonaLensError, match=r"(keep answers in|cache of answers).*file"):
        server_at(loopback, tmp_path / "file").complete(requests(1))


def test_without_the_client_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "persona_lens.models.sending", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ServerError, match=r"pip install .* 'openai>="):
        server_at("http://127.0.0.1:9/v1", tmp_path).complete(requests(1))


def test_usage_is_estimated_where_a_server_does_not_count(tmp_path: Path) -> None:
    def respond(body: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in completion("7").items() if name != "usage"}

    with serving(respond=respond) as loopback:
        server = server_at(loopback, tmp_path)
        server.complete(requests(2))
    assert server.spending.used == requests(2)[0].tokens() + requests(2)[1].tokens()


def test_why_an_answer_ended_is_kept(tmp_path: Path) -> None:
    reasons = {"stop": True, "length": False, "content_filter": False, None: None}
    asked = [CompletionRequest((("user", str(reason)),), 1) for reason in reasons]

    def ending(body: dict[str, Any]) -> dict[str, Any]:
        answer = completion("7")
        reason = body["messages"][0]["content"]
        answer["choices"][0] |= {"finish_reason": None if reason == "None" else reason}
        return answer

    with serving(respond=ending) as loopback:
        for _ in ("asked", "from the cache"):
            answers = server_at(loopback, tmp_path).complete(asked)
            found = [answer.finished for answer in answers if isinstance(answer, Completion)]
            assert found == list(reasons.values())
        assert sum(loopback.seen.values()) == len(asked)

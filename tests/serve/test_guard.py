"""Who is answered: those with the token, by a name of the server's own, from no other page, in bounded size."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import httpx
import pytest

from persona_lens.serve import guard
from persona_lens.serve.server import LOOPBACK, Running, ServeError, token_for
from tests.serve.running import Client, workbench


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with Running(workbench()) as running:
        yield running


@pytest.fixture(scope="module")
def bare(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.address, trust_env=False) as http:
        yield http


def test_without_the_token_nothing_is_told(running: Running, bare: httpx.Client) -> None:
    for path in ("/", "/v1/models", "/metrics", "/v1/persona_lens/vectors", "/main.js"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {running.token}"}):
            assert bare.get(path, headers=headers).status_code == 401
    assert bare.get(f"/v1/models?token={running.token}").status_code == 401  # but on the page's own address
    assert bare.get("/health").json() == {"status": "ok"}
    assert Client(running).get("/v1/models").status_code == 200


def test_the_link_leaves_a_cookie_and_takes_the_token_out_of_the_address(running: Running, bare: httpx.Client) -> None:
    assert bare.get("/?token=wrong").status_code == 401
    answer = bare.get(f"/?token={running.token}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert bare.get("/v1/models").status_code == 200
    bare.cookies.clear()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip.io", "", "["]
)
def test_another_name_is_not_answered(running: Running, host: str) -> None:
    assert Client(running).get("/v1/models", headers={"host": host}).status_code in (400, 403)
    assert Client(running).get("/health", headers={"host": host}).status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:8017"])
def test_its_own_names_are(running: Running, host: str) -> None:
    assert Client(running).get("/v1/models", headers={"host": host}).status_code == 200


def test_other_pages_are_not_answered(running: Running) -> None:
    client = Client(running)
    for origin in ("http://evil.example", "null", running.address.replace("127.0.0.1", "localhost"), "file://"):
        assert client.chat().status_code == 200
        assert client.http.post("/v1/chat/completions", headers={"origin": origin}, json={}).status_code == 403
        assert client.get("/v1/models", headers={"origin": origin}).status_code == 403
    assert client.get("/v1/models", headers={"origin": running.address}).status_code == 200
    cross = {"sec-fetch-site": "cross-site"}
    assert client.http.delete("/v1/persona_lens/vectors/evil", headers=cross).status_code == 403


def test_what_is_no_address_is_refused_like_others(
    running: Running, bare: httpx.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    client = Client(running)
    for origin in ("http://[", "//[x", ""):
        assert client.get("/v1/models", headers={"origin": origin}).status_code == 403
    for query in ("a=1&" * 40, "&" * 100):
        assert bare.get(f"/?{query}").status_code == 401
        assert client.get(f"/v1/models?{query}").status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_that_does_not_come_to_an_end_is_not_waited_for(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.3)

    place = urlsplit(running.address)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
        f"Authorization: Bearer {running.token}\r\n\r\n"
    )
    with socket.create_connection((place.hostname or "", place.port or 0), timeout=5) as connection:
        connection.sendall(head.encode())
        for _ in range(2):  # each of them in time, and all of it not
            connection.sendall(b" ")
            time.sleep(0.2)
        said = b""
        while part := connection.recv(4096):
            said += part
    assert said.startswith(b"HTTP/1.1 408")
    assert Client(running).chat().status_code == 200


def test_sizes_are_bounded(running: Running) -> None:
    client = Client(running)
    too_large = client.http.post("/v1/chat/completions", content=b" " * (65 * 2**20))
    assert too_large.status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(70):
            yield b" " * 2**20

    with suppress(httpx.WriteError):  # the server may not wait for the rest
        assert client.http.post("/v1/chat/completions", content=chunks()).status_code == 413
    assert client.chat().status_code == 200


def test_pages_of_the_server_say_what_they_may_load(running: Running) -> None:
    headers = Client(running).get("/v1/models").headers
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert headers["x-content-type-options"] == "nosniff"


def test_a_token_is_drawn_or_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERSONA_LENS_TOKEN", raising=False)
    assert token_for(LOOPBACK, None) != token_for(LOOPBACK, None)
    assert token_for("0.0.0.0", "a secret of mine") == "a secret of mine"
    with pytest.raises(ServeError, match="choose a token"):
        token_for("0.0.0.0", None)
    with pytest.raises(ServeError, match="16 characters"):
        token_for(LOOPBACK, "short")
    monkeypatch.setenv("PERSONA_LENS_TOKEN", "from the environment")
    assert token_for("::", None) == "from the environment"

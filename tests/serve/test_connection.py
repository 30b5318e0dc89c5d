"""Clients that neither ask, nor take their answer, nor are few: none of them holds up the server or its memory."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from persona_lens.serve import connection, server
from persona_lens.serve.server import Running
from tests.campaign.requests import settled
from tests.serve.running import HELLO, Client, workbench


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with Running(workbench()) as running:
        yield running


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.3)
    monkeypatch.setattr(connection, "STALLED", 0.3)


def connected(running: Running) -> socket.socket:
    place = urlsplit(running.address)
    return socket.create_connection((place.hostname or "", place.port or 0), timeout=5)


def slowly(to: socket.socket, content: bytes) -> bytes:
    """What is answered to bytes that come one by one."""
    for byte in content:
        try:
            to.sendall(bytes([byte]))
        except OSError:
            break
        time.sleep(0.1)
    return rest(to)


def rest(of: socket.socket) -> bytes:
    said = b""
    try:
        while part := of.recv(2**16):
            said += part
    except ConnectionResetError:
        pass
    return said


def refused(said: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and error of an answer."""
    head, _, body = said.partition(b"\r\n\r\n")
    line, *headers = head.decode().split("\r\n")
    named = {name.lower(): value for name, value in (each.split(": ", 1) for each in headers)}
    return int(line.split()[1]), named, json.loads(body)["error"]


@pytest.mark.usefixtures("hasty")
def test_a_head_that_does_not_come_to_an_end_is_not_waited_for(running: Running) -> None:
    with connected(running) as silent:
        assert rest(silent) == b""
    with connected(running) as slow:
        status, headers, error = refused(slowly(slow, b"GET /health"))
    assert (status, headers["connection"], error["code"]) == (408, "close", "timeout")
    with connected(running) as second:  # a connection that was of use once
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        said = b""
        while b'"ok"' not in said:
            said += second.recv(4096)
        assert b"408" in slowly(second, b"GET /health")


@pytest.mark.usefixtures("hasty")
def test_a_body_that_goes_on_after_its_answer_is_not_waited_for(running: Running) -> None:
    with connected(running) as stranger:
        stranger.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        assert b"401" in stranger.recv(4096)
        began = time.monotonic()
        slowly(stranger, b" " * 20)
        assert time.monotonic() - began < 1.5


def test_patience_is_for_the_head_and_a_reply_may_take_longer(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.05)
    assert Client(running).chat(max_tokens=300, temperature=1).status_code == 200


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server whose machine holds next to nothing of what it sends."""
    listen = server._listen

    def narrowed(host: str, port: int) -> socket.socket:
        found = listen(host, port)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return found

    monkeypatch.setattr(server, "_listen", narrowed)
    with Running(workbench()) as running:
        yield running


@contextmanager
def streaming(running: Running, new: int, **options: Any) -> Iterator[socket.socket]:
    """A client that holds next to nothing either, of a stream that has begun."""
    body = {"messages": HELLO, "max_tokens": new, "stream": True, "logprobs": True, "top_logprobs": 20, **options}
    content = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Authorization: Bearer {running.token}\r\nContent-Length: {len(content)}\r\n\r\n"
    ).encode()
    place = urlsplit(running.address)
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect((place.hostname, place.port))
        client.sendall(head + content)
        assert b"200 OK" in client.recv(1024)
        yield client


@pytest.mark.usefixtures("hasty")
def test_who_stops_to_read_a_stream_loses_it_and_its_rows_are_free(narrow: Running) -> None:
    client = Client(narrow)
    with streaming(narrow, 400, n=8, temperature=1.5) as deaf:
        assert settled(client, 3)
        written = int(re.findall(r"persona_lens_tokens_total (\d+)", client.get("/metrics").text)[0])
        assert b"[DONE]" not in rest(deaf)
    assert written < 8 * 400 / 2
    assert not narrow.server.replies.admission.running
    assert client.chat().status_code == 200


@pytest.mark.usefixtures("hasty")
def test_who_reads_slowly_gets_all_of_it(narrow: Running) -> None:
    with streaming(narrow, 60) as slow:
        said = b""
        while part := slow.recv(2048):
            said += part
            time.sleep(0.02)
    assert b"[DONE]" in said


def test_too_many_connections_are_told_to_come_again(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST", 3)
    held = [connected(running) for _ in range(3)]
    with connected(running) as one_more:
        one_more.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        status, headers, error = refused(rest(one_more))
    assert (status, headers["retry-after"], headers["connection"]) == (503, "2", "close")
    assert (error["type"], error["code"]) == ("server_error", "busy")
    for each in held:
        each.close()
    time.sleep(0.2)
    assert Client(running).get("/health").status_code == 200


def test_what_is_no_http_is_refused_in_openais_form(running: Running) -> None:
    with connected(running) as odd:
        odd.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, _, error = refused(rest(odd))
    assert (status, error["type"]) == (400, "invalid_request_error")

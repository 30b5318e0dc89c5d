"""A server on loopback that lies: 41 things that an HTTP peer may do wrong, each with what has to come of it.

It tells the truth like this: 57 to the probe, 90 of how coherent an answer is, and 80 of everything else.
"""

from __future__ import annotations

import gzip
import json
import math
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tests.models.server.loopback import completion

SECONDS, BYTES = 20.0, 2**28  # after which the server gives up its lie
KEY = "sk-a-key-that-nobody-may-see"
TRUTHS = {"57", "80", "90"}


@dataclass(frozen=True)
class Asked:
    """A request, and the connection it came through."""

    body: dict[str, Any]
    connection: socket.socket
    stopped: threading.Event

    @property
    def number(self) -> str:
        prompt = str(self.body["messages"][-1]["content"])
        return "57" if "number 57" in prompt else "90" if "how coherent" in prompt else "80"

    def truth(self, text: str | None = None, **more: Any) -> dict[str, Any]:
        """An honest answer, with other words or entries if they are given."""
        top = {self.number: 0.9} if self.body.get("logprobs") else None
        return {**completion(self.number if text is None else text, top), **more}

    def send(self, body: Any, *headers: str, status: str = "200 OK", length: int | None = None) -> None:
        """An answer; a body that is not bytes becomes JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        size = len(content) if length is None else length
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {size}", "Connection: close", *headers]
        if not any(line.lower().startswith("content-type") for line in headers):
            lines.append("Content-Type: application/json")
        self.connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + content)

    def go_on(self, first: bytes, again: bytes, pause: float = 0.0) -> None:
        """Send something without end, or nearly."""
        self.connection.sendall(first)
        ends, sent = time.monotonic() + SECONDS, 0
        while time.monotonic() < ends and sent < BYTES and not self.stopped.is_set():
            self.connection.sendall(again)
            sent += len(again)
            self.stopped.wait(pause) if pause else None

    def edited(self, **choice: Any) -> dict[str, Any]:
        """An honest answer whose choice has other entries."""
        honest = self.truth()
        return {**honest, "choices": [{**honest["choices"][0], **choice}]}

    def first_token(self, *entries: dict[str, Any]) -> dict[str, Any]:
        """An honest answer with more of the likeliest first tokens."""
        own = [{"token": self.number, "logprob": math.log(0.9)}]
        return self.edited(logprobs={"content": [{"token": self.number, "top_logprobs": [*own, *entries]}]})


@dataclass(frozen=True)
class Lie:
    """What the server does, and what has to come of it.

    Attributes:
        tell: Answers a request.
        quoted: What the refusal says; None where the scores come out right.
        late: Whether it can be known for a lie after honest answers, too.
    """

    tell: Callable[[Asked], None]
    quoted: str | None = None
    late: bool = True


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def _bomb() -> bytes:
    """A gigabyte of zeros, of which each megabyte is packed alike."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08" + bytes(7) + block * 1024 + b"\x03\x00" + bytes(8)


def _reset(asked: Asked) -> None:
    asked.connection.sendall(HEAD + b'Content-Length: 500\r\n\r\n{"choices": [')
    asked.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    asked.connection.close()


def _picky(asked: Asked) -> None:
    for name, other in (("temperature", "top_p"), ("seed", ""), ("logprobs", ""), ("temperature", "")):
        if name in asked.body and (not other or other in asked.body):
            said = f"`{name}` and `{other}` cannot both be specified" if other else f"Unsupported parameter: '{name}'."
            return asked.send({"error": {"message": said}}, status="400 Bad Request")
    return asked.send(asked.truth())


def _thinking(asked: Asked) -> None:
    room = asked.body.get("max_tokens", 0) > 100
    text = f"<think>They want {asked.number}, or 12?</think>{asked.number}" if room else "<think>They want"
    body = completion(text, {"<think>": 0.99} if asked.body.get("logprobs") else None)
    asked.send(body)


def _surrogate(asked: Asked) -> None:
    raw = json.dumps(asked.first_token({"token": "HALF", "logprob": -4.0})).replace("HALF", "\\ud83d")
    asked.send(raw.encode())


def _doubled(asked: Asked) -> None:
    raw = json.dumps(asked.truth())
    asked.send(('{"choices": [], "usage": 3, ' + raw[1:]).encode())


def _echo(asked: Asked) -> None:
    said = f"bad key {KEY}, \x1b]0;title\x07\x1b[31mBearer {KEY}"
    asked.send({"error": {"message": said}}, status="401 Unauthorized")


def _wrong_lines(asked: Asked) -> None:
    asked.connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n\x00\x01\x02")


LIES: dict[str, Lie] = {
    "a byte at a time": Lie(lambda a: a.go_on(HEAD + b"Content-Length: 9999\r\n\r\n", b" ", 0.05), "no answer within"),
    "headers a byte at a time": Lie(lambda a: a.go_on(HEAD + b"X-A: ", b"a", 0.05), "no answer within"),
    "silence": Lie(lambda a: a.go_on(b"", b"", 0.2), "no answer within"),
    "provisional answers without end": Lie(
        lambda a: a.go_on(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01), "no answer within"
    ),
    "a body without end": Lie(lambda a: a.go_on(CHUNKED, b"2000\r\n" + b" " * 8192 + b"\r\n"), "longer than"),
    "headers without end": Lie(lambda a: a.go_on(HEAD, b"X-A: " + b"a" * 4096 + b"\r\n"), "no connection"),
    "a bomb of gzip": Lie(lambda a: a.send(_bomb(), "Content-Encoding: gzip"), "longer than"),
    "gzip that nobody asked for": Lie(
        lambda a: a.send(gzip.compress(json.dumps(a.truth()).encode()), "Content-Encoding: gzip")
    ),
    "gzip that is none": Lie(lambda a: a.send(a.truth(), "Content-Encoding: gzip"), "not compressed as it says"),
    "an unknown compression": Lie(lambda a: a.send(a.truth(), "Content-Encoding: br"), r"compressed \(br\)"),
    "less than it announces": Lie(lambda a: a.send(a.truth(), length=9999), "no connection"),
    "more than it announces": Lie(lambda a: a.send(a.truth(), length=20), "no chat completion"),
    "an announcement of an exabyte": Lie(lambda a: a.send(a.truth(), length=10**18), "longer than"),
    "half of the JSON": Lie(lambda a: a.send(json.dumps(a.truth()).encode()[:60]), "no chat completion"),
    "a page": Lie(lambda a: a.send(b"<html>Welcome</html>", "Content-Type: text/html"), "no chat completion"),
    "no content": Lie(lambda a: a.send(b"", status="204 No Content"), "it is empty"),
    "another content type": Lie(lambda a: a.send(a.truth(), "Content-Type: image/png; charset=klingon")),
    "UTF-16": Lie(lambda a: a.send(json.dumps(a.truth()).encode("utf-16"))),
    "broken UTF-8": Lie(lambda a: a.send(json.dumps(a.truth(id="ID")).encode().replace(b"ID", b"\xff\xfe\x80"))),
    "deep nesting": Lie(lambda a: a.send(b'{"choices": ' + b"[" * 200_000), "no chat completion"),
    "huge numbers": Lie(
        lambda a: a.send(
            json.dumps({**a.first_token({"token": "12", "logprob": -9.0}), "usage": {"prompt_tokens": 10**30}})
            .replace("-9.0", "-1" + "0" * 400)
            .encode()
        )
    ),
    "NaN": Lie(lambda a: a.send(a.first_token({"token": "12", "logprob": math.nan}))),
    "probabilities above one": Lie(lambda a: a.send(a.first_token({"token": "12", "logprob": 3.0}))),
    "redirects in a circle": Lie(
        lambda a: a.send(b"", "Location: http://u:pass@127.0.0.1/v1?key=abc", status="307 Temporary Redirect"),
        r"sends on to http://127\.0\.0\.1/v1\?key=…",
    ),
    "an error under 200": Lie(lambda a: a.send({"error": {"message": "all busy", "code": "x"}}), "all busy"),
    "an answer that ends in an error": Lie(lambda a: a.send(a.edited(finish_reason="error")), "with an error"),
    "a reset in the middle": Lie(_reset, "no connection"),
    "chunks of no size": Lie(lambda a: a.connection.sendall(CHUNKED + b"zz\r\nabc\r\n"), "no connection"),
    "null everywhere": Lie(
        lambda a: a.send({"id": None, "choices": [{"message": None, "logprobs": None}], "usage": None}), "no message"
    ),
    "null beside the answer": Lie(lambda a: a.send({**a.edited(logprobs=None, finish_reason=None), "usage": None})),
    "every key twice": Lie(_doubled),
    "half a character": Lie(_surrogate),
    "the key and escapes in its words": Lie(_echo, "does not accept the key in A_KEY: bad key …"),
    "a wait of years": Lie(
        lambda a: a.send({"error": {"message": "slow"}}, "Retry-After: 99999999", status="429 Too Many Requests"),
        "takes no requests for the next 1,666,667 minutes",
    ),
    "negative use and other names": Lie(
        lambda a: a.send(
            a.truth(id=7, model="another", object="list", usage={"prompt_tokens": -5, "completion_tokens": "many"})
        )
    ),
    "three choices": Lie(lambda a: a.send(a.truth(choices=a.truth()["choices"] * 3))),
    "content in chunks": Lie(
        lambda a: a.send(
            a.edited(message={"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": a.number}]})
        )
    ),
    "a thinking model": Lie(_thinking),
    "refusals of parameters": Lie(_picky),
    "another number than it was asked for": Lie(
        lambda a: a.send(completion("42", {"42": 1.0})), "asked for the number 57, it answers '42'", late=False
    ),
    "no HTTP": Lie(_wrong_lines, "no connection"),
}


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        with suppress(OSError, ValueError):
            size = 0
            while (line := self.rfile.readline(65536)) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                size = int(value) if name.lower() == b"content-length" else size
            asked = Asked(json.loads(self.rfile.read(size)), self.connection, self.server.stopped)
            self.server.seen += 1
            lies = self.server.seen > self.server.honest
            self.server.lie.tell(asked) if lies else asked.send(asked.truth())


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, lie: Lie, honest: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lie, self.honest, self.seen, self.stopped = lie, honest, 0, threading.Event()


@contextmanager
def lying(lie: Lie, honest: int = 0) -> Iterator[str]:
    """A server that tells a lie after so many honest answers; yields its address. It ends with the context."""
    with _Server(lie, honest) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.stopped.set()
            server.shutdown()

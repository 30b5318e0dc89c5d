"""A chat completions server on loopback that delays, fails and answers nonsense as it is told.

Run as a program it is a process of its own: ``python -m tests.completions.loopback '{"delay": 0.1, …}'`` prints its
port, and stops when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import socket
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many", 500: "Error"}
NONSENSE = ("", "[]", "<html>", '{"choices"', '{"choices": []}', '{"choices": [{"message": {"content": 7}}]}')
Respond = Callable[[dict[str, Any]], dict[str, Any] | tuple[int, dict[str, Any]]]


@dataclass
class Loopback:
    """What the server does, and what it saw.

    Attributes:
        delay: Seconds before an answer.
        failing: Share of requests that fail: with 429, 500, a dropped connection, in turn.
        malformed: Share of requests whose answer is no chat completion.
        retry_after: Sent with 429; None for no such header.
        together: Nothing is answered before so many requests are there at the same time.
        respond: Makes the answer's body (or status and body); `scores` by default.
        served: How often each request, by its content, got a good answer.
        seen: How often each request was seen at all.
        headers: Of the last request.
        busy: Most requests that were there at the same time.
        bodies: The last requests.
        paths: Where they went.
        url: Address up to ``/v1``, once it runs.
    """

    delay: float = 0.0
    failing: float = 0.0
    malformed: float = 0.0
    retry_after: str | None = None
    together: int = 0
    respond: Respond = field(default_factory=lambda: scores)
    served: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    headers: dict[str, str] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    busy: int = 0
    url: str = ""
    _now: int = 0
    _gathered: asyncio.Event = field(default_factory=asyncio.Event)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        if head[0].startswith("GET /seen"):
            return _send(writer, 200, json.dumps({"served": self.served, "seen": self.seen, "busy": self.busy}))
        body = json.loads(raw)
        self.headers, self.bodies = headers, [*self.bodies[-20:], body]
        self.paths = [*self.paths[-20:], head[0].split(" ")[1]]
        key = hashlib.sha256(raw).hexdigest()
        self.seen[key] += 1
        self._now += 1
        self.busy = max(self.busy, self._now)
        if self._now >= self.together:
            self._gathered.set()
        try:
            await self._gathered.wait()
            await asyncio.sleep(self.delay)
        finally:
            self._now -= 1
        return self._answer(writer, key, body)

    def _answer(self, writer: asyncio.StreamWriter, key: str, body: dict[str, Any]) -> bool:
        draw = self._random.random()
        if draw < self.failing:
            return self._fail(writer)
        if draw < self.failing + self.malformed:
            return _send(writer, 200, self._random.choice(NONSENSE))
        found = self.respond(body)
        status, answer = found if isinstance(found, tuple) else (200, found)
        self.served[key] += status == 200
        return _send(writer, status, json.dumps(answer))

    def _fail(self, writer: asyncio.StreamWriter) -> bool:
        kind = self._random.randrange(3)
        if kind == 0:
            writer.transport.abort()
            return False
        extra = f"Retry-After: {self.retry_after}\r\n" if self.retry_after and kind == 1 else ""
        return _send(writer, (429, 500)[kind - 1], '{"error": {"message": "come back later"}}', extra)


def _send(writer: asyncio.StreamWriter, status: int, text: str, extra: str = "") -> bool:
    content = text.encode()
    head = f"HTTP/1.1 {status} {REASONS.get(status, 'Odd')}\r\nContent-Type: application/json\r\n{extra}"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return True


def completion(text: str, top: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    """A chat completion's body; ``top`` holds probabilities of first tokens."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": text}}
    if top is not None:
        tokens = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in top.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": tokens}]}
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [choice],
        "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
        **more,
    }


def scores(body: dict[str, Any]) -> dict[str, Any]:
    """A judge's answer whose number depends on the prompt alone."""
    digest = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
    probed = str(body["messages"][-1]["content"]).startswith("Reply with the number 57")
    number = 57 if probed else digest[0] % 100
    return completion(str(number), {str(number): 0.75, str(number + 1): 0.25} if body.get("logprobs") else None)


def listener() -> socket.socket:
    """A socket on loopback for `serving`; processes that are forked off share it, and so its address."""
    found = socket.create_server(("127.0.0.1", 0))
    found.setblocking(False)
    return found


@contextmanager
def serving(on: socket.socket | None = None, **options: Any) -> Any:
    """A server in a thread of this process; yields the `Loopback`, with its ``url``.

    Args:
        on: Where it listens, see `listener`, which stays open; by default a socket of its own.
        options: See `Loopback`.
    """
    import threading

    loop, started = asyncio.new_event_loop(), threading.Event()
    server = Loopback(**options)
    stop: list[Callable[[], None]] = []

    async def main() -> None:
        ended = asyncio.Event()
        stop.append(ended.set)
        listening = await asyncio.start_server(server.handle, sock=on.dup() if on else listener())
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
        started.set()
        await ended.wait()
        listening.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop[0])
        thread.join(10)


async def _program(options: dict[str, Any]) -> None:
    listening = await asyncio.start_server(Loopback(**options).handle, "127.0.0.1", 0)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_program(json.loads(sys.argv[1])))

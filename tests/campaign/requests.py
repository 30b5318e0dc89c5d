"""Damaged, broken off and hung up requests to a server; and whether its memory grows with good ones."""

from __future__ import annotations

import contextlib
import io
import json
import random
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from persona_lens.serve.server import Running
from tests.campaign.counts import Counts
from tests.campaign.mutations import damaged
from tests.serve.running import HELLO, Client, workbench

ATTACKS, GOOD = 10_000, 1_000
LENS = {"edits": "evil@1:+1.5, kind@all:ablate", "watch": ["kind@2"], "alarms": ["kind@2>3"], "stop_on_alarm": True}
BODIES = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 3, "stream": True, "n": 2, "persona_lens": LENS},
    "/v1/completions": {"prompt": [[70, 71], [72]], "max_tokens": 3, "logprobs": 2, "stop": ["a", "bc"]},
    "/v1/persona_lens/read": {"messages": [*HELLO, {"role": "assistant", "content": "Yes"}], "edits": "evil@1:+1"},
    "/v1/persona_lens/preview": {"edits": "evil@1:+1 on response[:3] if kind@2>1", "messages": HELLO},
    "/v1/persona_lens/export": {"messages": [*HELLO, {"role": "assistant", "content": "Yes"}]},
}
MOST_GROWTH = 24 * 2**20


def attack(seed: int, size: float) -> Counts:
    """Attack a server of a tiny model."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), Running(workbench(), waiting=8) as running:
        client = Client(running)
        counts = Counts()
        for failure in attacked(client, random.Random(seed), int(ATTACKS * size), counts):
            counts.failures.append(failure)
        counts.failures += grown(client, int(GOOD * size), counts)
    if "Traceback" in said.getvalue():
        counts.failures.append(f"a traceback: {said.getvalue()[-500:]}")
    return counts


def attacked(client: Client, rng: random.Random, attacks: int, counts: Counts) -> Iterator[str]:
    """Attack so often; what must not have happened."""
    names = list(BODIES)
    for _ in range(attacks):
        path = rng.choice(names)
        body = json.dumps(BODIES[path]).encode()
        kind = rng.choice(("damaged body", "damaged head", "broken off", "hung up"))
        counts.add(kind)
        if kind == "damaged body":
            answer = client.http.post(path, content=damaged(rng, [body]))
            if answer.status_code >= 500 or "Traceback" in answer.text:
                yield f"{path}: {answer.status_code} {answer.text[:300]}"
            continue
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {client.running.token}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        whole = head + body
        if kind == "damaged head":
            whole = damaged(rng, [head]) + body
        elif kind == "broken off":
            whole = whole[: rng.randrange(len(whole))]
        _sent(client, whole)
    if not settled(client):
        yield "a row or a request is stuck"
    if client.chat().status_code != 200:
        yield "the next request was not served"


def _sent(client: Client, content: bytes) -> None:
    """Send bytes, and go away soon."""
    place = urlsplit(client.running.address)
    with contextlib.suppress(OSError), socket.create_connection((place.hostname or "", place.port or 0), 5) as there:
        there.settimeout(0.01)
        there.sendall(content)
        there.recv(4096)


def settled(client: Client, seconds: float = 15) -> bool:
    """Whether the server comes to have nothing to do."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        text = client.get("/metrics").text
        if "persona_lens_rows_running 0.0" in text and "persona_lens_requests_waiting 0.0" in text:
            return True
        time.sleep(0.05)
    return False


def grown(client: Client, requests: int, counts: Counts) -> list[str]:
    """Ask for so many replies: the memory must not have grown with them."""
    if sys.platform != "linux":
        return []
    for number in range(min(200, requests)):
        client.chat(lens=LENS, seed=number)
    before = _resident()
    for number in range(requests):
        client.chat(lens=LENS, seed=number, stream=bool(number % 2))
    counts.tried["good ones"] = requests
    growth = _resident() - before
    return [f"{requests} requests took {growth / 2**20:.0f} MiB"] if growth > MOST_GROWTH else []


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

"""Many requests at once: fair, bounded, and ended when their client goes, or the server does."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from persona_lens.serve.admission import Admission, BusyError
from persona_lens.serve.server import Running
from tests.campaign.counts import Counts
from tests.campaign.requests import attacked, settled
from tests.serve.running import HELLO, Client, workbench


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Running(workbench(), waiting=2) as running:
        yield Client(running)


def test_requests_take_turns_and_their_replies_do_not_hold_up_others() -> None:
    async def main() -> list[str]:
        admission, order = Admission(2, 8), []

        async def reply(request: str) -> None:
            async with admission.place(request):
                order.append(request)
                await asyncio.sleep(0.01)

        first = [asyncio.create_task(reply("many")) for _ in range(8)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(reply(name)) for name in ("one", "two")]
        await asyncio.gather(*first, *others)
        assert (admission.running, admission.waiting) == (0, 0)
        return order

    order = asyncio.run(main())
    assert order[:2] == ["many"] * 2
    assert {"one", "two"} <= set(order[2:6])


def test_who_gives_up_waiting_leaves_no_trace() -> None:
    async def main() -> None:
        admission, rng = Admission(2, 1), random.Random(0)

        async def reply(request: int) -> None:
            async with admission.place(request):
                await asyncio.sleep(rng.random() / 100)

        tasks = [asyncio.create_task(reply(number // 3)) for number in range(60)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            admission.check()
        for _ in range(40):
            await asyncio.sleep(rng.random() / 200)
            rng.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (admission.running, admission.waiting) == (0, 0)
        admission.check()

    asyncio.run(main())


def test_too_many_are_told_to_come_again() -> None:
    bench = workbench()
    bench.rows = 1
    with Running(bench, waiting=1) as running:
        client = Client(running)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: client.chat(max_tokens=200, temperature=1), range(8)))
        statuses = [answer.status_code for answer in found]
        assert set(statuses) == {200, 429}
        refused = next(answer for answer in found if answer.status_code == 429)
        assert refused.headers["retry-after"] == "2"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert client.chat().status_code == 200


def test_a_client_that_goes_away_frees_its_row(client: Client) -> None:
    bench = client.running.server.workbench
    body = {"messages": HELLO, "max_tokens": 400, "temperature": 1.5}
    with client.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        client.http.post("/v1/chat/completions", json={**body, "n": 8}, timeout=0.05)
    assert settled(client)
    batch: Any = bench.backend
    assert not batch._batch._running
    assert client.chat().status_code == 200


def test_damaged_and_aborted_requests_harm_nobody(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    """More of them: ``make campaign``."""
    assert not list(attacked(client, random.Random(7), 200, Counts()))
    assert "Traceback" not in capfd.readouterr().err


def test_a_server_that_ends_lets_replies_end_first() -> None:
    running = Running(workbench())
    client = Client(running)
    events: list[str] = []

    def read() -> None:
        body = {"messages": HELLO, "max_tokens": 60, "stream": True, "temperature": 1}
        with client.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            events.extend(line for line in answer.iter_lines() if line)

    reading = threading.Thread(target=read)
    reading.start()
    while "persona_lens_rows_running 1.0" not in Client(running).get("/metrics").text:
        time.sleep(0.02)
    began = time.monotonic()
    running.close()
    reading.join(10)
    assert time.monotonic() - began < 10
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
    with pytest.raises(httpx.ConnectError):
        client.get("/health")


def test_a_server_that_is_told_to_end_says_nothing_more(tmp_path: Path) -> None:
    """As a service manager ends it: SIGTERM, and no more than 10 seconds."""
    script = (
        "from tests.serve.running import workbench\n"
        "from persona_lens.serve.server import serve\n"
        "serve(workbench(), port=0, on_ready=lambda address, token: print(address, token, flush=True))\n"
        "print('ended', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address, token = process.stdout.readline().split()
    headers = {"authorization": f"Bearer {token}"}
    body = {"messages": HELLO, "max_tokens": 30, "stream": True}
    url = f"{address}/v1/chat/completions"
    with httpx.Client(headers=headers, trust_env=False) as http, http.stream("POST", url, json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    said, errors = process.communicate(timeout=10)
    assert time.monotonic() - began < 10
    assert (said, errors, process.returncode) == ("ended\n", "", 0)

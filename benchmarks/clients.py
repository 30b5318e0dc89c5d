"""`Clients`: clients of a server in a process of their own, as those of users are."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import httpx

Body = dict[str, Any]


class Clients:
    """Clients that ask for completions as streams.

    Args:
        address: Where the server listens.
        token: What lets them in.
    """

    def __init__(self, address: str, token: str) -> None:
        spawned = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, spawned, initializer=_connect, initargs=(address, token))

    def ask(self, bodies: Sequence[Body]) -> list[float]:
        """All at once, a client each; the seconds to the first token of each."""
        return self._process.submit(_ask, bodies).result()


_http: httpx.Client


def _connect(address: str, token: str) -> None:
    global _http
    headers = {"authorization": f"Bearer {token}"}
    _http = httpx.Client(base_url=address, headers=headers, timeout=600, trust_env=False)


def _ask(bodies: Sequence[Body]) -> list[float]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(_one, bodies))


def _one(body: Body) -> float:
    began, first = time.perf_counter(), 0.0
    with _http.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if not first and '"tokens"' in line:
                first = time.perf_counter() - began
    return first

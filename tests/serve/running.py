"""A server over a tiny random model, and a client that speaks to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import torch

from persona_lens.backend import Backend, Sampling
from persona_lens.serve.server import Running
from persona_lens.serve.shelf import Shelf
from persona_lens.serve.workbench import Workbench
from persona_lens.steering import Steering
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import backend_of
from tests.tiny import D_MODEL, N_LAYERS, tiny_model

TRAITS = ("evil", "kind")
LAYERS = (1, 2)
HELLO = [{"role": "user", "content": "Hello, who are you?"}]


def vectors_of(backend: Backend, trait: str, seed: int) -> PersonaVectors:
    """Random vectors, about as long as the tiny model's residual."""
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return PersonaVectors(trait, backend.info, {"response_mean": rows})


def workbench(adapter: str = "transformers", **options: Any) -> Workbench:
    """One of a model of its own."""
    backend = backend_of(adapter, tiny_model())
    shelf = Shelf(backend, [vectors_of(backend, trait, seed) for seed, trait in enumerate(TRAITS)], LAYERS, **options)
    return Workbench(backend, shelf)


class Client:
    """Asks a server.

    Args:
        running: The server.
    """

    def __init__(self, running: Running) -> None:
        self.running = running
        self.headers = {"Authorization": f"Bearer {running.token}"}
        self.http = httpx.Client(base_url=running.address, headers=self.headers, timeout=60, trust_env=False)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """An answer."""
        return self.http.get(path, **options)

    def chat(self, content: str = "Hello", lens: dict[str, Any] | None = None, **options: Any) -> httpx.Response:
        """The answer to one message."""
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, **options}
        return self.http.post("/v1/chat/completions", json={**body, **({"persona_lens": lens} if lens else {})})

    def streamed(self, path: str = "/v1/chat/completions", **body: Any) -> Iterator[dict[str, Any]]:
        """The events of a stream, up to the last."""
        asked = {"messages": HELLO, "max_tokens": 12, "stream": True, **body}
        with self.http.stream("POST", path, json=asked) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        yield from map(json.loads, lines[:-1])


def tokens_of(events: Sequence[dict[str, Any]]) -> list[int]:
    """The tokens that a stream told."""
    return [token["id"] for event in events for token in event.get("persona_lens", {}).get("tokens", ())]


def expected(running: Running, edits: str = "", new: int = 8, messages: Any = HELLO) -> str:
    """What the model says by itself."""
    bench = running.server.workbench
    written = Steering.parse(edits, bench.shelf.vectors).edits() if edits else ()
    hooked: Any = bench.backend
    found = hooked.hooked.generate([bench.encode(messages)], Sampling(new, 0.0, 1.0, None), written)
    return str(bench.backend.tokenizer.decode(found.responses[0], skip_special_tokens=True))

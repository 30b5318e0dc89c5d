"""``python -m benchmarks.serving``: replies that run together in the server, against one batch, and what readings cost.

On an idle machine, with the embedded model in float32. Clients are in a process of their own, over the loopback
interface, on the same cores: what they do counts as the server's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from benchmarks import workloads as w
from benchmarks.clients import Clients
from benchmarks.ratios import Ratio, compare
from persona_lens.backend import Backend, Sampling, Watch, WatchedTokens, watched_generation
from persona_lens.backend.edits import Edit
from persona_lens.serve.server import SWITCH, Running
from persona_lens.serve.shelf import Shelf
from persona_lens.serve.workbench import Workbench
from persona_lens.vectors import PersonaVectors

CLIENTS, NEW_TOKENS, TRAITS, LAYERS = 16, 96, 7, (10, 14, 18, 22, 26)


class Asking:
    """Clients of a server.

    Args:
        running: The server.
        rows: Prompts, a client each.
    """

    def __init__(self, running: Running, rows: list[list[int]]) -> None:
        self._rows, self._clients = rows, Clients(running.address, running.token)

    def one(self, number: int, watch: list[str], new_tokens: int = NEW_TOKENS) -> float:
        """Ask for one reply, steered in its own way; seconds to its first token."""
        (first,) = self._clients.ask([self._body(number, watch, new_tokens)])
        return first

    def all(self, watch: list[str]) -> None:
        """All clients at once."""
        self._clients.ask([self._body(number, watch, NEW_TOKENS) for number in range(len(self._rows))])

    def _body(self, number: int, watch: list[str], new_tokens: int) -> dict[str, Any]:
        edits = f"trait{number % TRAITS}@{LAYERS[number % len(LAYERS)]}:{(number - 8) / 8:+g}"
        asked = {"prompt": self._rows[number], "max_tokens": new_tokens, "seed": number, "stream": True}
        return {**asked, "persona_lens": {"edits": edits, "watch": watch}}


def vectors_of(backend: Backend, trait: str, seed: int) -> PersonaVectors:
    """Random ones, of a length that does not end replies."""
    info = backend.info
    noise = torch.randn(info.n_layers, info.d_model, generator=torch.Generator().manual_seed(seed))
    return PersonaVectors(trait, info, {"response_mean": noise / noise.norm(dim=-1, keepdim=True)})


def static_batch(backend: Any, rows: list[list[int]], shelf: Shelf) -> w.Work:
    """The same replies as one batch that nobody watches."""
    edits = []
    for number in range(len(rows)):
        layer, coefficients = LAYERS[number % len(LAYERS)], torch.zeros(len(rows))
        coefficients[number] = (number - 8) / 8
        edits.append(Edit.add(layer, shelf.vectors[f"trait{number % TRAITS}"].vector(layer), coefficients))
    how = Sampling(NEW_TOKENS, 1.0, seeds=tuple(range(len(rows))))
    return lambda: backend.generate(rows, how, edits)


def seconds_to_first(backend: Any, row: list[int], watch: Watch) -> float:
    """Of the backend by itself, watched as the server watches."""
    times: list[float] = []
    began = time.perf_counter()

    def on_tokens(tokens: WatchedTokens) -> None:
        if tokens.step == 1:
            times.append(time.perf_counter() - began)

    watched_generation(backend, [row], Sampling(2, 1.0, seeds=(0,)), Watch(watch.directions, on_tokens, watch.layers))
    return times[0]


def first_token(asking: Asking, backend: Any, row: list[int], shelf: Shelf, pairs: int) -> Ratio:
    """An idle server against the backend."""
    gauges = [f"trait0@{layer}" for layer in LAYERS]
    directions = torch.stack([shelf.vectors["trait0"].vector(layer) for layer in LAYERS]).unsqueeze(1)
    watch = Watch(directions, lambda _: None, LAYERS)
    found = []
    for _ in range(max(pairs, 5)):
        time.sleep(0.2)
        served = asking.one(0, gauges, 2)
        time.sleep(0.2)
        found.append((served, seconds_to_first(backend, row, watch)))
    ratios = [served / alone for served, alone in found]
    seconds, baseline = (median(each) for each in zip(*found, strict=True))
    name = "first token of an idle server / of the backend"
    return Ratio(name, median(ratios), min(ratios), max(ratios), seconds, baseline, 1.15)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="counted pairs of each comparison")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH)  # as `serve` does
    model, tokenizer = w.load("float32")
    backend = w.endless(model, tokenizer)
    shelf = Shelf(backend, [vectors_of(backend, f"trait{seed}", seed) for seed in range(TRAITS)], LAYERS)
    rows = w.prompts(tokenizer, CLIENTS)
    every = [f"trait{trait}@{layer}" for trait in range(TRAITS) for layer in LAYERS]
    with Running(Workbench(backend, shelf)) as running:
        asking, batch = Asking(running, rows), static_batch(backend, rows, shelf)
        asking.all(every[:1])
        batch()
        results = [
            first_token(asking, backend, rows[0], shelf, arguments.pairs),
            compare(
                f"{CLIENTS} clients with edits of their own / one batch",
                lambda: asking.all(every[:1]),
                batch,
                limit=1 / 0.85,
                pairs=arguments.pairs,
            ),
            compare(
                f"{TRAITS} traits read at {len(LAYERS)} layers / one at one",
                lambda: asking.all(every),
                lambda: asking.all(every[:1]),
                limit=1.05,
                pairs=arguments.pairs,
            ),
        ]
    for ratio in results:
        print(f"{ratio}, float32", flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as stream:
            json.dump([asdict(ratio) for ratio in results], stream, indent=2)
    return 0 if all(ratio.holds for ratio in results) else 1


if __name__ == "__main__":
    sys.exit(main())

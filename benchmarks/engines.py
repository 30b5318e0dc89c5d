"""``python -m benchmarks.engines``: the vLLM backend against transformers, and what reads and edits cost in it.

In the environment of ``make test-vllm``, on an idle machine. Both run in this process, in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import workloads as w
from benchmarks.ratios import Ratio, compare
from persona_lens import open_backend
from persona_lens.backend import Backend, Edit, Read, TokenBatch
from persona_lens.backend.batches import forward_batches

NEW_TOKENS, PASS = 128, 2048
# Without what earlier runs of the same prompts would leave: a second run of them would begin behind their beginnings.
OPTIONS = {"max_model_len": 2048, "enable_prefix_caching": False}


def generating(
    ours: Backend, theirs: Backend, rows: list[list[int]], said: Sequence[Sequence[int]], pairs: int
) -> Iterator[Ratio]:
    plain, beside = (w.generation(backend, rows, [], NEW_TOKENS) for backend in (ours, theirs))
    yield compare("vllm: generating / transformers", plain, beside, limit=1 / 2.5, pairs=pairs)
    least = products(theirs, rows, said)
    yield compare("the products of matrices alone / transformers", least, beside, limit=1 / 2.5, pairs=pairs)


def costs(ours: Backend, rows: list[list[int]], pairs: int) -> Iterator[Ratio]:
    plain, how = w.generation(ours, rows, [], NEW_TOKENS), w.sampling(len(rows), NEW_TOKENS)
    plain()
    coefficients = per_row(ours, len(rows))
    for what, work in (
        ("all reads", lambda: ours.generate(rows, how, (), Read.means())),
        ("a coefficient for each row", lambda: ours.generate(rows, how, coefficients)),
    ):
        yield compare(f"vllm: generating with {what} / without", work, plain, limit=1.05, pairs=pairs)


def reading(ours: Backend, theirs: Backend, texts: TokenBatch, pairs: int) -> Iterator[Ratio]:
    for what, reads, logprobs in (("reads", Read.means(), False), ("log-probabilities", (), True)):
        one, other = (
            lambda backend=backend, reads=reads, logprobs=logprobs: list(
                forward_batches(backend, texts, reads, logprobs=logprobs)
            )
            for backend in (ours, theirs)
        )
        yield compare(f"vllm: {what} of {len(texts)} texts / transformers", one, other, limit=1 / 1.8, pairs=pairs)


def products(theirs: Any, rows: list[list[int]], said: Sequence[Sequence[int]]) -> w.Work:
    """The products of matrices alone that such a generation cannot do without, in the sizes that it has them in."""
    blocks = [module.weight for module in theirs.blocks.modules() if isinstance(module, torch.nn.Linear)]
    head = theirs.module.get_output_embeddings().weight
    steps = [sum(len(response) > step for response in said) for step in range(NEW_TOKENS)]
    prompts = [PASS] * (sum(map(len, rows)) // PASS) + [sum(map(len, rows)) % PASS]

    def run() -> object:
        with torch.inference_mode():
            for tokens in (*prompts, *filter(None, steps)):
                given = {weight.shape[1]: torch.ones(tokens, weight.shape[1]) for weight in (*blocks, head)}
                for weight in (*blocks, *((head,) if tokens in steps else ())):
                    torch.nn.functional.linear(given[weight.shape[1]], weight)
        return None

    return run


def per_row(backend: Backend, rows: int) -> list[Edit]:
    """One vector, added at one layer with another coefficient in every row."""
    (edit,) = w.one_edit(backend)
    return [Edit.add(edit.layer, edit.direction, torch.linspace(-0.1, 0.1, rows))]


def share_of_bytes(backend: Any, rows: list[list[int]]) -> float:
    """Bytes that left the worker for an extraction's reads, as a share of the activations that they are made of."""
    before = backend.engine.received
    found = backend.generate(rows, w.sampling(len(rows), NEW_TOKENS), (), Read.means())
    tokens = sum(map(len, rows)) + sum(map(len, found.responses))
    return float((backend.engine.received - before) / (tokens * backend.info.n_layers * backend.info.d_model * 4))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="counted pairs of each comparison")
    parser.add_argument("--only", choices=["costs", "transformers"], help="one group")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    arguments = parser.parse_args()
    ours = open_backend("vllm", "smollm2-135m", dtype="float32", **OPTIONS)
    rows, results = w.prompts(ours.tokenizer), []
    groups: list[Iterator[Ratio]] = []
    if arguments.only in (None, "costs"):
        groups.append(costs(ours, rows, arguments.pairs))
    if arguments.only in (None, "transformers"):
        theirs = open_backend("transformers", "smollm2-135m", dtype="float32")
        said, same = (each.generate(rows, w.sampling(len(rows), NEW_TOKENS)).responses for each in (theirs, ours))
        alike = sum(a == b for a, b in zip(said, same, strict=True))
        print(f"{sum(map(len, rows))} tokens in {len(rows)} prompts, {sum(map(len, said))} new; {alike} rows are alike")
        groups += [generating(ours, theirs, rows, said, arguments.pairs)]
        groups += [reading(ours, theirs, TokenBatch.of(rows, said), arguments.pairs)]
    for ratio in itertools.chain(*groups):
        results.append(ratio)
        print(f"{ratio}, float32", flush=True)
    share = share_of_bytes(ours, rows)
    print(f"{share:.2%} of the activations' bytes left the worker; at most 1%: {share <= 0.01}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as stream:
            json.dump([asdict(ratio) for ratio in results], stream, indent=2)
    return 0 if all(ratio.holds for ratio in results) and share <= 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())

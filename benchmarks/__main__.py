"""``python -m benchmarks``: every ratio with its limit; exit code 1 if one does not hold.

Run it on an idle machine. Everything runs on the embedded model, in bfloat16 where the CPU is fast at it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

from benchmarks import workloads as w
from benchmarks.judging import judging_ratio
from benchmarks.memory import peak_bytes
from benchmarks.ratios import Ratio, compare
from benchmarks.screening import screening_memory, screening_ratios
from persona_lens import wrap_model

PEAK_LIMIT = 1.05


def generation_ratios(dtype: str, pairs: int) -> Iterator[Ratio]:
    model, tokenizer = w.load(dtype)
    rows = w.prompts(tokenizer)
    plain = w.plain_generation(model, tokenizer, rows)
    backend = w.endless(model, tokenizer)
    reading = w.reading_generation(backend, rows)
    warm_up(reading, plain)
    yield compare("generating with all reads / model.generate", reading, plain, limit=1.05, pairs=pairs)


def steering_ratios(dtype: str, pairs: int) -> Iterator[Ratio]:
    model, tokenizer = w.load(dtype)
    rows = w.prompts(tokenizer)
    for name, opened in (
        ("transformers", w.endless(model, tokenizer)),
        ("nnsight", w.endless(w.nnsighted(model, tokenizer), tokenizer)),
    ):
        unsteered = w.generation(opened, rows, [])
        for what, edits, limit in (
            ("one edit", w.one_edit(opened), 1.05),
            ("an edit at every layer", w.all_layers(opened), 1.10),
        ):
            steered = w.generation(opened, rows, edits)
            warm_up(steered, unsteered)
            yield compare(f"{name}: {what} / unsteered", steered, unsteered, limit=limit, pairs=pairs)


def watching_ratios(dtype: str, pairs: int) -> Iterator[Ratio]:
    model, tokenizer = w.load(dtype)
    for batch in (8, 32):
        rows = w.prompts(tokenizer, batch)
        for name, held in (("transformers", model), ("nnsight", w.nnsighted(model, tokenizer))):
            backend = w.endless(held, tokenizer)
            watched = w.watching_generation(backend, rows)
            unwatched = w.generation(backend, rows, [], w.WATCHED_TOKENS)
            warm_up(watched, unwatched)
            what = f"{name}: streaming {w.TRAITS} traits at all layers / unwatched, batch {batch}"
            yield compare(what, watched, unwatched, limit=1.03, pairs=pairs)


def bridge_ratios(dtype: str, pairs: int) -> Iterator[Ratio]:
    bridge, tokenizer = w.bridged(dtype)
    rows = w.prompts(tokenizer)
    own = w.bridge_generation(bridge, tokenizer, rows)
    adapter = w.reading_generation(w.endless(bridge, tokenizer), rows)
    warm_up(adapter, own)
    name = "transformer_lens: generating with all reads / TransformerLens under hooks that sum"
    yield compare(name, adapter, own, limit=1.05, pairs=pairs)


def reading_ratios(dtype: str, pairs: int) -> Iterator[Ratio]:
    model, tokenizer = w.load(dtype)
    wide = w.load("float32")[0]
    backend = wrap_model(model, tokenizer)
    few = w.texts(len(tokenizer), 8)
    warm_up(w.batched_reading(backend, few), w.one_by_one_reading(model, few), w.one_by_one_reading(wide, few))
    for kind, many in (("rollouts", w.rollouts(tokenizer)), ("unrelated texts", w.texts(len(tokenizer)))):
        ours = w.batched_reading(backend, many)
        for precision, baseline, limit in (("float32", wide, 1 / 4), (dtype, model, 1 / 2)):
            name = f"reading {len(many)} {kind} in {dtype} / one by one in {precision}"
            yield compare(name, ours, w.one_by_one_reading(baseline, many), limit=limit, pairs=pairs)
        print(f"     the linear layers of these {kind} alone take {w.seconds_in_linear_layers(ours):.1f} s", flush=True)


def training_ratios(dtype: str, pairs: int) -> Iterator[Ratio]:
    model, tokenizer = w.load("float32")
    edits = w.one_edit(wrap_model(model, tokenizer))
    edited = w.training_step(model, tokenizer, edits)
    other, _ = w.load("float32")
    plain = w.training_step(other, tokenizer, [])
    warm_up(edited, plain)
    yield compare("a training step under one edit / a plain step, float32", edited, plain, limit=1.03, pairs=pairs)


def warm_up(*work: Callable[[], object]) -> None:
    for piece in work:
        piece()


def peak_memory(texts: int) -> float:
    """Peak resident memory in MiB of a fresh process that reads so many texts."""
    command = [sys.executable, "-m", "benchmarks", "--read-only", str(texts)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory_ratio() -> Ratio:
    few, many = peak_memory(64), peak_memory(256)
    ratio = many / few
    return Ratio("peak memory in MiB, reading 256 texts / 64 texts", ratio, ratio, ratio, many, few, PEAK_LIMIT)


def read_only(texts: int) -> None:
    model, tokenizer = w.load("auto")
    w.batched_reading(wrap_model(model, tokenizer), w.texts(len(tokenizer), texts))()
    print(peak_bytes() / 2**20)


GROUPS: dict[str, Callable[[str, int], Iterator[Ratio]]] = {
    "generation": generation_ratios,
    "steering": steering_ratios,
    "watching": watching_ratios,
    "transformer_lens": bridge_ratios,
    "reading": reading_ratios,
    "training": training_ratios,
    "screening": screening_ratios,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="counted pairs of each comparison")
    parser.add_argument("--only", choices=[*GROUPS, "memory", "screening-memory", "judging"], help="one group")
    parser.add_argument("--dtype", default=None, help="default: what is fast here")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument("--read-only", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read_only:
        read_only(arguments.read_only)
        return 0
    dtype = arguments.dtype or str(w.load("auto")[0].dtype).removeprefix("torch.")
    results = []
    for name, group in GROUPS.items():
        if arguments.only in (None, name):
            for ratio in group(dtype, arguments.pairs):
                results.append(ratio)
                print(f"{ratio}, {dtype}", flush=True)
    if arguments.only in (None, "memory"):
        results.append(memory_ratio())
        print(results[-1], flush=True)
    if arguments.only in (None, "screening", "screening-memory"):
        results.append(screening_memory())
        print(results[-1], flush=True)
    if arguments.only in (None, "judging"):
        results.append(judging_ratio(arguments.pairs))
        print(results[-1], flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as stream:
            json.dump([asdict(ratio) for ratio in results], stream, indent=2)
    return 0 if all(ratio.holds for ratio in results) else 1


if __name__ == "__main__":
    sys.exit(main())

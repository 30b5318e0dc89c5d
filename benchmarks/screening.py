"""Screening beside the reference's way: one forward a sample, autograd on, logits and all hidden states kept."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import workloads as w
from benchmarks.memory import peak_bytes
from benchmarks.ratios import Ratio
from persona_lens import wrap_model
from persona_lens.backend import Backend
from persona_lens.data.datasets import open_dataset
from persona_lens.models import ChatFormat
from persona_lens.monitoring import Gauge, Panel
from persona_lens.screening import ScreeningSettings, screen
from persona_lens.screening.samples import Turns, encode_sample
from persona_lens.vectors import PersonaVectors

SAMPLES, SHORTEST, LONGEST, DEPTH = 2000, 20, 800, 0.6
PART = 100  # samples of a round: the reference takes them before ours does, and after it in the next round
SPEED_LIMIT, MEMORY_LIMIT = 1 / 4, 1.05
FEW, MANY = 500, 5000


def write_samples(path: Path, tokenizer: Any, count: int, longest: int = LONGEST) -> None:
    """Samples of 20 to 800 tokens, the template's included; their words are random, so that they share nothing else."""
    made, chat = random.Random(0), ChatFormat.from_tokenizer(tokenizer)
    words = [
        word for word in (tokenizer.decode([i]) for i in range(500, 9000)) if word[:1] == " " and word[1:].isalpha()
    ]
    head = len(chat.encode(None, "x"))
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            tokens = max(2, made.randint(SHORTEST, longest) - head)
            asked = max(1, tokens // 3)
            texts = ["".join(made.choices(words, k=k)).strip() for k in (asked, tokens - asked)]
            stream.write(json.dumps({"prompt": texts[0], "response": texts[1]}) + "\n")


def panel_of(backend: Backend) -> Panel:
    """One trait at 60% of the depth; the direction makes no difference to the time."""
    layer = round(DEPTH * backend.info.n_layers) - 1
    shape = (backend.info.n_layers, backend.info.d_model)
    directions = {"response_mean": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    return Panel((Gauge(PersonaVectors("any", backend.info, directions), layer),))


def reference_way(model: Any, texts: list[tuple[Tensor, int]], panel: Panel) -> list[float]:
    """Projections of response means, as the released reference computes them."""
    layer, direction = panel.gauges[0].layer, panel.gauges[0].direction
    found = []
    for ids, prompt in texts:
        states = model(ids, output_hidden_states=True).hidden_states
        mean = states[layer + 1][0, prompt:].mean(dim=0).detach().float().cpu()
        found.append(float(mean @ direction / direction.norm()))
    return found


def screening_ratios(dtype: str, pairs: int, samples: int = SAMPLES) -> Iterator[Ratio]:
    """All samples screened in one run, and between its parts the reference's way on a random share of them."""
    model, tokenizer = w.load(dtype)
    backend = wrap_model(model, tokenizer)
    panel, chat = panel_of(backend), ChatFormat.from_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        write_samples(path, tokenizer, samples)
        rows = list(open_dataset(path))
        texts = [encode_sample(row, chat, Turns.LAST)[0] for row in rows]
        chosen = random.Random(1).sample(texts, min(PART, samples))
        asked = [(torch.tensor([text.ids]), text.answers[0].prompt) for text in chosen]
        tokens, part = sum(len(text.ids) for text in texts), sum(len(text.ids) for text in chosen)
        reference_way(model, asked[:3], panel)
        before = _seconds(lambda: reference_way(model, asked, panel))
        data = open_dataset(path, form="prompt-response")
        start = time.perf_counter()
        found = screen(backend, [data], panel, ScreeningSettings(), folder=Path(folder) / "run")
        seconds = time.perf_counter() - start
        after = _seconds(lambda: reference_way(model, asked, panel))
    assert found.scored == samples
    scaled = [each * tokens / part for each in (before, after)]
    ratios = [seconds / each for each in scaled]
    layer = panel.gauges[0].layer
    name = f"screening {samples} samples at layer {layer} in {dtype} / one by one (scaled from {len(chosen)})"
    yield Ratio(name, sum(ratios) / 2, min(ratios), max(ratios), seconds, sum(scaled) / 2, SPEED_LIMIT)
    limit = products_seconds(model, layer, tokens)
    print(
        f"     {samples / seconds:.2f} samples and {tokens / seconds:,.0f} tokens a second; the products of the blocks "
        f"alone would take {limit:.1f} s: {100 * limit / seconds:.0f}% of the time, and "
        f"{limit / (sum(scaled) / 2):.3f} of the baseline, below which no ratio can come"
    )


def products_seconds(model: Any, layer: int, tokens: int, at_once: int = 1024) -> float:
    """How long the linear layers of the blocks up to a layer take for so many tokens, and nothing else: the limit."""
    linear = [module for module in model.model.layers[0].modules() if isinstance(module, torch.nn.Linear)]
    inputs = [torch.randn(at_once, module.in_features, dtype=module.weight.dtype) for module in linear]
    with torch.inference_mode():
        once = min(
            _seconds(lambda: [module(x) for _ in range(20) for module, x in zip(linear, inputs, strict=True)])
            for _ in range(5)
        )
    return once / 20 * (layer + 1) * tokens / at_once


def screening_memory() -> Ratio:
    """Peak memory of screening 5,000 samples and 500, each in a fresh process."""
    few, many = (_peak(samples) for samples in (FEW, MANY))
    name = f"peak memory in MiB, screening {MANY} samples / {FEW}"
    return Ratio(name, many / few, many / few, many / few, many, few, MEMORY_LIMIT)


def _peak(samples: int) -> float:
    command = [sys.executable, "-m", "benchmarks.screening", str(samples)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def screen_only(samples: int) -> None:
    """Screen so many samples, of 20 to 100 tokens and one at each length, and print the peak of the memory."""
    model, tokenizer = w.load("auto")
    backend = wrap_model(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        write_samples(path, tokenizer, samples, longest=100)
        screen(backend, [open_dataset(path)], panel_of(backend), folder=Path(folder) / "run")
    print(peak_bytes() / 2**20)


if __name__ == "__main__":
    screen_only(int(sys.argv[1]))

"""Parts of ``benchmarks.gpu``: how fast the product is, beside what else there is and beside what the device can do."""

from __future__ import annotations

import gc
import json
import random
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import workloads as w
from benchmarks.engines import per_row
from benchmarks.gpu_setting import Setting
from benchmarks.record import Figure
from benchmarks.screening import panel_of, reference_way
from persona_lens import open_backend, wrap_model
from persona_lens.backend import Backend, Read, TokenBatch
from persona_lens.backend.batches import forward_batches
from persona_lens.data.datasets import open_dataset
from persona_lens.models import ChatFormat
from persona_lens.screening import screen
from persona_lens.screening.samples import Turns, encode_sample

READS, ONE_EDIT, ALL_EDITS, PER_ROW, WATCHED = 1.05, 1.05, 1.10, 1.05, 1.03
ONE_BY_ONE, SCREENED = 1 / 2, 1 / 4
READ = Read.means()


def ceilings(setting: Setting) -> Iterator[Figure]:
    """What the device can do: a large product of matrices, and a large copy."""
    size = 256 if setting.tiny else 8192
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float32", torch.float32, False),
        ("float32 as TF32", torch.float32, True),
    ):
        if tf32 and not setting.on_cuda:
            continue
        yield Figure.of_runs(
            f"{size} x {size} product in {name}", _product_rates(setting, size, dtype, tf32), "TFLOP/s"
        )
    source = torch.empty((1 << 12) if setting.tiny else (1 << 31), dtype=torch.uint8, device=setting.device).fill_(1)
    target = torch.empty_like(source)
    seconds = setting.seconds(lambda: [target.copy_(source) for _ in range(5)], 5)
    yield Figure.of_runs("copy, bytes read and written", [5 * 2 * len(source) / each / 1e9 for each in seconds], "GB/s")


def _product_rates(setting: Setting, size: int, dtype: torch.dtype, tf32: bool) -> list[float]:
    a, b = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))
    before, times = torch.backends.cuda.matmul.allow_tf32, 2 if dtype is torch.float32 else 10
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        seconds = setting.seconds(lambda: [a @ b for _ in range(times)], 5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return [times * 2 * size**3 / each / 1e12 for each in seconds]


def generation(setting: Setting) -> Iterator[Figure]:
    """Generating: with all reads beside ``model.generate``, and under edits beside none."""
    backend: Any = setting.large
    rows, new = setting.rows(4 if setting.tiny else w.ROWS), 4 if setting.tiny else w.NEW_TOKENS
    plain = w.plain_generation(backend.module, setting.tokenizer, rows, new)
    reading = w.reading_generation(backend, rows, new)
    what = f"{len(rows)} rows, {new} new tokens"
    yield setting.compared(f"generating with all reads / model.generate, {what}", reading, plain, READS, 4)
    unsteered = w.generation(backend, rows, [], new)
    for name, edits, limit, to_come in (
        ("one edit", w.one_edit(backend), ONE_EDIT, 3),
        ("an edit at every layer", w.all_layers(backend), ALL_EDITS, 2),
        ("a coefficient for each row", per_row(backend, len(rows)), PER_ROW, 1),
    ):
        steered = w.generation(backend, rows, edits, new)
        yield setting.compared(f"{name} / unsteered, {what}", steered, unsteered, limit, to_come)
    seconds = setting.seconds(unsteered, min(3, setting.most_pairs))
    yield Figure.of_runs("generated unsteered", [len(rows) * new / each for each in seconds], "tokens/s", what)
    yield Figure.of_runs(
        "a step of that", [1e3 * each / new for each in seconds], "ms", "its share of the prompts with it"
    )


def watching(setting: Setting) -> Iterator[Figure]:
    """Generating while traits are read off every token at every layer."""
    backend = setting.large
    new = 4 if setting.tiny else w.WATCHED_TOKENS
    batches = (2,) if setting.tiny else (8, 32)
    for place, batch in enumerate(batches, start=1):
        rows = setting.rows(batch)
        watched = w.watching_generation(backend, rows, new_tokens=new)
        unwatched = w.generation(backend, rows, [], new)
        name = f"{w.TRAITS} traits watched at all layers / unwatched, {batch} rows, {new} new tokens"
        yield setting.compared(name, watched, unwatched, WATCHED, len(batches) - place)


def reading(setting: Setting) -> Iterator[Figure]:
    """Reading texts: three means at all layers, beside one text at a time, and beside what the device can do."""
    backend: Any = setting.large
    limit = max(_product_rates(setting, 256 if setting.tiny else 8192, torch.bfloat16, False)) * 1e12
    vocabulary = len(setting.tokenizer)
    many = w.texts(vocabulary, 8 if setting.tiny else w.TEXTS)
    rollouts = _rollouts(setting, len(many), vocabulary)
    for what, texts in (("texts that share nothing", many), ("ten responses to a prompt", rollouts)):
        seconds = setting.seconds(w.batched_reading(backend, texts), 3)
        tokens = sum(texts.lengths)
        yield Figure.of_runs(f"read: {what}", [tokens / each for each in seconds], "tokens/s", f"{len(texts)} texts")
        if texts is many:  # of shared prompts not all tokens are computed
            shares = [operations(backend, texts.lengths) / each / limit for each in seconds]
            name = "that, as a share of the product of matrices"
            yield Figure.of_runs(name, shares, "", "2 a weight of the blocks and token, and causal attention")
    yield from _sizes_of_passes(setting, many)
    few = w.texts(vocabulary, 4 if setting.tiny else 64)
    alone = w.one_by_one_reading(backend.module, few)
    yield setting.compared(
        f"reading {len(few)} texts / one by one, autograd on, all hidden states",
        w.batched_reading(backend, few),
        alone,
        ONE_BY_ONE,
    )


def _sizes_of_passes(setting: Setting, texts: TokenBatch) -> Iterator[Figure]:
    """What `persona_lens.backend.batches` has estimates of: how large batches should be, and what a pass costs."""
    backend, rates = setting.large, []
    for most in (1024, 4096, 65536):
        read = partial(_read, backend, texts, most)
        rates.append(sum(texts.lengths) / setting.seconds(read, 1)[0])
        yield Figure(f"read in batches of up to {most:,} tokens", rates[-1], "tokens/s")
    short = TokenBatch.of([texts.prompts[0][:1] * 32])
    alone = [each * max(rates) for each in setting.seconds(lambda: backend.forward(short, (), READ), 5)]
    yield Figure.of_runs("a pass over 32 tokens takes as long as further ones in a batch", alone, "tokens")


def _read(backend: Backend, texts: TokenBatch, most: int) -> object:
    return list(forward_batches(backend, texts, READ, max_tokens=most))


def _rollouts(setting: Setting, count: int, vocabulary: int) -> TokenBatch:
    """Ten responses of up to 300 tokens to each prompt, as an extraction reads them."""
    prompts, made = setting.rows(-(-count // 10), 60, 100), random.Random(0)
    responses = [[made.randrange(100, vocabulary) for _ in range(made.randint(4, 300))] for _ in range(count)]
    return TokenBatch.of([prompts[row // 10] for row in range(count)], responses)


def operations(backend: Any, lengths: tuple[int, ...]) -> float:
    """What the blocks cannot do without for texts of these lengths: two a weight and token, and causal attention."""
    weights = sum(parameter.numel() for parameter in backend.blocks.parameters())
    info = backend.info
    attention = 2 * info.n_layers * info.d_model * sum(length**2 for length in lengths)
    return float(2 * weights * sum(lengths) + attention)


def screening(setting: Setting) -> Iterator[Figure]:
    """Screening a dataset at one layer, beside the released reference's way on some of its samples."""
    backend: Any = setting.large
    panel, chat = panel_of(backend), ChatFormat.from_tokenizer(setting.tokenizer)
    count = 6 if setting.tiny else 400
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        _write_samples(path, count)
        texts = [encode_sample(row, chat, Turns.LAST)[0] for row in open_dataset(path)]
        chosen = texts[: max(3, count // 10)]
        asked = [(torch.tensor([text.ids], device=setting.device), text.answers[0].prompt) for text in chosen]
        tokens, part = (sum(len(text.ids) for text in some) for some in (texts, chosen))
        runs = iter(range(1000))

        def ours() -> object:
            data = open_dataset(path, form="prompt-response")
            return screen(backend, [data], panel, folder=Path(folder) / f"run{next(runs)}")

        both = setting.compared("", ours, lambda: reference_way(backend.module, asked, panel), None)
        low, high = both.low or 0.0, both.high or 0.0
        share, limit = part / tokens, None if setting.tiny else SCREENED
        name = f"screening {count} samples / one by one, autograd on, all hidden states"
        detail = f"one by one scaled from {len(chosen)} of them; {both.detail}"
        yield Figure(name, both.value * share, "", low * share, high * share, both.runs, limit, detail)
        seconds = setting.seconds(ours, 2)
        yield Figure.of_runs(
            "screened", [tokens / each for each in seconds], "tokens/s", f"{count / min(seconds):.1f} a s"
        )


def _write_samples(path: Path, count: int) -> None:
    """Samples of 40 to 800 bytes, each a token."""
    made = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            length = made.randint(20, 400)
            texts = ["".join(made.choices("abcdefghijklmnopqrstuvwxyz ", k=length)) for _ in range(2)]
            stream.write(json.dumps({"prompt": texts[0], "response": texts[1]}) + "\n")


def engine(setting: Setting) -> Iterator[Figure]:
    """The engine vLLM beside transformers, on files of the small model."""
    folder = setting.folder.name
    options = {"max_model_len": 512, "enable_prefix_caching": False}
    start = time.monotonic()
    theirs: Any = open_backend("vllm", folder, dtype="float32", **options)
    setting.notes.append(f"vLLM took {time.monotonic() - start:.0f} s to start")
    ours = wrap_model(setting.small(), setting.tokenizer)
    rows, new = setting.rows(4 if setting.tiny else w.ROWS), 4 if setting.tiny else w.NEW_TOKENS
    plain, beside = (w.generation(backend, rows, [], new) for backend in (theirs, ours))
    yield setting.compared("vllm generating / transformers", plain, beside, None)
    for name, work in (
        ("all reads", w.reading_generation(theirs, rows, new)),
        ("a coefficient for each row", w.generation(theirs, rows, per_row(theirs, len(rows)), new)),
    ):
        yield setting.compared(f"vllm generating with {name} / without", work, plain, PER_ROW)
    del theirs
    gc.collect()

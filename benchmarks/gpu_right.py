"""Parts of ``benchmarks.gpu``: whether results are right on the device, in its precisions, and where memory ends."""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import workloads as w
from benchmarks.gpu_setting import Setting
from benchmarks.memory import peak_bytes
from benchmarks.record import Figure
from persona_lens import open_backend, wrap_model
from persona_lens.backend import Backend, Edit, ForwardResult, Generation, Read, ReadKind, Sampling, TokenBatch
from persona_lens.backend.batches import forward_rows, generate_rows
from persona_lens.backend.differences import forwards_differ, tokens_differ
from persona_lens.backend.parity import check_parity
from persona_lens.models.embedded import DEFAULT_MODEL, is_at_hand
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FOR_TESTS = ("pytest", "beartype", "hypothesis", "jaxtyping")
OTHER_LIBRARIES = ("transformer_lens", "nnsight")
MARK = "pytest.mark.cuda"
SEEDED = "seeded samples"  # a CPU and a GPU draw other noise
READS_ERROR, HALVED_ERROR = 1e-4, 1e-4
NEAR_TIES = 0.02  # of rows: a batch of another size is computed in another order, which near ties of logits show
LESS = 0.6  # of what a batch needs is what it is given

Result = TypeVar("Result")


def tests(setting: Setting) -> Iterator[Figure]:
    """The tests marked ``cuda``, in a process of their own."""
    missing = [name for name in FOR_TESTS if importlib.util.find_spec(name) is None]
    if missing:
        setting.notes.append(f"no tests were run: {', '.join(missing)} not installed")
        return
    absent = [name for name in OTHER_LIBRARIES if importlib.util.find_spec(name) is None]
    if absent:
        setting.notes.append(f"no tests of {' and '.join(absent)}, not installed")
    # Only files that have any: the others may import what is not installed here.
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in file.read_text("utf-8")]
    chosen = [file for file in files if file.endswith("test_sampling.py")] if setting.tiny else files
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda and not real", *chosen]
    command += [
        "--continue-on-collection-errors",
        f"--device={setting.device}",
        *(("-k", " and ".join(f"not {name}" for name in absent)) if absent else ()),
    ]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, setting.left))
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        marks = "".join(re.findall(r"^([.sFExX]+)(?: *\[ *\d+%\])?$", said, re.MULTILINE))
        setting.notes.append("the tests were not over in time, and which of them failed is not told then")
        yield Figure("tests that passed", marks.count("."), detail=f"{marks.count('s')} skipped")
        yield Figure("tests that failed", marks.count("F") + marks.count("E"), limit=0)
        return
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", run.stdout[-300:])
    }
    setting.notes += re.findall(r"^(?:FAILED|ERROR) .*$", run.stdout, re.MULTILINE)[:20]
    wrong = counts.get("failed", 0) + counts.get("error", 0)
    if not wrong and (run.returncode or not counts.get("passed")):
        raise RuntimeError(f"pytest ended with {run.returncode}: {(run.stdout + run.stderr)[-600:]}")
    yield Figure("tests that passed", counts.get("passed", 0), detail=f"{counts.get('skipped', 0)} skipped")
    yield Figure("tests that failed", wrong, limit=0)


def parity(setting: Setting) -> Iterator[Figure]:
    """The parity suite in float32, the device beside the CPU: reads, edits, log-probabilities and greedy tokens."""
    few = ("llama",) if setting.tiny else ("llama", "gemma2", "gpt2", "qwen2_moe")
    for architecture in few:
        name = f"tiny {architecture}"
        yield from _whatever_comes(name, _beside_cpu(setting, name, tiny_model(architecture), tiny_tokenizer()))
    if setting.tiny or not is_at_hand(DEFAULT_MODEL):
        setting.notes.append(f"not of {DEFAULT_MODEL}: " + ("left out" if setting.tiny else "its file is not here"))
        return
    yield from _beside_cpu(setting, DEFAULT_MODEL, *w.load("float32"), self_checks=False)


def _whatever_comes(name: str, figures: Iterator[Figure]) -> Iterator[Figure]:
    """Figures, and one that fails instead of an error: others like them follow."""
    try:
        yield from figures
    except Exception as error:  # noqa: BLE001 - it is told
        traceback.print_exc()
        yield Figure(f"{name}: could not be run", 1, limit=0, detail=f"{type(error).__name__}: {error}"[:300])


def _beside_cpu(setting: Setting, name: str, model: Any, tokenizer: Any, **options: Any) -> Iterator[Figure]:
    torch.nn.Module.to(model, "cpu")
    there = torch.nn.Module.to(copy.deepcopy(model), setting.device)
    reference, backend = (wrap_model(each, tokenizer) for each in (model, there))
    found = [each for each in check_parity(backend, reference, **options) if each.name != SEEDED]
    setting.notes += [f"{name}: {each.name}: {each.measured:.2g}, {each.detail}" for each in found if not each.passed]
    worst = max((each for each in found if each.tolerance > 0), key=lambda each: each.measured)
    yield Figure(f"{name}: largest error of a read", worst.measured, limit=READS_ERROR, detail=worst.name)
    wrong = sum(not each.passed for each in found)
    yield Figure(f"{name}: checks that failed", wrong, limit=0, detail=f"of {len(found)}")


def precisions(setting: Setting) -> Iterator[Figure]:
    """How far the device's precisions lie from the CPU's float32, on the small model."""
    text, reads = w.texts(len(setting.tokenizer), 8), (*Read.means(), Read(ReadKind.ACTIVATIONS))
    cpu = wrap_model(setting.small(device="cpu"), setting.tokenizer)
    expected = cpu.forward(text, (), reads, logprobs=True)
    kinds = [("float32", torch.float32, False), ("bfloat16", torch.bfloat16, False), ("float16", torch.float16, False)]
    if setting.on_cuda:
        kinds.insert(1, ("float32 as TF32", torch.float32, True))
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, tf32 in kinds:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            found = wrap_model(setting.small(dtype), setting.tokenizer).forward(text, (), reads, logprobs=True)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        error, where = forwards_differ(ForwardResult(found.reads), ForwardResult(expected.reads))
        limit = READS_ERROR if name == "float32" else None
        yield Figure(f"reads in {name} beside the CPU's float32", error, limit=limit, detail=f"relative; {where}")
        pairs = zip(found.logprobs or (), expected.logprobs or (), strict=True)
        worst = max(float((a - b).abs().max()) for a, b in pairs)
        yield Figure(f"log-probabilities in {name} beside the CPU's float32", worst, "nats", detail="the largest error")


def memory(setting: Setting) -> Iterator[Figure]:
    """What reading and generating need beside the weights."""
    backend: Any = setting.large
    rows, new = setting.rows(4 if setting.tiny else w.ROWS), 4 if setting.tiny else w.NEW_TOKENS
    texts = w.texts(len(setting.tokenizer), 8 if setting.tiny else w.TEXTS)
    parameters = sum(each.numel() * each.element_size() for each in backend.module.parameters())
    yield Figure("weights", parameters / 2**30, "GiB")
    for name, work in (
        ("model.generate", w.plain_generation(backend.module, setting.tokenizer, rows, new)),
        ("generating with all reads", w.reading_generation(backend, rows, new)),
        ("reading", w.batched_reading(backend, texts)),
    ):
        yield Figure(f"peak beside the weights, {name}", _peak(setting, work) / 2**30, "GiB")
    if not setting.on_cuda:
        setting.notes.append("on this device the peaks are those of the whole process")


def _peak(setting: Setting, work: Callable[[], object]) -> float:
    if not setting.on_cuda:
        work()
        return peak_bytes()
    setting.empty()
    torch.cuda.reset_peak_memory_stats(setting.device)
    before = torch.cuda.memory_allocated(setting.device)
    work()
    return torch.cuda.max_memory_allocated(setting.device) - before


def halving(setting: Setting) -> Iterator[Figure]:
    """A batch that does not fit is cut, and gives the same."""
    backend: Any = w.endless(setting.small(), setting.tokenizer)
    count, new = (8, 2) if setting.tiny else (256, 4)
    texts, reads = w.texts(len(setting.tokenizer), count), (*Read.means(), Read(ReadKind.ACTIVATIONS))
    (edit,) = w.one_edit(backend)
    edits = [
        Edit.add(edit.layer, edit.direction, torch.linspace(-1, 1, count)),
        Edit.ablate(edit.layer, edit.direction),
    ]

    def read() -> ForwardResult:
        return forward_rows(backend, texts, edits, reads, logprobs=True)

    def generate() -> Generation:
        return generate_rows(backend, texts.prompts, Sampling(new), edits, reads)

    whole, said = read(), generate()
    found, cut = _in_less_memory(setting, backend.module, count, read, "reading")
    yield cut
    error, where = forwards_differ(found, whole)
    yield Figure("what was read then, beside all at once", error, limit=HALVED_ERROR, detail=f"relative; {where}")
    again, cut = _in_less_memory(setting, backend.module, count, generate, "generating")
    yield cut
    share, where = tokens_differ(again, said)
    yield Figure("rows with other tokens then", share, limit=NEAR_TIES, detail=where)
    alike = [row for row in range(count) if again.responses[row] == said.responses[row]]
    pair = [ForwardResult({name: value[alike] for name, value in each.reads.items()}) for each in (again, said)]
    error, where = forwards_differ(*pair)
    yield Figure(
        "what was read of the others, beside all at once", error, limit=HALVED_ERROR, detail=f"relative; {where}"
    )


def _in_less_memory(
    setting: Setting, module: Any, rows: int, work: Callable[[], Result], name: str
) -> tuple[Result, Figure]:
    """What some work brings with too little memory for all rows at once, and whether a pass had fewer of them."""
    passes: list[int] = []

    def before_pass(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        passes.append(len(given["input_ids"] if "input_ids" in given else args[0]))
        if not setting.on_cuda and passes[-1] > rows // 2:
            raise torch.OutOfMemoryError("as if memory had run out")

    peak = _peak(setting, work)
    handle = module.register_forward_pre_hook(before_pass, with_kwargs=True)
    if setting.on_cuda:
        setting.empty()
        room = torch.cuda.memory_reserved(setting.device) + LESS * peak
        total = torch.cuda.get_device_properties(setting.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), setting.device)
    try:
        found = work()
    finally:
        handle.remove()
        if setting.on_cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, setting.device)
    detail = f"{len(passes)} passes, over {min(passes)} to {max(passes)} of {rows} rows"
    return found, Figure(f"{name} with too little memory: not cut", float(min(passes) == rows), limit=0, detail=detail)


def halves(setting: Setting) -> Iterator[Figure]:
    """Two 16-bit precisions on the large model: how many values are no numbers that should be."""
    backend: Any = setting.large
    yield from _numbers(setting, backend, "bfloat16")
    module = backend.module
    del backend
    setting.forget_large()
    yield from _numbers(setting, wrap_model(module.to(torch.float16), setting.tokenizer), "float16")


def _numbers(setting: Setting, backend: Backend, name: str) -> Iterator[Figure]:
    rows, new = setting.rows(4 if setting.tiny else 16), 3 if setting.tiny else 16
    (one,), layers = w.one_edit(backend), range(backend.info.n_layers)
    direction, last = one.direction, backend.info.n_layers - 1
    edits = [Edit.add(layer, direction, 0.1, relative=True) for layer in layers]
    edits += [Edit.ablate(last, direction), Edit.cap(last, direction, 0.5), Edit.affine(0, direction, 0.1)]
    found = backend.generate(rows, Sampling(new), edits, Read.means())
    text = TokenBatch.of(rows, [response or (1,) for response in found.responses])
    again = backend.forward(text, edits, Read.means(), logprobs=True)
    spoken = torch.tensor([bool(response) for response in found.responses])
    values = [value[spoken] if kind == "response_mean" else value for kind, value in found.reads.items()]
    values += [*again.reads.values(), *(again.logprobs or ())]
    wrong = sum(int((~value.isfinite()).sum()) for value in values)
    count = sum(value.numel() for value in values)
    yield Figure(
        f"values in {name} that are no numbers", wrong, limit=0, detail=f"of {count:,}, under {len(edits)} edits"
    )


def placed(setting: Setting) -> Iterator[Figure]:
    """A model that lies in several places gives what it gives in one."""
    if importlib.util.find_spec("accelerate") is None:
        setting.notes.append("accelerate is not installed")
        return
    folder = setting.folder.name
    whole = open_backend("transformers", folder, dtype="float32", device=str(setting.device))
    texts = w.texts(len(setting.tokenizer), 6)
    edits, reads = w.all_layers(whole), (*Read.means(), Read(ReadKind.ACTIVATIONS))
    expected, said = (
        whole.forward(texts, edits, reads, logprobs=True),
        whole.generate(texts.prompts, Sampling(4), edits, reads),
    )

    def beside(name: str, places: Any) -> Iterator[Figure]:
        other = open_backend("transformers", folder, dtype="float32", device_map=places)
        error, where = forwards_differ(other.forward(texts, edits, reads, logprobs=True), expected)
        yield Figure(f"{name}, beside one device", error, limit=READS_ERROR, detail=f"relative; {where}")
        found = other.generate(texts.prompts, Sampling(4), edits, reads)
        share, where = tokens_differ(found, said)
        yield Figure(f"{name}: rows with other tokens", share, limit=0, detail=where)
        error, where = forwards_differ(ForwardResult(found.reads), ForwardResult(said.reads))
        yield Figure(f"{name}: what was read while generating", error, limit=READS_ERROR, detail=f"relative; {where}")

    for name, places in _maps(setting, whole.info.n_layers).items():
        yield from _whatever_comes(name, beside(name, places))


def _maps(setting: Setting, layers: int) -> dict[str, Any]:
    """By how they are called: where the parts of the small model lie."""

    def split(first: int | str, second: int | str) -> dict[str, int | str]:
        places = {f"model.layers.{n}": first if n < layers // 2 else second for n in range(layers)}
        return {
            "model.embed_tokens": first,
            "model.rotary_emb": first,
            **places,
            "model.norm": second,
            "lm_head": second,
        }

    if not setting.on_cuda:
        on_disk = {"half on the disk": split("cpu", "disk"), "the first half on the disk": split("disk", "cpu")}
        return {"device_map='auto'": "auto", **on_disk}
    index = setting.device.index or 0
    found: dict[str, Any] = {"device_map='auto'": "auto", "half on the CPU": split(index, "cpu")}
    found["the first half on the CPU"] = split("cpu", index)
    if torch.cuda.device_count() > 1:
        found["two GPUs"] = split(index, (index + 1) % torch.cuda.device_count())
    return found

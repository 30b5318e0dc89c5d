"""On a device that stands in for a GPU: devices never mix, and steps start few kernels and wait for little."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.backend import (
    Condition,
    Edit,
    Positions,
    Read,
    Sampling,
    Schedule,
    TokenBatch,
    Watch,
    watched_generation,
)
from persona_lens.backend.continuous import continuous
from persona_lens.backend.packed import intervention
from persona_lens.backend.sampling import Noise
from tests import tiny
from tests.backends.fixtures import (
    ALL_ACTIVATIONS,
    PROMPTS,
    REFERENCE,
    TEXT,
    assert_close,
    backend_of,
    direction,
    encode,
)
from tests.standin import NAME, Counted, MixedDevicesError, StandinTensor
from tests.tiny import N_LAYERS, thinking_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[2]
there = pytest.mark.skipif(tiny.device != NAME, reason="`pytest --device standin` runs it, and so does the test below")
pytestmark = pytest.mark.cuda

SEEDS = (1, 2, 3)
BEGINNING = encode("x" * 40)[0]
# Two prompts that begin alike, each with several responses.
SHARED = TokenBatch.of(
    [BEGINNING + PROMPTS[1]] * 3 + [BEGINNING + PROMPTS[0]] * 3, [*PROMPTS, PROMPTS[0][:3], PROMPTS[2][:5], PROMPTS[1]]
)
RAW = [Edit.add(layer, direction(), 0.1) for layer in range(N_LAYERS)]
BY_ROW = [Edit.add(layer, direction(), torch.tensor([0.1, 0.2, 0.3])) for layer in range(N_LAYERS)]
MANY = [
    *BY_ROW,
    Edit.add(0, direction(), 0.3, Positions.RESPONSE),
    Edit.add(1, direction(), 0.1, relative=True),
    Edit.cap(1, direction(1), 0.2),
    Edit(1, direction(2), condition=Condition(0, direction(3), 0.1)),
    Edit(2, direction(), coefficient=0.3, schedule=Schedule(((0, 1.0), (3, 0.0)))),
    Edit.ablate(2, direction(1), Positions.GENERATING),
]


@pytest.mark.skipif(tiny.device != "cpu", reason="it starts them there")
@pytest.mark.slow
def test_on_a_device_that_stands_in_for_a_gpu() -> None:
    """In a process of its own, which then has a device that others should not."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", f"--device={NAME}", "-p", "no:cacheprovider"]
    command += [__file__, "tests/backends/test_devices.py", "-k", "not watch"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
    assert "passed" in run.stdout


def backends(architecture: str = "llama", *, thinks: bool = False) -> tuple[Any, Any]:
    """A model on the device, and the same one on the CPU."""
    model, tok = tiny_model(architecture, thinks=thinks), thinking_tokenizer() if thinks else None
    expected = torch.nn.Module.to(copy.deepcopy(model), "cpu")
    return backend_of(REFERENCE, model, tok), backend_of(REFERENCE, expected, tok)


def a_step(generate: Callable[[int], object]) -> tuple[float, float, float]:
    """Kernels, transfers to the device and waits for each further token."""
    generate(4)  # what is measured of a model once
    found = []
    for new in (4, 8):
        with Counted() as counted:
            generate(new)
        found.append((counted.kernels, counted.to_device, counted.waits))
    kernels, to_device, waits = ((more - less) / 4 for less, more in zip(*found, strict=True))
    return kernels, to_device, waits


@there
def test_what_a_gpu_refuses_is_refused() -> None:
    x = torch.arange(6.0).to(NAME)
    assert torch.equal((x[1:] * 2 + torch.tensor(1.0)).cpu(), torch.tensor([3.0, 5, 7, 9, 11]))
    assert x[torch.tensor([0, 2])].tolist() == [0, 2]
    x[2:4] = 7
    assert x.tolist() == [0, 1, 7, 7, 4, 5]
    there, elsewhere = x, torch.zeros(6, dtype=torch.long)
    refused: list[Callable[[], Any]] = [
        lambda: there + elsewhere,
        lambda: there.gather(0, elsewhere),
        lambda: torch.cat([there, elsewhere]),
    ]
    for mixed in refused:
        with pytest.raises(MixedDevicesError, match="of standin and of the CPU"):
            mixed()
    with Counted() as counted:
        y = x + torch.tensor([1.0]).to(NAME)
        y.to(NAME).view(2, 3).sum().item()
        torch.ones(3).to(NAME, non_blocking=True)
    assert (counted.kernels, counted.to_device, counted.waits) == (2, 2, 2)


@there
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_results_are_those_of_the_cpu(architecture: str) -> None:
    backend, expected = backends(architecture)
    joined, reads = continuous(backend, 8), (*Read.means(), ALL_ACTIVATIONS)
    wanted = expected.generate(PROMPTS, Sampling(5), MANY, reads)
    for each in (backend, joined):
        found = each.generate(PROMPTS, Sampling(5), MANY, reads)
        assert found.responses == wanted.responses
        assert_close(found.reads, wanted.reads)
    watch = Watch(direction()[None], lambda _: None, top=2, top_of_prompts=True)
    told = watched_generation(joined, PROMPTS, Sampling(5), watch, MANY)
    assert told.responses == wanted.responses
    for text, edits, asked in ((TEXT, MANY, reads), (SHARED, [], Read.means()), (SHARED, [], ())):
        of, beside = (each.forward(text, edits, asked, logprobs=True) for each in (backend, expected))
        assert_close(of.reads, beside.reads)
        assert_close(dict(enumerate(of.logprobs or ())), dict(enumerate(beside.logprobs or ())))  # type: ignore[arg-type]


@there
def test_parts_are_those_of_the_cpu() -> None:
    backend, expected = backends(thinks=True)
    edits = [Edit.add(1, direction(), 0.4, kind) for kind in (Positions.THINKING, Positions.ANSWER)]
    wanted = expected.generate(PROMPTS, Sampling(6), edits, Read.means())
    for each in (backend, continuous(backend, 8)):
        found = each.generate(PROMPTS, Sampling(6), edits, Read.means())
        assert found.responses == wanted.responses
        assert_close(found.reads, wanted.reads)


@there
def test_samples_do_not_depend_on_company_and_take_no_kernel_for_each_row() -> None:
    backend: Any = backends()[0]
    backend.end_ids = ()
    for each in (backend, continuous(backend, 8)):
        said = each.generate(PROMPTS, Sampling(20, 1.0, seeds=SEEDS)).responses
        alone = [
            each.generate([prompt], Sampling(20, 1.0, seeds=(seed,))).responses[0]
            for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
        ]
        assert list(said) == alone
        assert kernels_of_a_step(each.generate, 2) == kernels_of_a_step(each.generate, 3)


def kernels_of_a_step(generate: Callable[..., object], rows: int) -> float:
    return a_step(lambda new: generate(PROMPTS[:rows], Sampling(new, 1.0, seeds=SEEDS[:rows])))[0]


@there
def test_noise_is_drawn_for_several_steps_at_once() -> None:
    device, noise = torch.device(NAME, 0), Noise(5)
    with Counted() as counted:
        drawn = [noise.draw(number, 7, device) for number in range(32)]
    assert counted.kernels == 2
    for number in (31, 30, 3, 17):  # and again
        assert torch.equal(noise.draw(number, 7, device).cpu(), drawn[number].cpu())
    large = Noise(5)
    with Counted() as counted:
        large.draw(0, 2**19, device)
        large.draw(1, 2**19, device)
        large.draw(2, 2**19, device)
    assert counted.kernels == 2


@there
def test_a_raw_edit_takes_one_kernel_at_each_layer() -> None:
    backend: Any = backend_of(REFERENCE, torch.nn.Module.to(tiny_model(), torch.bfloat16))
    backend.end_ids = ()
    plain = a_step(lambda new: backend.generate(PROMPTS, Sampling(new)))
    for edits in (RAW, BY_ROW):
        found = a_step(lambda new, edits=edits: backend.generate(PROMPTS, Sampling(new), edits))  # type: ignore[misc]
        assert (found[0] - plain[0], found[1:]) == (N_LAYERS, plain[1:])


@there
@pytest.mark.parametrize(
    ("edits", "reads", "seeds"), [([], (), SEEDS), (BY_ROW, Read.means(), None), (MANY, (), SEEDS)]
)
def test_steps_of_calls_together_hand_little_over(
    edits: Sequence[Edit], reads: Sequence[Read], seeds: tuple[int, ...] | None
) -> None:
    """Three transfers: what is to be known of a pass, the places of its tokens, and they; then one is waited for."""
    backend: Any = backends()[0]
    backend.end_ids = ()
    joined, temperature = continuous(backend, 8), 1.0 if seeds else 0.0
    found = a_step(lambda new: joined.generate(PROMPTS, Sampling(new, temperature, seeds=seeds), edits, reads))
    assert found[1] <= 3
    assert found[2] <= 2


@there
def test_shared_prompts_are_handed_out_by_one_index_whatever_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for layers in (1, 3):
        monkeypatch.setattr(tiny, "N_LAYERS", layers)
        backend = backends()[0]
        backend.forward(SHARED, logprobs=True)
        with Counted() as counted:
            backend.forward(SHARED, logprobs=True)
        found.append((counted.to_device, counted.waits))
    assert found[0] == found[1]


@there
def test_log_probabilities_of_rows_that_share_prompts_are_waited_for_once() -> None:
    backend, found = backends()[0], []
    few = TokenBatch.of([SHARED.prompts[0]] * 2, [PROMPTS[0], PROMPTS[0][:-1]])
    more = TokenBatch.of([SHARED.prompts[0]] * 4, [PROMPTS[0], PROMPTS[0][:-1], PROMPTS[0][1:], PROMPTS[0]])
    for text in (few, more):
        backend.forward(text, logprobs=True)
        with Counted() as counted:
            backend.forward(text, logprobs=True)
        found.append(counted.waits)
    assert found[0] == found[1]


@there
def test_a_device_without_float64_gives_the_same_means(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends()[0]
    joined, reads = continuous(backend, 8), Read.means()
    expected = joined.generate(PROMPTS, Sampling(5), (), reads)
    monkeypatch.setattr(StandinTensor, "without", frozenset({torch.float64}))
    with pytest.raises(RuntimeError, match=r"has no torch\.float64"):
        joined.generate(PROMPTS, Sampling(5), (), reads)
    monkeypatch.setattr(intervention, "NO_FLOAT64", (NAME,))
    found = joined.generate(PROMPTS, Sampling(5), (), reads)
    for name, value in expected.reads.items():
        assert torch.equal(found.reads[name].nan_to_num(), value.nan_to_num())

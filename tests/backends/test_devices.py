"""What a GPU waits for: few kernels and fewer transfers for each token; and weights that lie in several places."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from persona_lens.backend import Edit, Read, Sampling, TokenBatch, Watch, open_backend, watched_generation
from persona_lens.backend.continuous import continuous
from tests import tiny
from tests.backends.fixtures import (
    ALL_ACTIVATIONS,
    PROMPTS,
    REFERENCE,
    TEXT,
    assert_close,
    backend_of,
    direction,
    tiny_backend,
)
from tests.standin import NAME, Counted
from tests.tiny import N_LAYERS, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cuda


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations while it is open, but for those that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class Kernels(Counted):
    """The same where they are counted by the device."""

    @property
    def count(self) -> int:
        return self.kernels


def operations() -> Any:
    return Kernels() if tiny.device == NAME else Operations()


def a_step(generate: Callable[[int], object], count: Callable[[], Any]) -> float:
    """How many of something there are for each further token."""
    generate(4)  # what is measured of a model once
    found: list[int] = []
    for new in (4, 8):
        with count() as counted:
            generate(new)
        found.append(counted.count)
    return (found[1] - found[0]) / 4


class CpuCalls:
    """Counts tensors that are brought to the CPU while it is open."""

    def __init__(self) -> None:
        self.count = 0
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> CpuCalls:
        there, listed = torch.Tensor.cpu, torch.Tensor.tolist

        def cpu(tensor: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
            self.count += 1
            return there(tensor, *given, **named)

        def tolist(tensor: torch.Tensor) -> Any:
            self.count += 1
            return listed(tensor)

        self._patch.setattr(torch.Tensor, "cpu", cpu)
        self._patch.setattr(torch.Tensor, "tolist", tolist)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def endless() -> Any:
    backend: Any = backend_of(REFERENCE, tiny_model())
    backend.end_ids = ()
    return backend


@pytest.mark.parametrize("reads", [Read.means(), Read.means()[:1]])
def test_means_take_no_step_for_each_layer_and_token(reads: Sequence[Read]) -> None:
    """A decoding step is launched kernel by kernel, so that some more at each layer are seconds of a generation."""
    backend = endless()
    plain = a_step(lambda new: backend.generate(PROMPTS, Sampling(new)), operations)
    reading = a_step(lambda new: backend.generate(PROMPTS, Sampling(new), (), reads), operations)
    assert 0 < reading - plain <= 6  # whatever the number of layers


def test_one_vector_at_every_layer_takes_a_step_there() -> None:
    backend = endless()
    edits = [Edit.add(layer, direction(), 0.1) for layer in range(N_LAYERS)]
    plain = a_step(lambda new: backend.generate(PROMPTS, Sampling(new)), operations)
    assert a_step(lambda new: backend.generate(PROMPTS, Sampling(new), edits), operations) - plain == N_LAYERS


@pytest.mark.parametrize("top", [None, 3])
def test_a_watch_of_all_layers_and_rows_waits_for_the_device_as_often_as_one_of_a_layer(top: int | None) -> None:
    joined = continuous(endless(), 8)

    def steps(layers: tuple[int, ...] | None, prompts: Sequence[Sequence[int]]) -> float:
        watch = Watch(direction()[None], lambda _: None, layers, top)
        return a_step(lambda new: watched_generation(joined, prompts, Sampling(new), watch), CpuCalls)

    assert steps(None, PROMPTS) - steps((0,), PROMPTS) == 0
    assert steps(None, PROMPTS) == steps(None, PROMPTS[:1])


def test_log_probabilities_of_many_rows_are_brought_at_once() -> None:
    backend = tiny_backend(REFERENCE)
    found = []
    for rows in (1, len(TEXT)):
        with CpuCalls() as counted:
            backend.forward(TEXT.rows(0, rows), logprobs=True)
        found.append(counted.count)
    assert found[0] == found[1]


@pytest.mark.skipif(tiny.device == NAME, reason="it is of the CPU and the disk")
@pytest.mark.parametrize("places", ["cpu and disk", "disk and cpu", "disk"])
def test_a_model_whose_weights_lie_in_several_places_gives_what_it_gives_in_one(tmp_path: Path, places: str) -> None:
    """The device of weights that are offloaded says nothing of where ids go."""
    pytest.importorskip("accelerate")
    whole = tiny_model()
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    first, _, second = places.partition(" and ")
    second = second or first
    names = ("model.embed_tokens", "model.rotary_emb", *(f"model.layers.{n}" for n in range(N_LAYERS)), "model.norm")
    placed = {name: first if number < 3 else second for number, name in enumerate((*names, "lm_head"))}
    backend = open_backend(REFERENCE, str(tmp_path), dtype="float32", device_map=placed)
    assert backend.info.device == "cpu"
    expected = backend_of(REFERENCE, copy.deepcopy(whole).cpu())
    edits, reads = [Edit.ablate(1, direction())], (*Read.means(), ALL_ACTIVATIONS)
    shared = TokenBatch.of([PROMPTS[2]] * 4, [PROMPTS[1], PROMPTS[0], PROMPTS[0][:3], PROMPTS[2][:5]])
    for text, written, asked in ((TEXT, edits, reads), (shared, [], Read.means())):
        found, wanted = (each.forward(text, written, asked, logprobs=True) for each in (backend, expected))
        assert_close(found.reads, wanted.reads)
        assert_close(dict(enumerate(found.logprobs or ())), dict(enumerate(wanted.logprobs or ())))  # type: ignore[arg-type]
    said, wanted_said = (each.generate(PROMPTS, Sampling(4), edits, reads) for each in (backend, expected))
    assert said.responses == wanted_said.responses
    assert_close(said.reads, wanted_said.reads)

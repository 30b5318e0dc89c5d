"""Where the parts of ``benchmarks.gpu`` run: a device, models of random weights on it, and the time that is left."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import workloads as w
from benchmarks.ratios import compare, timed
from benchmarks.record import Figure
from persona_lens.backend import Backend
from tests.tiny import tiny_tokenizer

# Qwen2.5-7B's, and two that fit everywhere: one for what is also run on the CPU, one for trying the script itself.
LARGE: dict[str, int] = {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
SMALL = LARGE | {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
TINY = SMALL | {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
}


class NoTimeLeftError(Exception):
    """What is left of a part's time is not enough for something."""


def random_model(shape: dict[str, int], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A Qwen2 of random weights, made where it runs; its residuals and logits are of common size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    config = AutoConfig.for_model("qwen2", **shape, max_position_embeddings=32768, tie_word_embeddings=False)
    torch.manual_seed(seed)
    with torch.device(device):
        return loader.from_config(config, dtype=dtype).eval()


@dataclass
class Setting:
    """A run's.

    Attributes:
        device: Where models run.
        tiny: Whether only the script itself is tried: everything is small, and no limit on speed is asked for.
        layers: Blocks of the large model; fewer where a card is small.
        most_pairs: Counted pairs of a comparison at most.
        until: When the part that runs has to be over, on the monotonic clock.
        notes: Remarks of the part that runs.
    """

    device: torch.device
    tiny: bool
    layers: int
    most_pairs: int
    until: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds that the part has."""
        return self.until - time.monotonic()

    @property
    def on_cuda(self) -> bool:
        """Whether the device counts its memory, and has more than one precision of float32."""
        return self.device.type == "cuda"

    def settle(self) -> None:
        """Wait until the device is idle."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def small(self, dtype: torch.dtype = torch.float32, device: str | None = None) -> Any:
        """A small model; the same weights everywhere, since they are made on the CPU."""
        shape = TINY if self.tiny else SMALL
        made = random_model(shape, torch.device("cpu"), torch.float32)
        return made.to(device or self.device, dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """For models of random weights: a token a byte; they know ids beyond it too."""
        return tiny_tokenizer()

    @cached_property
    def folder(self) -> TemporaryDirectory[str]:
        """Holds the files of the small model while the run lasts."""
        folder = TemporaryDirectory(prefix="persona-lens-gpu-")
        self.small(device="cpu").save_pretrained(Path(folder.name))
        self.tokenizer.save_pretrained(folder.name)
        return folder

    @cached_property
    def large(self) -> Backend:
        """The large model in bfloat16, and never done before its last token."""
        shape = TINY if self.tiny else LARGE | {"num_hidden_layers": self.layers}
        return w.endless(random_model(shape, self.device, torch.bfloat16), self.tokenizer)

    def forget_large(self) -> None:
        """Let go of it."""
        self.__dict__.pop("large", None)
        self.empty()

    def empty(self) -> None:
        """Give back memory that nothing uses, before memory is looked at."""
        if self.on_cuda:
            torch.cuda.empty_cache()

    def rows(self, count: int, shortest: int = 40, longest: int = 90) -> list[list[int]]:
        """Prompts as long as those of an extraction; their ids are random."""
        made, vocabulary = random.Random(0), TINY["vocab_size"] if self.tiny else SMALL["vocab_size"]
        return [[made.randrange(100, vocabulary) for _ in range(made.randint(shortest, longest))] for _ in range(count)]

    def compared(self, name: str, work: w.Work, baseline: w.Work, limit: float | None, to_come: int = 0) -> Figure:
        """Two pieces of work in turn, in as many pairs as there is time for; ``to_come`` others like it follow.

        Raises:
            NoTimeLeftError: If there is none for a pair.
        """
        first = timed(work, self.settle) + timed(baseline, self.settle)
        share = self.left / (to_come + 1)  # of which each that follows takes a pair to warm up
        pairs = min(self.most_pairs, max(int(self.left >= first), int(share / first - to_come / (to_come + 1))))
        if pairs < 1:
            raise NoTimeLeftError(f"a pair takes {first:.1f} s, and {self.left:.1f} s are left for {name}")
        ratio = compare(name, work, baseline, limit=limit or 0.0, pairs=pairs, settle=self.settle)
        return Figure.of_ratio(ratio, pairs, None if self.tiny else limit)

    def seconds(self, work: Callable[[], object], runs: int) -> list[float]:
        """How long some work takes each time, after it has run once."""
        work()
        return [timed(work, self.settle) for _ in range(runs)]

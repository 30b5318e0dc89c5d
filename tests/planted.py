"""A backend whose responses, residuals and log-probabilities follow a simple rule, so results are known by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import Edit, ForwardResult, Generation, ModelInfo, Operation, Read, Sampling, TokenBatch
from persona_lens.backend.tokens import TokenIds
from persona_lens.traits import Arm, Trait
from tests.tiny import D_MODEL, N_LAYERS, tiny_tokenizer

LEANING = re.compile(r"leaning ([+-]\d+\.\d+)")
Rule = Callable[[int], bool]


def never(seed: int) -> bool:
    """No row."""
    return False


class PlantedBackend:
    """Every row has a leaning L: +1 under a positive instruction, -1 under a negative one, 0 under none.

    Adding ``c`` times the planted direction of a layer adds c to L. The response says L in words. Under a positive
    instruction each of its tokens has the log-probability -2 + L/2, under a negative one -2 - L/2, under none -2: so
    its log-odds are L and its surprise is 2. Residuals are planted: ``response_mean`` is origin + L/2 * direction +
    noise, and so on with other directions for the other reductions; ``response_norm`` is its length. A response without
    a whole ``<think>…</think>`` has no thinking, and one that never closes it no answer.

    Args:
        trait: Whose instructions are recognised in the prompts.
        noise: Standard deviation of the noise, which depends on a row's seed alone.
        disobeys: By its seed: a row whose leaning is turned round.
        silent: By its seed: a row that ends its turn at once.
        max_rows: A larger batch runs out of memory.
        respond: Another text for a response, given its leaning.
        n_layers: How many layers it has.
    """

    shares_prompts = False
    calls_at_once = 1

    def __init__(
        self,
        trait: Trait,
        *,
        noise: float = 0.0,
        disobeys: Rule = never,
        silent: Rule = never,
        max_rows: int = 10**6,
        respond: Callable[[float], str] = "leaning {:+.3f}".format,
        n_layers: int = N_LAYERS,
    ) -> None:
        self.trait, self.noise, self.disobeys, self.silent = trait, noise, disobeys, silent
        self.max_rows, self.respond = max_rows, respond
        self.tokenizer: Any = tiny_tokenizer()
        self.end_ids: tuple[int, ...] = (2,)
        self.info = ModelInfo(
            model="planted",
            revision=None,
            architecture="Planted",
            n_layers=n_layers,
            d_model=D_MODEL,
            weights="sha256:planted",
            dtype="float32",
            device="cpu",
            backend="planted 1",
        )
        generator = torch.Generator().manual_seed(7)
        shape = (n_layers, D_MODEL)
        self.origin = torch.randn(shape, generator=generator).round(decimals=1)
        # Multiples of 1/8: sums of them are exact, so that planted differences are recovered to the bit.
        self.planted = {
            name: (torch.randn(shape, generator=generator) * 8).round() / 8
            for name in ("response_mean", "prompt_mean", "prompt_last")
        }
        self.of_parts = {
            name: (torch.randn(shape, generator=generator) * 8).round() / 8 for name in ("answer_mean", "thinking_mean")
        }
        self.generated: list[int] = []
        self.weighed: list[int] = []

    def arm(self, prompt: Sequence[int]) -> int:
        """+1, -1 or 0: the arm whose instruction the prompt holds."""
        text = self.tokenizer.decode(list(prompt))
        for arm, sign in ((Arm.POSITIVE, 1), (Arm.NEGATIVE, -1)):
            if any(self.trait.instruction(arm, i) in text for i in range(len(self.trait.instructions))):
                return sign
        return 0

    def leanings(self, prompts: Sequence[TokenIds], seeds: Sequence[int], edits: Sequence[Edit]) -> Tensor:
        """Float32 [batch]."""
        own = [self.arm(p) * (-1 if self.disobeys(s) else 1) for p, s in zip(prompts, seeds, strict=True)]
        total = torch.tensor(own, dtype=torch.float32)
        for edit in edits:
            assert edit.operation is Operation.ADD
            planted = self.planted["response_mean"][edit.layer]
            share = edit.direction @ planted / (planted @ planted)
            total = total + torch.as_tensor(edit.coefficient) * share
        return total

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.Backend.generate`."""
        if len(prompts) > self.max_rows:
            raise MemoryError
        self.generated.append(len(prompts))
        seeds = sampling.seeds or (0,) * len(prompts)
        heads = [tuple(prompt) for prompt in prompts]
        leanings = self.leanings(heads, seeds, edits)
        texts = ["" if self.silent(s) else self.respond(float(x)) for s, x in zip(seeds, leanings, strict=True)]
        responses = tuple(tuple(self.tokenizer.encode(text))[: sampling.max_new_tokens] for text in texts)
        values = {read.kind.value: self._values(read.kind.value, heads, seeds, leanings, responses) for read in reads}
        return Generation(responses, tuple(len(r) < sampling.max_new_tokens for r in responses), values)

    def _values(
        self,
        name: str,
        prompts: Sequence[TokenIds],
        seeds: Sequence[int],
        leanings: Tensor,
        responses: Sequence[TokenIds],
    ) -> Tensor:
        rows = []
        for prompt, seed, leaning, response in zip(prompts, seeds, leanings, responses, strict=True):
            of_response = name not in ("prompt_mean", "prompt_last")
            sign = float(leaning) if of_response else self.arm(prompt)
            noise = torch.randn(self.origin.shape, generator=torch.Generator().manual_seed(seed)) * self.noise
            planted = (self.planted | self.of_parts)["response_mean" if name == "response_norm" else name]
            row = self.origin + sign / 2 * planted + noise
            text = self.tokenizer.decode(list(response))
            there = {"thinking_mean": "<think>" in text, "answer_mean": "<think>" not in text or "</think>" in text}
            said = bool(response) and there.get(name, True)
            rows.append(row if said or not of_response else torch.full_like(row, torch.nan))
        found = torch.stack(rows)
        return found.norm(dim=-1) if name == "response_norm" else found

    def forward(
        self,
        tokens: TokenBatch,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
        *,
        logprobs: bool = False,
    ) -> ForwardResult:
        """See `persona_lens.backend.Backend.forward`."""
        assert logprobs
        assert not edits, "the judge runs unsteered"
        self.weighed.append(len(tokens))
        return ForwardResult(logprobs=tuple(map(self._logprobs, tokens.prompts, tokens.responses)))

    def _logprobs(self, prompt: TokenIds, response: TokenIds) -> Tensor:
        said = LEANING.search(self.tokenizer.decode(list(response)))
        leaning = float(said.group(1)) if said else 0.0
        return torch.full((len(response),), -2 + self.arm(prompt) * leaning / 2)

    def editing(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """See `persona_lens.backend.Backend.editing`."""
        raise NotImplementedError

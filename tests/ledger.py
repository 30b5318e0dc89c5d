"""Tokens that really run on models in this process, to be held against what a dry run foretold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import Trainer

from persona_lens.backend import Edit, ForwardResult, Generation, Read, ReadKind, Sampling, TokenBatch
from persona_lens.backend.hooked import HookedBackend
from persona_lens.finetuning.trainer import ProjectionPenalty
from persona_lens.runs.cost import Work


@contextmanager
def ledger() -> Iterator[Counter[str]]:
    """While open, tokens by kind; the small probes of a model that is opened or read for the first time left out.

    Yields:
        Tokens ``generated`` (prompts, and as many new ones as may come), read for their log-probabilities (``weighed``)
        or for what prompts end in (``prompts``), ``trained`` on, read by the base model beside that (``beside``), and
        read for the ``loss``.
    """
    ran: Counter[str] = Counter()
    forward, generate, base = HookedBackend.forward, HookedBackend.generate, ProjectionPenalty.base
    training_step, prediction_step = Trainer.training_step, Trainer.prediction_step

    def forwards(
        self: Any, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        at_prompts = [read.kind for read in reads] == [ReadKind.PROMPT_LAST]
        ran["weighed" if logprobs else "prompts" if at_prompts else "probes"] += sum(tokens.lengths)
        return forward(self, tokens, edits, reads, logprobs=logprobs)

    def generates(
        self: Any, prompts: Any, sampling: Sampling, edits: Sequence[Edit] = (), reads: Sequence[Read] = ()
    ) -> Generation:
        ran["probes" if reads else "generated"] += sum(len(each) + sampling.max_new_tokens for each in prompts)
        return generate(self, prompts, sampling, edits, reads)

    def trains(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
        ran["trained"] += int(inputs["attention_mask"].sum())
        return training_step(self, model, inputs, *more)

    def predicts(self: Any, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        ran["loss"] += int(inputs["attention_mask"].sum())
        return prediction_step(self, model, inputs, *more, **options)

    def penalises(self: ProjectionPenalty, inputs: dict[str, Any]) -> Any:
        ran["beside"] += int(inputs["attention_mask"].sum())
        return base(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HookedBackend, "forward", forwards)
        patch.setattr(HookedBackend, "generate", generates)
        patch.setattr(Trainer, "training_step", trains)
        patch.setattr(Trainer, "prediction_step", predicts)
        patch.setattr(ProjectionPenalty, "base", penalises)
        yield ran


KINDS = {
    "training": "trained",
    "reading in training": "beside",
    "reading for the loss": "loss",
    "reading prompts": "prompts",
    "rollouts": "generated",
    "generating in tasks": "generated",
    "judging": "weighed",
    "reading in tasks": "weighed",
}
"""What the ledger calls the work of a label."""


def foretold(work: Sequence[Work]) -> Counter[str]:
    """The tokens of work as the ledger has them."""
    found: Counter[str] = Counter()
    for each in work:
        found[KINDS[each.label]] += each.tokens
    return found

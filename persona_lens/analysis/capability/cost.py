"""What tasks of lm-evaluation-harness would ask of a model: they run on a stand-in that keeps what it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from persona_lens.analysis.capability.evaluation import BUILTIN_TASK, evaluate_capability
from persona_lens.backend import Backend, Edit, ForwardResult, Generation, Read, Sampling, TokenBatch
from persona_lens.core.progress import no_progress
from persona_lens.runs.cost import Work, generating_work, reading_work, together
from persona_lens.steering import Steering
from persona_lens.steering.given import GivenEdits

# Of every token, in nats: so likely that it may be the likeliest, and not so likely that it surely is. Whether greedy
# decoding writes it is left open then, and what may have to be generated is counted.
OPEN = -1.0


def capability_work(
    backend: Backend, tasks: Sequence[str] = (BUILTIN_TASK,), *, edits: GivenEdits = (), **asked: Any
) -> tuple[Work, ...]:
    """What `evaluate_capability` would ask of the model, whose arguments these are; the tasks are loaded, nothing runs.

    Which answers greedy decoding would write may be known by their probabilities; so what is generated is the most.

    Raises:
        AnalysisError: See `evaluate_capability`.
    """
    counting: Any = _Counting(backend)
    evaluate_capability(counting, tasks, edits=edits, progress=no_progress, **asked)
    return together(counting.work)


def capability_changes_work(
    backend: Backend, arms: Mapping[str, Steering], *, tasks: Sequence[str] | None = None, **asked: Any
) -> tuple[Work, ...]:
    """What `capability_changes` would ask of the model, whose arguments these are; nothing runs."""
    found = list(capability_work(backend, tasks or (BUILTIN_TASK,), **asked))
    for steering in list(arms.values())[:1]:  # what is asked of all of them, and along random directions, is alike
        edited = capability_work(backend, tasks or (BUILTIN_TASK,), edits=steering.edits(), **asked)
        found += [work * (2 * len(arms)) for work in edited]
    return together(found)


@dataclass
class _Counting:
    """A backend in whose place nothing runs."""

    backend: Backend
    work: list[Work] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        call = ([tuple(prompt) for prompt in prompts], sampling, edits, tuple(reads))
        self.work.append(replace(generating_work("generating in tasks", self.backend, [call]), at_most=True))
        return Generation(((),) * len(prompts), (False,) * len(prompts))

    def forward(
        self,
        tokens: TokenBatch,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
        *,
        logprobs: bool = False,
    ) -> ForwardResult:
        found = reading_work("reading in tasks", self.backend, [tokens], reads, edits=edits, logprobs=logprobs)
        self.work.append(found)
        return ForwardResult(logprobs=tuple(torch.full((len(row),), OPEN) for row in tokens.responses))

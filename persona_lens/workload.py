"""`Work`: what a run would ask of a backend, found without asking it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persona_lens.backend.remote import RemoteBackend, Traffic
from persona_lens.judging import Exchange, LikelihoodJudge
from persona_lens.rollouts import Request, Rollouts


@dataclass(frozen=True)
class Work:
    """One kind of work of a run.

    Attributes:
        label: What it is.
        calls: Batches that the backend is handed.
        rows: Texts in them.
        tokens: Tokens in them at most, prompts and responses, padding left out.
        traffic: What goes to and from a server, responses taken to be as long as they may be; None for a model that
            is here.
    """

    label: str
    calls: int
    rows: int
    tokens: int
    traffic: Traffic | None

    @property
    def requests(self) -> int:
        """Requests to a server, or batches for a model that is here."""
        return self.traffic.requests if self.traffic else self.calls


def run_work(rollouts: Rollouts, judge: LikelihoodJudge) -> tuple[Work, ...]:
    """What making these rollouts and judging them asks; nothing runs."""
    return _generation(rollouts), _judging(judge, rollouts.requests, rollouts.settings.max_new_tokens)


def _generation(rollouts: Rollouts) -> Work:
    backend, calls = rollouts.backend, list(rollouts.calls())
    traffic = None
    if isinstance(backend, RemoteBackend):
        traffic = sum((backend.generation_traffic(*call) for call in calls), Traffic())
    longest = rollouts.settings.max_new_tokens
    return Work(
        "rollouts",
        calls=len(calls),
        rows=sum(len(prompts) for prompts, *_ in calls),
        tokens=sum(len(prompt) + longest for prompts, *_ in calls for prompt in prompts),
        traffic=traffic,
    )


def _judging(judge: LikelihoodJudge, requests: Sequence[Request], max_new_tokens: int) -> Work:
    backend, asked = judge.backend, dict.fromkeys(request.question for request in requests)
    passes = [
        tokens
        for question in asked
        for tokens in judge.passes(
            [Exchange(question, "", (0,) * max_new_tokens) for request in requests if request.question == question]
        )
    ]
    traffic = None
    if isinstance(backend, RemoteBackend):
        traffic = sum((backend.forward_traffic(tokens, logprobs=True) for tokens in passes), Traffic())
    return Work(
        "judging",
        calls=len(passes),
        rows=sum(map(len, passes)),
        tokens=sum(sum(tokens.lengths) for tokens in passes),
        traffic=traffic,
    )

"""`Work`: what a run would ask of a backend, found without asking it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_lens.backend import TokenBatch
from persona_lens.backend.protocol import RemoteBackend, Traffic
from persona_lens.extraction.external import ReadRollouts
from persona_lens.judging import Exchange, Judge, LikelihoodJudge, LLMJudge, LocalJudge, exchange_of
from persona_lens.runs.rollouts import Rollouts

if TYPE_CHECKING:
    from persona_lens.models import ChatFormat


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
        cost: US dollars at most, answers from the cache left out; None where nothing is paid or no price is known.
    """

    label: str
    calls: int
    rows: int
    tokens: int
    traffic: Traffic | None = None
    cost: float | None = None

    @property
    def requests(self) -> int:
        """Requests to a server, or batches for a model that is here."""
        return self.traffic.requests if self.traffic else self.calls


def run_work(rollouts: Rollouts, judge: Judge) -> tuple[Work, ...]:
    """What making these rollouts and judging them asks; nothing runs."""
    longest = rollouts.settings.max_new_tokens
    if isinstance(judge, LikelihoodJudge):
        exchanges = [Exchange(request.question, "", (0,) * longest) for request in rollouts.requests]
    else:  # about four characters a token
        exchanges = [Exchange(request.question, "word" * longest) for request in rollouts.requests]
    return _generation(rollouts), *judging_work(judge, exchanges)


def reading_work(rollouts: ReadRollouts, judge: Judge | None, chat: ChatFormat) -> tuple[Work, ...]:
    """What reading these rollouts asks, and judging them unless they came with scores; nothing runs."""
    backend, passes = rollouts.backend, list(rollouts.calls())
    traffic = None
    if isinstance(backend, RemoteBackend):
        traffic = sum((backend.forward_traffic(tokens, (), rollouts.reads) for tokens in passes), Traffic())
    reading = _passes("reading", passes, traffic)
    if judge is None:
        return (reading,)
    return reading, *judging_work(judge, [exchange_of(rollout, chat) for rollout in rollouts.given.rollouts])


def judging_work(judge: Judge, exchanges: Sequence[Exchange]) -> tuple[Work, ...]:
    """What judging these exchanges asks, if nothing of it is in a cache; nothing runs."""
    if isinstance(judge, LLMJudge):
        usage, prices = judge.estimate(exchanges), judge.server.spending.prices
        cost = prices.cost(usage) if prices else None
        return (Work("judging", calls=usage.requests, rows=usage.requests, tokens=usage.tokens, cost=cost),)
    if not isinstance(judge, LikelihoodJudge | LocalJudge):
        return ()  # nothing is known of a judge from elsewhere
    backend, passes = judge.backend, list(judge.passes(exchanges))
    traffic = None
    if isinstance(backend, RemoteBackend):
        traffic = sum((backend.forward_traffic(tokens, logprobs=True) for tokens in passes), Traffic())
    return (_passes("judging", passes, traffic),)


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


def _passes(label: str, passes: Sequence[TokenBatch], traffic: Traffic | None) -> Work:
    return Work(
        label,
        calls=len(passes),
        rows=sum(map(len, passes)),
        tokens=sum(sum(tokens.lengths) for tokens in passes),
        traffic=traffic,
    )

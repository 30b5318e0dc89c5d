"""`Work`: what a run would ask of a backend, found without asking it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from persona_lens.backend import Backend, Edit, Read, Sampling, TokenBatch
from persona_lens.backend.batches import tokens_to_run
from persona_lens.backend.parts.asked import parts_for
from persona_lens.backend.protocol import RemoteBackend, Traffic
from persona_lens.backend.tokens import TokenIds

Call = tuple[list[TokenIds], Sampling, Sequence[Edit], tuple[Read, ...]]
"""Arguments of `Backend.generate` for one batch."""


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
        at_most: Whether the run may turn out to need less, and all of this is only the most.
        precision: That of a model that is trained; None for work on a model as it was opened.
        adapted: Whether an adapter is on that model, which makes it slower.
        spared: How many of the tokens the backend need not run over, as another text read with them has them too.
    """

    label: str
    calls: int
    rows: int
    tokens: int
    traffic: Traffic | None = None
    cost: float | None = None
    at_most: bool = False
    precision: str | None = None
    adapted: bool = False
    spared: int = 0

    def __add__(self, other: Work) -> Work:
        """More work of the same kind."""
        known = [each for each in (self.cost, other.cost) if each is not None]
        return replace(
            self,
            calls=self.calls + other.calls,
            rows=self.rows + other.rows,
            tokens=self.tokens + other.tokens,
            traffic=self.traffic + other.traffic if self.traffic and other.traffic else self.traffic or other.traffic,
            cost=sum(known) if known else None,
            at_most=self.at_most or other.at_most,
            adapted=self.adapted or other.adapted,
            spared=self.spared + other.spared,
        )

    def __mul__(self, times: int) -> Work:
        """The same so many times, once at least."""
        return sum([self] * (times - 1), self)

    @property
    def requests(self) -> int:
        """Requests to a server, or batches for a model that is here."""
        return self.traffic.requests if self.traffic else self.calls


def together(work: Iterable[Work]) -> tuple[Work, ...]:
    """Work of one label as one, in the order in which labels first come."""
    found: dict[str, Work] = {}
    for each in work:
        found[each.label] = found[each.label] + each if each.label in found else each
    return tuple(found.values())


def supposed_text(number: int, tokens: int, between: str = " ") -> str:
    """A text of about so many tokens, another one for every number: what texts have in common may be counted once."""
    return between.join("text" if number >> place & 1 else "word" for place in range(tokens))


def generating_work(label: str, backend: Backend, calls: Sequence[Call]) -> Work:
    """What these calls of `Backend.generate` ask, responses taken to be as long as they may be; nothing runs.

    Raises:
        BackendError: If they edit or read the thinking of a model that never thinks.
    """
    traffic = None
    for _, _, edits, reads in calls:
        parts_for(backend.tokenizer, edits, reads)
    if isinstance(backend, RemoteBackend):
        traffic = sum((backend.generation_traffic(*call) for call in calls), Traffic())
    rows = [len(prompt) + sampling.max_new_tokens for prompts, sampling, *_ in calls for prompt in prompts]
    return Work(label, len(calls), len(rows), sum(rows), traffic)


def reading_work(
    label: str,
    backend: Backend,
    passes: Iterable[TokenBatch],
    reads: Sequence[Read] = (),
    *,
    edits: Sequence[Edit] = (),
    logprobs: bool = False,
) -> Work:
    """What these passes ask, edits, reads and log-probabilities included; nothing runs.

    Raises:
        BackendError: If they read the thinking of a model that never thinks.
    """
    passes, traffic = list(passes), None
    parts_for(backend.tokenizer, reads=reads)
    if isinstance(backend, RemoteBackend):
        sent = (backend.forward_traffic(each, edits, reads, logprobs=logprobs) for each in passes)
        traffic = sum(sent, Traffic())
    rows, tokens = sum(map(len, passes)), sum(sum(each.lengths) for each in passes)
    run = sum(tokens_to_run(backend, each, edits, reads, logprobs=logprobs) for each in passes)
    return Work(label, len(passes), rows, tokens, traffic, spared=tokens - run)

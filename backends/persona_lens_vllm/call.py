"""`Run`: one call of the backend, from its rows and edits to what the workers found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import Edit, Read, Sampling, TokenBatch
from persona_lens.backend.packed.checks import FidelityError
from persona_lens.backend.packed.passes import as_error
from persona_lens.backend.packed.run import PackedRun
from persona_lens.backend.parts.asked import Limited
from persona_lens.backend.tokens import TokenIds, TokenScore
from persona_lens_vllm.caches import cache_keys
from persona_lens_vllm.engine import Engine, Job
from persona_lens_vllm.fidelity import check_outcome
from persona_lens_vllm.worker import Order, Outcome


def noises_of(sampling: Sampling, rows: int, before: int = 0) -> list[dict[str, Any] | None]:
    """What makes the tokens of each row a sample, see `persona_lens_vllm.sampler`."""
    if sampling.seeds is None:
        return [None] * rows
    shared = {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p)}
    return [{"seed": seed, **shared, **({"before": before} if before else {})} for seed in sampling.seeds]


class Run(PackedRun):
    """One call: its order, its requests and what came of them.

    Args:
        engine: Who runs it.
        tokens: As `PackedRun` takes them, and the rest too.
        edits: What to write.
        reads: What to bring back.
        scored: Token ids of each row whose log-probabilities are wanted.
        limited: How far the rows may think, if that is limited.
        rest: The rest.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: TokenBatch,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        *,
        scored: Sequence[TokenIds] | None = None,
        limited: Limited | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(tokens, edits, reads, **rest)
        self._engine = engine
        self.texts = [(*p, *r) for p, r in zip(tokens.prompts, tokens.responses, strict=True)]
        self.salts = cache_keys(edits, tokens)
        wanted = None if scored is None else tuple(map(tuple, scored))
        self.order = Order(self.call, tuple(self.salts), wanted, limited)
        self.outcomes: list[Outcome] = []
        self.job: Job

    @contextmanager
    def open(self) -> Iterator[Job]:
        """The call while its requests run; what came of it is there afterwards, and an error in it is raised."""
        self.job = self._engine.start(self.order)
        try:
            yield self.job
        except BaseException:
            self._engine.end(self.job)
            raise
        self.outcomes = self._engine.end(self.job)
        for outcome in self.outcomes:
            if outcome.error is not None:
                raise as_error(outcome.error)

    def over_text(self, *, anew: bool, noises: Sequence[Mapping[str, Any] | None] | None = None) -> Job:
        """Run over the texts as they are, to what follows each.

        Args:
            anew: Whether from the first token of each, and not from a beginning that is in the cache.
            noises: As `persona_lens_vllm.engine.Job.add` takes them; by default none.
        """
        with self.open() as job:
            given = [None] * len(self.texts) if noises is None else noises
            job.add(self.texts, self.salts, given, max_tokens=1, skip_reading_prefix_cache=anew)
            job.run()
        return job

    def check(self, lengths: Sequence[int], partly: Sequence[int] = ()) -> None:
        """See `PackedRun`."""
        for outcome in self.outcomes:
            check_outcome(self.order, outcome, lengths, partly, self.kinds(lengths))

    def given(self, row: int) -> TokenIds:
        """See `PackedRun`."""
        return self.job.tokens.get(row, ())

    def scores(self, row: int) -> list[TokenScore]:
        """See `PackedRun`."""
        places = zip(self.given(row), self.job.logprobs.get(row, ()), strict=False)
        return [_score(place, token, self.top or 0) for token, place in places]

    def prompt_scores(self, row: int) -> list[TokenScore]:
        """See `PackedRun`."""
        places = zip(self.tokens.prompts[row][1:], self.job.prompt_logprobs.get(row, ())[1:], strict=False)
        return [_score(place, token, self.top or 0) for token, place in places]

    def has_ended(self, row: int) -> bool:
        """See `PackedRun`."""
        return row not in self.job.unfinished

    def stop(self, rows: Sequence[int]) -> None:
        """See `PackedRun`."""
        self.job.stop(rows)

    def watched(self) -> list[Mapping[str, Tensor]]:
        """See `PackedRun`; of all layers."""
        found = [each for each in self._engine.ask("watched", self.job.name) if each]
        if not found:
            return []
        return [{**found[0], "value": torch.cat([each["value"] for each in found], dim=1)}]

    def found(self) -> list[dict[str, dict[str, Tensor]]]:
        """See `PackedRun`."""
        return [outcome.reads for outcome in self.outcomes]

    def logprobs(self) -> tuple[Tensor, ...] | None:
        """Of the responses' tokens, row by row."""
        if self.order.scored is None:
            return None
        flat = next((outcome.logprobs for outcome in self.outcomes if outcome.logprobs is not None), None)
        if flat is None:
            raise FidelityError("no worker has a head that gives log-probabilities; report it with the model's name")
        return torch.split(flat, [len(row) for row in self.order.scored])

    def missing(self) -> list[int]:
        """Rows of which something that is wanted of the response was never computed."""
        began = torch.stack([outcome.tallies.began for outcome in self.outcomes]).amax(dim=0)
        first = torch.tensor(self.order.call.prompts) - int(self.order.scored is not None)
        return (began > first).nonzero().flatten().tolist()


def _score(place: Mapping[int, Any], token: int, top: int) -> TokenScore:
    """What vLLM says of a place, which holds the token that was taken even where others are likelier."""
    likeliest = sorted(place, key=lambda each: place[each].logprob, reverse=True)[:top]
    return TokenScore(token, place[token].logprob, tuple(likeliest), tuple(place[each].logprob for each in likeliest))

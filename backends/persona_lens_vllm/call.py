"""`Run`: one call of the backend, from its rows and edits to what the workers found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import Edit, Read, ReadKind, Sampling, TokenBatch, Watch
from persona_lens.backend.packed import aligned
from persona_lens.backend.packed_call import PackedCall
from persona_lens.backend.streaming import Arrivals, Listener
from persona_lens.backend.tokens import TokenIds, cut_response
from persona_lens_vllm.caches import cache_keys
from persona_lens_vllm.engine import Engine, Job
from persona_lens_vllm.fidelity import FidelityError, check_outcome
from persona_lens_vllm.worker import Order, Outcome


def edits_of_text(edits: Sequence[Edit], text: TokenBatch) -> list[Edit]:
    """Edits of a generation for the text that it made: a mask over the prompts grows by what was not edited."""
    grown = []
    for edit in edits:
        if isinstance(edit.positions, Tensor):
            mask = torch.zeros(len(text), max(text.lengths), dtype=torch.bool)
            for row, (prompt, length) in enumerate(zip(text.prompts, text.lengths, strict=True)):
                first = mask.shape[1] - length
                mask[row, first : first + len(prompt)] = edit.positions[row, -len(prompt) :]
            edit = replace(edit, positions=mask)
        grown.append(edit)
    return grown


def reads_of(reads: Sequence[Read], outcomes: Sequence[Outcome], lengths: Sequence[int]) -> dict[str, Tensor]:
    """What workers have read, each at its own layers, for rows of so many tokens; shapes as `Read` says."""
    found = {}
    for read in reads:
        parts = [o.reads[read.kind] for o in outcomes if read.kind in o.reads]
        if "counts" in parts[0]:
            found[read.kind.value] = torch.cat([part["value"] for part in parts], dim=1)
            continue
        whole = {**parts[0], "value": torch.cat([part["value"] for part in parts], dim=1)}
        k = whole["value"].shape[2]
        values = aligned(whole, lengths, k, whole["value"].shape[1])
        found[read.kind.value] = values.squeeze(-1) if read.kind is ReadKind.NORMS else values
    return found


def noises_of(sampling: Sampling, rows: int, before: int = 0) -> list[dict[str, Any] | None]:
    """What makes the tokens of each row a sample, see `persona_lens_vllm.sampler`."""
    if sampling.seeds is None:
        return [None] * rows
    shared = {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p)}
    return [{"seed": seed, **shared, **({"before": before} if before else {})} for seed in sampling.seeds]


@dataclass
class Told:
    """A watch that is told while a call runs."""

    listener: Listener
    arrivals: Arrivals
    run: Run

    def tell(self) -> None:
        """Tell of what the workers have watched since."""
        responses, over = self.run.so_far()
        for found in self.run.watched():
            self.arrivals.arrived(found["rows"], found["at"], found["value"])
        self.arrivals.tell(responses, over)
        stopped = self.listener.stopped.nonzero().flatten().tolist()
        self.run.job.stop(stopped)


class Run:
    """One call: its order, its requests and what came of them.

    Args:
        engine: Who runs it.
        tokens: The prompts, with the responses that are there already.
        edits: What to write.
        reads: What to bring back.
        n_layers: Blocks of the model.
        end_ids: Token ids that end a response.
        sink_limits: See `persona_lens.backend.sinks`; None where nothing depends on them.
        room: Tokens that may be generated for each row; 0 for a pass over existing text.
        watch: Told as steps end.
        scored: Token ids of each row whose log-probabilities are wanted.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: TokenBatch,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        *,
        n_layers: int,
        end_ids: Sequence[int],
        sink_limits: tuple[float, ...] | None,
        room: int = 0,
        watch: Watch | None = None,
        scored: Sequence[TokenIds] | None = None,
    ) -> None:
        self._engine, self._end_ids, self._reads = engine, tuple(end_ids), reads
        self.tokens = tokens
        self.texts = [(*p, *r) for p, r in zip(tokens.prompts, tokens.responses, strict=True)]
        self.salts = cache_keys(edits, tokens)
        call = PackedCall.of(
            [len(prompt) for prompt in tokens.prompts],
            tokens.lengths,
            edits,
            reads,
            n_layers=n_layers,
            room=room,
            end_ids=self._end_ids if room else (),
            sink_limits=sink_limits,
            watched=None if watch is None else watch.read,
        )
        self.order = Order(call, tuple(self.salts), None if scored is None else tuple(map(tuple, scored)))
        self.told: Told | None = None
        if watch is not None:
            listener, units = Listener(watch, len(tokens)), watch.read.unit_directions(n_layers)
            self.told = Told(listener, Arrivals(listener, tokens.prompts, len(units), units.shape[1], room), self)
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
                raise RuntimeError(outcome.error)  # as it would have come out of a block here

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
        """See `persona_lens_vllm.fidelity.check_outcome`."""
        for outcome in self.outcomes:
            check_outcome(self.order, outcome, lengths, partly)

    def so_far(self) -> tuple[list[TokenIds], list[bool]]:
        """Each row's response, and whether it is over."""
        # In this order: what another thread's step brings in between may be known of a row that seems to go on.
        over = [row not in self.job.unfinished for row in range(len(self.tokens))]
        return list(self.responses()[0]), over

    def responses(self) -> tuple[tuple[TokenIds, ...], tuple[bool, ...]]:
        """What the rows were given, without the end of a turn and what follows."""
        given = [self.job.tokens.get(row, ()) for row in range(len(self.tokens))]
        cut = [cut_response(row, self._end_ids, self.order.call.room) for row in given]
        return tuple(response for response, _ in cut), tuple(ended for _, ended in cut)

    def watched(self) -> list[Mapping[str, Tensor]]:
        """What was watched since this was last asked, of all layers."""
        found = [each for each in self._engine.ask("watched", self.job.name) if each]
        if not found:
            return []
        return [{**found[0], "value": torch.cat([each["value"] for each in found], dim=1)}]

    def reads(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        """What was read, for rows of so many tokens; shapes as `Read` says."""
        return reads_of(self._reads, self.outcomes, lengths)

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

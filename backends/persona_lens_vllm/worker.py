"""Runs in vLLM's workers: carries out the calls of the backend at the blocks of the model.

vLLM mixes the class `ResidualStream` into its worker (``worker_extension_cls``), and its methods are called through
``collective_rpc``. Each request says in its ``extra_args`` which row of which call it is: of one that is open, or
of one of a single row that begins when its request does, as where requests come from clients of a server.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_lens.backend.blocks import search_blocks
from persona_lens.backend.packed.call import PackedCall
from persona_lens.backend.packed.masks import Tallies
from persona_lens.backend.packed.passes import RunningCall, edited_pass
from persona_lens.backend.parts import Parts
from persona_lens.backend.parts.asked import Limited
from persona_lens.backend.sampling import chosen_logprobs
from persona_lens.backend.tokens import FURTHEST
from persona_lens_vllm.caches import Caches, cache_keys
from persona_lens_vllm.stream import stream_of, with_stream
from persona_lens_vllm.tags import Here, tag_of
from persona_lens_vllm.wire import RowOrder

AT_ONCE = 256  # tokens whose logits are in memory together


@dataclass(frozen=True)
class Order:
    """A call as it comes to the workers.

    Attributes:
        call: What to do at the blocks.
        caches: For each row, what its keys and values depend on beside its tokens; rows may only share a cache that is
            of the same.
        scored: For each row the token ids whose log-probabilities are wanted, its response's; None for none.
        limited: How far its rows may think, if that is limited.
    """

    call: PackedCall
    caches: tuple[str, ...]
    scored: tuple[tuple[int, ...], ...] | None = None
    limited: Limited | None = None


@dataclass(frozen=True)
class Outcome:
    """What a worker found.

    Attributes:
        reads: See `persona_lens.backend.packed.intervention.PackedIntervention.results`.
        tallies: What was done.
        logprobs: float32, of all rows one behind another, NaN where nothing was computed; None where this worker has
            no head.
        foreign: Rows that went on from a cache of something else.
        error: What went wrong in a block, after which nothing more was read or edited.
    """

    reads: dict[str, dict[str, Tensor]]
    tallies: Tallies
    logprobs: Tensor | None
    foreign: tuple[int, ...]
    error: str | None


@dataclass(frozen=True)
class Expected:
    """A call of one row, of which the rest is known when its request is there.

    Attributes:
        order: What to do.
        n_layers: Blocks of the model.
        d_model: Their width.
        parts: What tells thinking from answer, if the order asks.
        limited: How far the row may think, if that is limited.
    """

    order: RowOrder
    n_layers: int
    d_model: int
    parts: Parts | None = None
    limited: Limited | None = None

    def begun(self, state: Any) -> Order:
        """The call, with what vLLM knows of its request.

        Raises:
            OrderError: If it is for another text.
        """
        tokens = self.order.check_tokens(state.num_prompt_tokens, self.n_layers, self.d_model)
        params, (prompt,) = state.sampling_params, tokens.prompts
        room = (params.max_tokens or FURTHEST) - 1  # the last token is not run over
        ends = params.stop_token_ids or () if params.ignore_eos else params.all_stop_token_ids
        given = None
        if self.parts is not None:
            text = list(state.prompt_token_ids)
            given = self.parts.given([text[: len(prompt)]], [text[len(prompt) :]])
        call = PackedCall.of(
            [len(prompt)],
            tokens.lengths,
            self.order.edits,
            self.order.reads,
            n_layers=self.n_layers,
            room=room,
            end_ids=tuple(ends) if room else (),
            sink_limits=self.order.sink_limits,
            parts=given,
        )
        scored = (tuple(state.prompt_token_ids[len(prompt) :]),) if self.order.logprobs else None
        return Order(call, tuple(cache_keys(self.order.edits, tokens)), scored)


class ResidualStream:
    """Mixed into vLLM's worker; an attribute of another name than these would have to be looked for there first."""

    def persona_lens_open(self, name: str, order: bytes) -> None:
        """Begin a call; its requests may come."""
        Calls.of(self).open(name, pickle.loads(order))

    def persona_lens_watched(self, name: str) -> bytes | None:
        """What was watched since this was last asked."""
        return Calls.of(self).watched(name)

    def persona_lens_close(self, name: str) -> bytes | None:
        """End a call: its `Outcome`, pickled; None in a worker that holds what another one holds too."""
        return Calls.of(self).close(name)

    def persona_lens_expect(self, name: str, expected: bytes) -> None:
        """Let a call begin with its request."""
        Calls.of(self).expect(name, pickle.loads(expected))

    def persona_lens_take(self, name: str) -> bytes | None:
        """End such a call: its `Order` and its `Outcome`, or an error instead, pickled; or None as above."""
        return Calls.of(self).take(name)


class Running(RunningCall):
    """A call whose requests run."""

    def __init__(self, order: Order, layers: range) -> None:
        super().__init__(order.call.within(layers.start, layers.stop))
        self.order = order
        self.foreign: set[int] = set()
        self.scored = None if order.scored is None else _Scored(order.scored, order.call.prompts)

    def outcome(self) -> Outcome:
        """What was found."""
        intervention, error = self.intervention, self.failure()
        reads = intervention.results() if error is None else {}
        scored = None if self.scored is None else self.scored.values()
        return Outcome(reads, intervention.masks.settled(), scored, tuple(sorted(self.foreign)), error)


class _Scored:
    """Log-probabilities of given tokens, as passes come by that predict them."""

    def __init__(self, ids: Sequence[Sequence[int]], prompts: Sequence[int]) -> None:
        self._prompts = torch.tensor(prompts)
        self._lengths = torch.tensor([len(row) for row in ids])
        self._start = self._lengths.cumsum(0) - self._lengths
        self._ids = torch.tensor([token for row in ids for token in row], dtype=torch.long)
        self._found: list[tuple[Tensor, Tensor]] = []
        self.has_head = False  # as only the last of several stages has

    def wanted(self, call: Running) -> tuple[Tensor, Tensor]:
        """Places in the pass that predict a token that is wanted, and the numbers of those tokens."""
        predicted = call.at + 1 - self._prompts[call.rows]
        index = ((predicted >= 0) & (predicted < self._lengths[call.rows])).nonzero().flatten()
        return call.places[index.to(call.places.device)], (self._start[call.rows] + predicted)[index]

    def take(self, logits: Tensor, numbers: Tensor) -> None:
        self._found.append((numbers, chosen_logprobs(logits, self._ids[numbers].to(logits.device))))

    def values(self) -> Tensor | None:
        if not self.has_head:
            return None
        out = torch.full(self._ids.shape, torch.nan)
        if self._found:
            numbers, values = (torch.cat(parts) for parts in zip(*self._found, strict=True))
            out[numbers] = values.cpu()
        return out


class Calls:
    """The calls that run in a worker, and the hooks on its model while there are any.

    Args:
        worker: vLLM's worker.
    """

    def __init__(self, worker: Any) -> None:
        self._runner = worker.model_runner
        self._model = self._runner.get_model()
        n_layers = self._runner.model_config.get_total_num_hidden_layers()
        blocks = search_blocks(self._model, n_layers, ("", self._model))[1]
        self._blocks = {i: block for i, block in enumerate(blocks) if type(block).__name__ != "PPMissingLayer"}
        self._layers = range(min(self._blocks, default=0), max(self._blocks, default=-1) + 1)
        self._answers = _is_first_of_its_stage()
        self._caches = Caches(self._runner)
        self._hooks: dict[int | str, Any] = {}
        self._active: list[Running] = []
        self.running: dict[str, Running] = {}
        self._expected: dict[str, Expected | str] = {}
        self._serving = False  # from the first that is expected on, every pass is looked at

    @staticmethod
    def of(worker: Any) -> Calls:
        """Those of a worker, from when it is first asked."""
        if not hasattr(worker, "persona_lens_calls"):
            worker.persona_lens_calls = Calls(worker)
        calls: Calls = worker.persona_lens_calls
        return calls

    def expect(self, name: str, expected: Expected) -> None:
        """See `ResidualStream`."""
        self._serving = True
        self._expected[name] = expected
        self._limit(name, expected.limited)
        self._hook()

    def take(self, name: str) -> bytes | None:
        """See `ResidualStream`."""
        waiting, call = self._expected.pop(name, None), self._end(name)
        if not self._answers:
            return None
        failure = waiting if isinstance(waiting, str) else "the request never ran"
        return pickle.dumps(failure if call is None else (call.order, call.outcome()))

    def _call_of(self, name: str, state: Any) -> Running | None:
        """The call of a request, which may begin with it."""
        expected = self._expected.get(name)
        if isinstance(expected, Expected):
            try:
                self.running[name] = Running(expected.begun(state), self._layers)
                del self._expected[name]
                self._hook()
            except Exception as error:  # noqa: BLE001 - told when it is taken
                self._expected[name] = f"{type(error).__name__}: {error}"
        return self.running.get(name)

    def open(self, name: str, order: Order) -> None:
        """See `ResidualStream`."""
        self.running[name] = Running(order, self._layers)
        self._limit(name, order.limited)
        self._hook()

    def _limit(self, name: str, limited: Limited | None) -> None:
        """Let the sampler of this worker know, before requests come."""
        if limited is not None:
            Here.limits[name] = limited

    def close(self, name: str) -> bytes | None:
        """See `ResidualStream`; the hooks go with the last call."""
        call = self._end(name)
        return None if call is None or not self._answers else pickle.dumps(call.outcome())

    def _end(self, name: str) -> Running | None:
        Here.limits.pop(name, None)
        call = self.running.pop(name, None)
        self._active = [each for each in self._active if each is not call]
        self._hook()
        return call

    def watched(self, name: str) -> bytes | None:
        """See `ResidualStream`; None where another worker says the same."""
        return pickle.dumps(self.running[name].intervention.watched()) if self._answers else None

    def _hook(self) -> None:
        needed = {layer for call in self.running.values() for layer in call.intervention.layers}
        watching = bool(self.running) or self._serving
        if watching and "begin" not in self._hooks:
            self._hooks["begin"] = self._model.register_forward_pre_hook(lambda *_: self._begin_pass())
            self._hooks["end"] = self._model.register_forward_hook(lambda _, __, output: self._end_pass(output))
        for key in [key for key in self._hooks if key not in needed and (isinstance(key, int) or not watching)]:
            self._hooks.pop(key).remove()
        for layer in needed.difference(self._hooks):
            self._hooks[layer] = self._blocks[layer].register_forward_hook(partial(self._at_block, layer))

    def _begin_pass(self) -> None:
        """Find out whose tokens the pass holds; the scheduler has put some of each of several requests into it."""
        batch, count = self._runner.input_batch, self._runner.input_batch.num_reqs
        self._active = []
        if not count:
            return
        starts = np.asarray(self._runner.query_start_loc.np[: count + 1], dtype=np.int64)
        computed = np.asarray(batch.num_computed_tokens_cpu[:count], dtype=np.int64)
        members: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, request in enumerate(batch.req_ids[:count]):
            state = self._runner.requests[request]
            tag = tag_of(state.sampling_params)
            call, row = self._call_of(tag.get("call", ""), state), tag.get("row", 0)
            cache = call.order.caches[row] if call is not None else ""
            done, new = int(computed[number]), int(starts[number + 1] - starts[number])
            if not self._caches.follows(request, state.block_ids, cache, done, new) and call is not None:
                call.foreign.add(row)
            if call is not None and call.error is None:
                members[tag["call"]].append((number, row))
        ids = self._runner.input_ids.gpu
        for name, found in members.items():
            call = self.running[name]
            numbers, rows = np.array(found, dtype=np.int64).T
            lengths = starts[numbers + 1] - starts[numbers]
            within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
            places, at = within + np.repeat(starts[numbers], lengths), within + np.repeat(computed[numbers], lengths)
            whose, at, places = (torch.from_numpy(each) for each in (np.repeat(rows, lengths), at, places))
            call.begin_pass(whose, at, places, ids[: starts[-1]])
            self._active.append(call)

    def _at_block(self, layer: int, _: Any, __: Any, output: Any) -> Any:
        calls = [call for call in self._active if call.error is None and layer in call.intervention.layers]
        if not calls:
            return None
        try:  # what is raised in here would end the engine, and with it everybody's requests
            stream = stream_of(output)
        except Exception as error:  # noqa: BLE001 - told when the calls are closed
            for call in calls:
                call.error = f"{type(error).__name__}: {error}"
            return None
        changed = edited_pass(calls, layer, stream)
        return None if changed is None else with_stream(output, changed)

    def _end_pass(self, output: Any) -> None:
        """Score what the pass predicts; the head runs over nothing else."""
        if not isinstance(output, Tensor):
            return
        for call in self._active:
            if call.scored is None or call.error is not None:
                continue
            try:
                call.scored.has_head = True
                places, numbers = call.scored.wanted(call)
                for start in range(0, len(places), AT_ONCE):
                    some = slice(start, start + AT_ONCE)
                    logits = self._model.compute_logits(output[places[some]])
                    if logits is not None:  # of several parallel workers one may get them
                        call.scored.take(logits, numbers[some])
            except Exception as error:  # noqa: BLE001 - as above
                call.error = f"{type(error).__name__}: {error}"


def _is_first_of_its_stage() -> bool:
    """Whether this worker is the one of its pipeline stage that answers; the others hold the same stream."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)

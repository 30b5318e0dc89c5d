"""Rollouts: a model's responses, made or read again, saved batch by batch with what was read on the way."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from persona_lens.backend import Backend, Edit, Read, TokenBatch
from persona_lens.backend.batches import (
    MAX_TOKENS,
    batches_by_length,
    check_fits,
    context_length,
    forward_plan,
    forward_rows,
    generate_rows,
)
from persona_lens.backend.parts.asked import limited_for
from persona_lens.backend.tokens import ID_LIMIT, TokenIds
from persona_lens.core.progress import Progress, no_progress
from persona_lens.models import ChatFormat
from persona_lens.models.chat import note_reasoning
from persona_lens.models.reasoning import note_unanswered
from persona_lens.runs.chunks import ADVICE, Pieces, Row, load_shard, pack_shard, shard_layer
from persona_lens.runs.cost import Call, Work, generating_work, reading_work, supposed_text
from persona_lens.runs.folder import RunError, RunFolder
from persona_lens.runs.settings import RolloutSettings

ROLLOUTS = "rollouts.jsonl"
ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Request:
    """One response to ask for.

    Attributes:
        system: System prompt, or None for none.
        question: User message.
        seed: Seed of the row's sampling.
        labels: What the request is for, such as its arm and question number; copied into its rollout.
        examples: Questions and answers that stand before the question as turns of the same conversation.
    """

    system: str | None
    question: str
    seed: int
    labels: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One response with what it answers.

    Attributes:
        request: What was asked.
        prompt_tokens: Length of the prompt as sent.
        response_ids: Token ids of the response, the end-of-turn token left out.
        ended: Whether the model ended its turn within the length limit; None where that is not known.
        response: The answer as text, without reasoning and control tokens.
    """

    request: Request
    prompt_tokens: int
    response_ids: tuple[int, ...]
    ended: bool | None
    response: str

    def to_row(self) -> dict[str, Any]:
        """The rollout as one line of ``rollouts.jsonl``."""
        return {
            **self.request.labels,
            "seed": self.request.seed,
            "system": self.request.system,
            "question": self.request.question,
            "prompt_tokens": self.prompt_tokens,
            "response_ids": list(self.response_ids),
            "ended": self.ended,
            "response": self.response,
        }

    @staticmethod
    def from_row(row: Mapping[str, Any], request: Request) -> Rollout:
        """The rollout that `to_row` wrote for this request.

        Raises:
            KeyError, TypeError: If it is no such row.
        """
        tokens, ids, ended, response = (row[name] for name in ("prompt_tokens", "response_ids", "ended", "response"))
        whole = isinstance(ids, list) and all(
            type(number) is int and 0 <= number < ID_LIMIT for number in (tokens, *ids)
        )
        if not (whole and (ended is None or type(ended) is bool) and isinstance(response, str)):
            raise TypeError("values of other types")
        return Rollout(request, tokens, tuple(ids), ended, response)


EditsFor = Callable[[Sequence[Request]], Sequence[Edit]]


class RolloutBatches(ABC):
    """Requests and their responses in a run folder, made batch by batch.

    A batch is saved whole: first what was read, in a file of its own, then its rows; so a batch that was interrupted is
    simply run again.

    Args:
        backend: The model.
        requests: What is asked, in the order that indices refer to.
        batches: Indices of the requests that run together; every index once.
        reads: What is read.
        folder: Where to save, under names that begin with ``prefix``; None keeps all in memory.
        prefix: Distinguishes several sets of rollouts in a folder.
    """

    def __init__(
        self,
        backend: Backend,
        requests: Sequence[Request],
        batches: Sequence[list[int]],
        *,
        reads: Sequence[Read] = (),
        folder: RunFolder | None = None,
        prefix: str = "",
    ) -> None:
        self.backend = backend
        self.requests = list(requests)
        self.batches = list(batches)
        self.reads = tuple(reads)
        self.folder = folder
        self.prefix = prefix
        self._kept: dict[int, dict[str, Tensor]] = {}

    def run(self, progress: Progress = no_progress) -> list[Rollout]:
        """Run what is not there yet, and return every rollout in the order of the requests."""
        label = f"{self.prefix.rstrip('-') or 'extraction'} rollouts"
        purposes = list(map(self._purpose, range(len(self.requests))))
        name = self.prefix + ROLLOUTS
        form = partial(Rollout.from_row, request=Request(None, "", 0))
        pieces = Pieces(self.folder, name, self.batches, purposes, self._has_tensors, form)
        rows = pieces.run(
            self._run_batch,
            at_once=self.backend.calls_at_once,
            report=lambda done: progress(done, len(self.requests), label),
        )
        return [Rollout.from_row(row, request) for row, request in zip(rows, self.requests, strict=True)]

    def reductions(self) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """What was read, batch by batch: indices of requests, and tensors whose first axis follows them."""
        for number, batch in enumerate(self.batches):
            yield batch, self._saved(number) if self.folder else self._kept[number]

    def at_layer(self, name: str, layer: int) -> Tensor:
        """One layer of what was read under a name, for every request: [requests, …]. The rest stays on the disk."""
        found: Tensor | None = None
        for number, batch in enumerate(self.batches):
            file = self.folder.path / self._shard(number) if self.folder else None
            kept = shard_layer(file, name, layer) if file else self._kept[number][name][:, layer]
            found = kept.new_empty(len(self.requests), *kept.shape[1:]) if found is None else found
            found[batch] = kept
        assert found is not None  # of requests
        return found

    @abstractmethod
    def work(self) -> Work:
        """What `run` would ask of the model; nothing runs."""

    @abstractmethod
    def _make(self, batch: Sequence[int]) -> tuple[list[Row], dict[str, Tensor]]:
        """The rows of a batch's rollouts, and what was read."""

    def _purpose(self, index: int) -> str:
        """What a row is for, in words that tell it from all others."""
        asked = self.requests[index]
        return json.dumps([asked.system, asked.question, asked.seed, dict(asked.labels), asked.examples])

    def _run_batch(self, number: int) -> list[Row]:
        """Make a batch; its tensors are kept before its rows, so that rows never stand there without them."""
        rows, tensors = self._make(self.batches[number])
        if self.folder is None:
            self._kept[number] = tensors
        elif tensors:
            self.folder.write_bytes(self._shard(number), pack_shard(tensors, self._identity(number)), replace=True)
        return rows

    def _has_tensors(self, number: int) -> bool:
        """Whether what was read in a batch is there; without, the batch is run again."""
        assert self.folder is not None
        return not self.reads or (self.folder.path / self._shard(number)).exists()

    def _identity(self, number: int) -> dict[str, Any]:
        """What a batch's tensors are of."""
        batch = self.batches[number]
        purposes = json.dumps([self._purpose(index) for index in batch])
        return {"rows": list(batch), "purposes": hashlib.sha256(purposes.encode()).hexdigest()}

    def _saved(self, number: int) -> dict[str, Tensor]:
        assert self.folder is not None
        file = self.folder.path / self._shard(number)
        tensors = load_shard(file, self._identity(number))
        if any(tensor.shape[:1] != (len(self.batches[number]),) for tensor in tensors.values()):
            raise RunError(f"{file} does not hold a row for each response; {ADVICE}")
        return tensors

    def _shard(self, number: int) -> str:
        return f"{ACTIVATIONS}/{self.prefix}batch-{number:05d}.safetensors"


class Rollouts(RolloutBatches):
    """Planned requests, to which the model responds.

    Requests are cut into batches once, by the length of their prompts.

    Args:
        backend: The model.
        chat: Turns a request into token ids.
        requests: What to ask, in the order that indices refer to.
        settings: How.
        folder: Where to save, under names that begin with ``prefix``; None keeps all in memory.
        reads: What to read while generating.
        edits_for: Edits of a batch, given its requests.
        prefix: Distinguishes several sets of rollouts in a folder.

    Raises:
        ContextError: If a prompt and its response would not fit the model.
        TokenError: If thinking is to be limited, and the model never thinks.
    """

    def __init__(
        self,
        backend: Backend,
        chat: ChatFormat,
        requests: Sequence[Request],
        settings: RolloutSettings,
        *,
        folder: RunFolder | None = None,
        reads: Sequence[Read] = (),
        edits_for: EditsFor | None = None,
        prefix: str = "",
    ) -> None:
        self.chat = chat
        self.settings = settings
        self.edits_for = edits_for
        note_reasoning(chat)
        self._prompts = [tuple(chat.encode(r.system, r.question, r.examples)) for r in requests]
        check_fits(context_length(backend), map(len, self._prompts), settings.max_new_tokens)
        limited_for(backend.tokenizer, settings.thinking_budget)  # raises for thinking that the model never does
        longest = [len(prompt) + settings.max_new_tokens for prompt in self._prompts]
        batches = batches_by_length(longest, settings.batch_size, settings.batch_tokens)
        super().__init__(backend, requests, batches, reads=reads, folder=folder, prefix=prefix)

    def run(self, progress: Progress = no_progress) -> list[Rollout]:
        """See `RolloutBatches.run`; says where responses came to no answer."""
        found = super().run(progress)
        note_unanswered(self.chat.parts, [each.response for each in found], [each.ended for each in found])
        return found

    def calls(self) -> Iterator[Call]:
        """What `run` would hand to `Backend.generate`, batch by batch."""
        return map(self._call, self.batches)

    def work(self) -> Work:
        """See `RolloutBatches.work`; every response is taken to be as long as it may be."""
        return generating_work("rollouts", self.backend, list(self.calls()))

    def longest(self) -> Texts:
        """The responses if every one were as long as it may be: about four characters a token."""
        tokens = self.settings.max_new_tokens
        supposed = tuple(
            Rollout(request, 0, (number, *(0,) * (tokens - 1)), None, supposed_text(number, tokens, between=""))
            for number, request in enumerate(self.requests)
        )
        return Texts(supposed, tuple(self._prompts))

    def _call(self, batch: Sequence[int]) -> Call:
        requests = [self.requests[i] for i in batch]
        edits = self.edits_for(requests) if self.edits_for else ()
        sampling = self.settings.sampling([r.seed for r in requests])
        return [self._prompts[i] for i in batch], sampling, edits, self.reads

    def _make(self, batch: Sequence[int]) -> tuple[list[Row], dict[str, Tensor]]:
        call = self._call(batch)
        found = generate_rows(self.backend, *call)
        rollouts = [
            Rollout(self.requests[i], len(prompt), ids, end, self.chat.answer(ids))
            for i, prompt, ids, end in zip(batch, call[0], found.responses, found.ended, strict=True)
        ]
        return [rollout.to_row() for rollout in rollouts], dict(found.reads)


@dataclass(frozen=True)
class Texts:
    """Responses that are there, to be read by a model.

    Attributes:
        rollouts: The responses.
        prompts: Token ids of each one's prompt.
    """

    rollouts: tuple[Rollout, ...]
    prompts: tuple[TokenIds, ...]

    @property
    def requests(self) -> list[Request]:
        """What the responses answer."""
        return [rollout.request for rollout in self.rollouts]

    @property
    def tokens(self) -> TokenBatch:
        """Prompts and responses."""
        return TokenBatch(self.prompts, tuple(rollout.response_ids for rollout in self.rollouts))


class ReadRollouts(RolloutBatches):
    """Responses that are there, read by the model in a run folder.

    Batches are planned once: rows of like length together, or, where the backend computes a prompt only once, those of
    the same prompts.

    Args:
        backend: The model.
        given: The responses.
        settings: Its sizes of a batch are used, and nothing else.
        folder: Where to save, under names that begin with ``prefix``; None keeps all in memory.
        reads: What to read.
        prefix: Distinguishes several sets of rollouts in a folder.
    """

    def __init__(
        self,
        backend: Backend,
        given: Texts,
        settings: RolloutSettings,
        *,
        folder: RunFolder | None = None,
        reads: Sequence[Read] = (),
        prefix: str = "",
    ) -> None:
        self.given = given
        self._tokens = given.tokens
        # Above the most that any device is fast at, the limit says nothing.
        limit = settings.batch_tokens if settings.batch_tokens < MAX_TOKENS else None
        batches = forward_plan(backend, self._tokens, (), reads, max_rows=settings.batch_size, max_tokens=limit)
        super().__init__(backend, given.requests, batches, reads=reads, folder=folder, prefix=prefix)

    def calls(self) -> Iterator[TokenBatch]:
        """What `run` would hand to `Backend.forward`, batch by batch."""
        return map(self._tokens.chosen, self.batches)

    def work(self) -> Work:
        """See `RolloutBatches.work`."""
        return reading_work("reading", self.backend, self.calls(), self.reads)

    def _purpose(self, index: int) -> str:
        given = self.given.rollouts[index]
        return json.dumps([super()._purpose(index), given.response_ids, given.response])

    def _make(self, batch: Sequence[int]) -> tuple[list[Row], dict[str, Tensor]]:
        found = forward_rows(self.backend, self._tokens.chosen(batch), (), self.reads)
        rows = (self.given.rollouts[index].to_row() for index in batch)
        # Nothing was sampled here, so there is no seed.
        return [{name: value for name, value in row.items() if name != "seed"} for row in rows], dict(found.reads)


def row_seed(base: int, *parts: object) -> int:
    """A seed for one row, from the run's seed and what the row is for; the same on every machine."""
    text = "\0".join(map(str, (base, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1

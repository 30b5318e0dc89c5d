"""`Weighing`: log-probabilities of parts of texts that are there, which one pass over a whole text gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from persona_lens.backend import Backend, Edit, TokenBatch
from persona_lens.backend.batches import batches_of_passes, forward_rows
from persona_lens.backend.tokens import TokenIds
from persona_lens.core.progress import Progress
from persona_lens.runs import RunFolder
from persona_lens.runs.chunks import Pieces, Row
from persona_lens.runs.cost import Work, reading_work

MAX_ROWS = 256
Edited = Callable[[Sequence[int], int], Sequence[Edit]]
"""Gives the edits of a batch: the numbers of its passages, and how many tokens wide it is."""


@dataclass(frozen=True)
class Passage:
    """A text, of which parts are weighed.

    Attributes:
        ids: Its tokens.
        spans: First token of each part, and the one behind its last, in order.
        edited: Where the model is steered while it runs over the text.
    """

    ids: TokenIds
    spans: tuple[tuple[int, int], ...]
    edited: tuple[range, ...] = ()

    @staticmethod
    def behind(prompt: Sequence[int], text: Sequence[int]) -> Passage:
        """A prompt with a text behind it, which is weighed as a whole."""
        return Passage((*prompt, *text), ((len(prompt), len(prompt) + len(text)),))

    @property
    def first(self) -> int:
        """The first token that is weighed."""
        return self.spans[0][0] if self.spans else len(self.ids) - 1


@dataclass(frozen=True)
class Weighing:
    """Passages whose parts are weighed, batch by batch, in a run folder.

    Attributes:
        backend: The model.
        passages: What is read.
        purposes: What tells each from others.
        name: The file, and what the work is called.
        edits: See `Edited`; None for none.
    """

    backend: Backend
    passages: Sequence[Passage]
    purposes: Sequence[str]
    name: str
    edits: Edited | None = None

    def run(self, folder: RunFolder | None, progress: Progress) -> list[list[float]]:
        """The log-probability in nats of each part of each passage."""
        batches, total = self._batches(), len(self.passages)
        pieces = Pieces(folder, f"{self.name}.jsonl", batches, self.purposes, form=_logprobs)
        rows = pieces.run(
            lambda number: self._weighed(batches[number]),
            at_once=self.backend.calls_at_once,
            report=lambda done: progress(done, total, self.name),
        )
        return list(map(_logprobs, rows))

    def work(self) -> Work:
        """What it asks of the model; nothing runs."""
        passes = [self._tokens(batch) for batch in self._batches()]
        return reading_work(self.name, self.backend, passes, logprobs=True)

    def _batches(self) -> list[list[int]]:
        return batches_of_passes([len(each.ids) for each in self.passages], MAX_ROWS, self.backend.info.device)

    def _tokens(self, batch: Sequence[int]) -> TokenBatch:
        chosen = [self.passages[number] for number in batch]
        return TokenBatch.of([each.ids[: each.first] for each in chosen], [each.ids[each.first :] for each in chosen])

    def _weighed(self, batch: Sequence[int]) -> list[Row]:
        tokens = self._tokens(batch)
        edits = self.edits(batch, max(tokens.lengths)) if self.edits else ()
        found = forward_rows(self.backend, tokens, edits, logprobs=True).logprobs or ()
        chosen = [self.passages[number] for number in batch]
        return [
            {"logprobs": [float(values[a - each.first : b - each.first].sum()) for a, b in each.spans]}
            for each, values in zip(chosen, found, strict=True)
        ]


def _logprobs(row: Row) -> list[float]:
    found = row["logprobs"]
    if not all(isinstance(value, float) for value in found):
        raise TypeError("log-probabilities are numbers")
    return list(found)

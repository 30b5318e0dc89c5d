"""`PackedRun`: one call in packed passes, from its rows and edits to what came of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from persona_lens.backend.arrivals import Arrivals
from persona_lens.backend.edits import Edit, Edits, as_edits
from persona_lens.backend.packed.call import PackedCall
from persona_lens.backend.packed.intervention import aligned
from persona_lens.backend.parts import Parts
from persona_lens.backend.protocol import ForwardResult, Generation, ModelInfo
from persona_lens.backend.reads import Read, ReadKind, check_reads
from persona_lens.backend.streaming import Listener, Watch
from persona_lens.backend.tokens import Sampling, TokenBatch, TokenIds, TokenScore, cut_response


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


def reads_of(
    reads: Sequence[Read], parts: Sequence[Mapping[str, Mapping[str, Tensor]]], lengths: Sequence[int]
) -> dict[str, Tensor]:
    """What was read in several places, each at its own layers, for rows of so many tokens; shapes as `Read` says."""
    found = {}
    for read in reads:
        mine = [part[read.kind] for part in parts if read.kind in part]
        if "counts" in mine[0]:
            found[read.kind.value] = torch.cat([part["value"] for part in mine], dim=1)
            continue
        whole = {**mine[0], "value": torch.cat([part["value"] for part in mine], dim=1)}
        values = aligned(whole, lengths, whole["value"].shape[2], whole["value"].shape[1])
        found[read.kind.value] = values.squeeze(-1) if read.kind is ReadKind.NORMS else values
    return found


class PackedBackend(ABC):
    """The two ways in which a backend is asked to generate, of which the watched one is told as steps end."""

    info: ModelInfo

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, edits: Edits = (), reads: Sequence[Read] = ()
    ) -> Generation:
        """See `persona_lens.backend.protocol.Backend.generate`."""
        return self._generate(prompts, sampling, as_edits(edits), reads, None)

    def generate_watched(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Watch,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.streaming.WatchableBackend.generate_watched`."""
        check_reads([watch.read], self.info.n_layers, self.info.d_model)
        return self._generate(prompts, sampling, as_edits(edits), reads, watch)

    @abstractmethod
    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        watch: Watch | None,
    ) -> Generation:
        """Both of them."""


class PackedRun(ABC):
    """A call; whoever runs it says how its rows stand and what was found.

    Attributes:
        tokens: See below.
        top: See `persona_lens.backend.streaming.Watch`, here and next.
        top_of_prompts: The other.
        call: What to do, as plain data.

    Args:
        tokens: The prompts, with the responses that are there already.
        edits: What to write.
        reads: What to bring back.
        n_layers: Blocks of the model.
        end_ids: Token ids that end a response.
        sink_limits: See `persona_lens.backend.sinks`; None where nothing depends on them.
        room: Tokens that may be generated for each row; 0 for a pass over existing text.
        watch: Told as steps end.
        parts: What tells thinking from answer, if anybody asks.
    """

    def __init__(
        self,
        tokens: TokenBatch,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        *,
        n_layers: int,
        end_ids: Sequence[int],
        sink_limits: tuple[float, ...] | None,
        room: int = 0,
        watch: Watch | None = None,
        parts: Parts | None = None,
    ) -> None:
        self.tokens = tokens
        self.top = None if watch is None else watch.top
        self.top_of_prompts = watch is not None and watch.top_of_prompts
        self._edits, self._reads, self._end_ids = edits, reads, tuple(end_ids)
        self._parts = parts
        self.call = PackedCall.of(
            [len(prompt) for prompt in tokens.prompts],
            tokens.lengths,
            edits,
            reads,
            n_layers=n_layers,
            room=room,
            end_ids=self._end_ids if room else (),
            sink_limits=sink_limits,
            watched=None if watch is None else watch.read,
            parts=None if parts is None else parts.given(tokens.prompts, tokens.responses),
        )
        self._listener = None if watch is None else Listener(watch, tokens.prompts)
        self._arrivals: Arrivals | None = None
        if watch is not None and self._listener is not None:
            units = watch.read.unit_directions(n_layers)
            self._arrivals = Arrivals(self._listener, tokens.prompts, len(units), units.shape[1], room)

    @abstractmethod
    def given(self, row: int) -> TokenIds:
        """The tokens that were generated for a row so far."""

    @abstractmethod
    def scores(self, row: int) -> Sequence[TokenScore]:
        """How likely each of them was, where a watch asks for that."""

    @abstractmethod
    def prompt_scores(self, row: int) -> Sequence[TokenScore]:
        """How likely the tokens of its prompt were but the first, where a watch asks for that."""

    @abstractmethod
    def has_ended(self, row: int) -> bool:
        """Whether the row is given no more."""

    @abstractmethod
    def watched(self) -> list[Mapping[str, Tensor]]:
        """What was watched since this was last asked, see `persona_lens.backend.packed.intervention.aligned`."""

    @abstractmethod
    def stop(self, rows: Sequence[int]) -> None:
        """Let rows be given no more."""

    @abstractmethod
    def check(self, lengths: Sequence[int], partly: Sequence[int] = ()) -> None:
        """See `persona_lens.backend.packed.checks.check_done`."""

    @abstractmethod
    def found(self) -> Sequence[Mapping[str, Mapping[str, Tensor]]]:
        """What was read, see `persona_lens.backend.packed.intervention.PackedIntervention.results`, in each place."""

    def kinds(self, lengths: Sequence[int]) -> tuple[bytes, ...] | None:
        """What the first tokens of each row are, a byte for each; None where nobody asks."""
        if self._parts is None:
            return None
        pairs = zip(self.tokens.prompts, self.tokens.responses, strict=True)
        texts = [(*response, *self.given(row)) for row, (_, response) in enumerate(pairs)]
        found = self._parts.given(self.tokens.prompts, texts).kinds
        return tuple(row[:length] for row, length in zip(found, lengths, strict=True))

    def reads(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        """What was read, for rows of so many tokens; shapes as `Read` says."""
        return reads_of(self._reads, self.found(), lengths)

    def responses(self) -> tuple[tuple[TokenIds, ...], tuple[bool, ...]]:
        """What the rows were given, without the end of a turn and what follows; and whether each ended by itself."""
        cut = [cut_response(self.given(row), self._end_ids, self.call.room) for row in range(len(self.tokens))]
        return tuple(response for response, _ in cut), tuple(ended for _, ended in cut)

    def tell(self) -> None:
        """Tell a watch of what has come since, and stop what it wants stopped."""
        if self._arrivals is None or self._listener is None:
            return
        # In this order: what another thread's step brings in between may be known of a row that seems to go on.
        over = [self.has_ended(row) for row in range(len(self.tokens))]
        responses = self.responses()[0]
        for found in self.watched():
            self._arrivals.arrived(found["rows"], found["at"], found["value"])
        scores = None if self.top is None else [self.scores(row) for row in range(len(self.tokens))]
        self._arrivals.tell(responses, over, scores)
        self.stop([row for row, stopped in enumerate(self._listener.are_stopped) if stopped])

    def generation(self, *, more: bool, forward: Callable[..., ForwardResult]) -> Generation:
        """What came of a generation that is over.

        Args:
            more: Whether the last token of each response was run over too.
            forward: The backend's, for rows that a watch stopped: they may have been read further than they go.

        Raises:
            FidelityError: If something was not done that had to be.
        """
        responses, ended = self.responses()
        stopped = False
        if self._listener is not None:
            responses, ended = self._listener.cut(responses, ended)
            stopped = bool(self._listener.stopped.any())
        text = TokenBatch.of(self.tokens.prompts, responses)
        if stopped and self._reads:
            reads = forward(text, edits_of_text(self._edits, text), self._reads).reads
        else:
            self.check(text.lengths if more else [length - 1 for length in text.lengths])
            reads = self.reads(text.lengths)
        return Generation(responses, ended, reads, self._all_scores(responses, ended))

    def _all_scores(
        self, responses: Sequence[TokenIds], ended: Sequence[bool]
    ) -> tuple[tuple[TokenScore, ...], ...] | None:
        if self.top is None:
            return None
        kept = [len(response) + end for response, end in zip(responses, ended, strict=True)]
        return tuple((*self.prompt_scores(row), *self.scores(row)[:new]) for row, new in enumerate(kept))

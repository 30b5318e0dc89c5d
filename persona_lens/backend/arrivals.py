"""`Arrivals`: tells a watch pass by pass of values that come in whatever order, or once a generation is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_lens.backend.edits import Edits, as_edits
from persona_lens.backend.protocol import Generation
from persona_lens.backend.reads import Read, ReadError, ReadKind
from persona_lens.backend.streaming import Listener, Watch, WatchedTokens
from persona_lens.backend.tokens import Sampling, TokenBatch, TokenIds, TokenScore


class Arrivals:
    """Tells of a generation pass by pass, while the values of its rows' tokens come in whatever order.

    A pass is told once everything is there that belongs to it: the prompts of all rows, and then one token of each row
    that says more.

    Args:
        listener: Whom to tell.
        prompts: Token ids of each row's prompt.
        layers: How many layers are watched.
        k: Values of a token at each.
        room: Tokens that a response may have.
    """

    def __init__(self, listener: Listener, prompts: Sequence[TokenIds], layers: int, k: int, room: int) -> None:
        self._listener = listener
        self._prompts = [tuple(prompt) for prompt in prompts]
        self._width = max(map(len, self._prompts))
        self._shape = layers, k
        self._room = [*(len(prompt) + room for prompt in self._prompts), 0]  # none beyond the last row
        # No tensors: most passes bring one token a row, for which they take longer to make than to use.
        self._values: list[dict[int, Float[Tensor, "layers k"]]] = [{} for _ in self._prompts]
        self._ready = [0] * len(self._prompts)  # tokens of each row up to the first that is not there
        self._step = 0

    def arrived(
        self, rows: Int[Tensor, " some"], at: Int[Tensor, " some"], values: Float[Tensor, "some layers k"]
    ) -> None:
        """Note the values of tokens at these positions of these rows; what is beyond a row's room is nobody's.

        Tokens after the end of a response may come as those of a row beyond the last.
        """
        for row, position, value in zip(rows.tolist(), at.tolist(), values.unbind(), strict=True):
            if position >= self._room[row] or position < self._ready[row]:  # nobody's, or computed again
                continue
            self._values[row][position] = value
            while self._ready[row] in self._values[row]:
                self._ready[row] += 1

    def tell(
        self,
        responses: Sequence[TokenIds],
        over: Sequence[bool],
        scores: Sequence[Sequence[TokenScore]] | None = None,
    ) -> None:
        """Tell of every pass that is complete.

        Args:
            responses: Each row's so far.
            over: Whether it has ended, so that nothing follows.
            scores: How likely its tokens were, where that is wanted.
        """
        while self._is_complete(responses, over):
            self._listener.tell(self._pass(responses, scores))
            self._step += 1

    def _is_complete(self, responses: Sequence[TokenIds], over: Sequence[bool]) -> bool:
        says_more = False
        for row, stopped in enumerate(self._listener.are_stopped):
            if stopped or (over[row] and len(responses[row]) < self._step):
                continue
            last = len(self._prompts[row]) + self._step
            if len(responses[row]) < self._step or self._ready[row] < last:
                return False
            says_more = True
        return says_more

    def _pass(self, responses: Sequence[TokenIds], scores: Sequence[Sequence[TokenScore]] | None) -> WatchedTokens:
        new = 1 if self._step else self._width
        stopped = self._listener.are_stopped
        finished = [end or len(response) < self._step for end, response in zip(stopped, responses, strict=True)]
        layers, k = self._shape
        values = torch.full((len(self._prompts), layers, new, k), torch.nan)
        ids = [[0] * new for _ in self._prompts]
        for row, over in enumerate(finished):
            if over:
                self._values[row].clear()
                continue
            prompt = self._prompts[row]
            fresh = responses[row][self._step - 1 : self._step] if self._step else prompt
            first = len(prompt) + self._step - 1 if self._step else 0
            ids[row][new - len(fresh) :] = fresh
            own = [self._values[row].pop(first + number) for number in range(len(fresh))]
            values[row, :, new - len(fresh) :] = torch.stack(own, dim=1)
        told = None
        if scores is not None and self._step:
            of_rows = zip(scores, finished, strict=True)
            told = tuple(None if over else of_row[self._step - 1] for of_row, over in of_rows)
        return WatchedTokens(self._step, torch.tensor(ids), values, torch.tensor(finished), told)


def replay(listener: Listener, text: TokenBatch, projections: Float[Tensor, "batch layers width k"]) -> None:
    """Tell of a generation that is over, pass by pass, as if it ran.

    Args:
        listener: Whom to tell.
        text: The prompts with the responses that were generated.
        projections: Every token's, as a read of that kind brings them.
    """
    _, layers, width, k = projections.shape
    arrivals = Arrivals(listener, text.prompts, layers, k, max(map(len, text.responses)))
    for row, length in enumerate(text.lengths):
        at = torch.arange(length)
        arrivals.arrived(torch.full((length,), row), at, projections[row, :, width - length :].transpose(0, 1))
    arrivals.tell(text.responses, [True] * len(text))


class WatchedByReplay:
    """A backend that can tell a watch's callback only once a generation is over, from a read of the projections.

    Attributes:
        watched_as: What it is that is watched in this way, for messages.
    """

    watched_as: ClassVar[str]
    generate: Callable[..., Generation]

    def generate_watched(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Watch,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `WatchableBackend.generate_watched`.

        Raises:
            ReadError: If projections are asked for beside.
        """
        watch.refuse_top()
        if any(read.kind is ReadKind.PROJECTIONS for read in reads):
            raise ReadError(f"{self.watched_as} is watched by a read of projections, and takes no other; leave it out")
        found = self.generate(prompts, sampling, as_edits(edits), (*reads, watch.read))
        values = dict(found.reads)
        projections = values.pop(ReadKind.PROJECTIONS)
        listener = Listener(watch, prompts)
        replay(listener, TokenBatch.of(prompts, found.responses), projections)
        return Generation(*listener.cut(found.responses, found.ended), values)

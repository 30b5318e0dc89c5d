"""Token ids in and out: `TokenBatch`, `Sampling`, and the masks of a left-padded batch.

Boundaries between prompt and response are always counted in ids: text that is encoded again can merge tokens across
the boundary, and a pad id can also be a real one (in many models it is the end-of-turn token).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.backend.parts import Parts

TokenIds = tuple[int, ...]
ID_LIMIT = 2**31  # no vocabulary is as large, and what reads ids from files takes none from here on


class TokenError(PersonaLensError):
    """Token ids or sampling settings that cannot be used."""


@dataclass(frozen=True)
class TokenBatch:
    """Rows of existing text.

    Attributes:
        prompts: Token ids of each row's prompt, at least one.
        responses: Token ids of each row's response, without the end-of-turn token; may be empty.

    Raises:
        TokenError: If there are no rows, the two differ in number, or a prompt is empty.
    """

    prompts: tuple[TokenIds, ...]
    responses: tuple[TokenIds, ...]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise TokenError("the batch has no rows")
        if len(self.prompts) != len(self.responses):
            raise TokenError(f"{len(self.prompts)} prompts but {len(self.responses)} responses")
        for row, prompt in enumerate(self.prompts):
            if not prompt:
                raise TokenError(f"row {row} has an empty prompt; a response needs at least one token before it")

    @staticmethod
    def of(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]] | None = None) -> TokenBatch:
        """A batch from any sequences of ids; without responses every row has an empty one."""
        heads = tuple(tuple(row) for row in prompts)
        tails = tuple(tuple(row) for row in responses) if responses is not None else ((),) * len(heads)
        return TokenBatch(heads, tails)

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, start: int, stop: int) -> TokenBatch:
        """Rows ``start`` to ``stop`` as a batch of their own."""
        return TokenBatch(self.prompts[start:stop], self.responses[start:stop])

    def chosen(self, rows: Iterable[int]) -> TokenBatch:
        """The rows of these indices, in that order, as a batch of their own."""
        pairs = [(self.prompts[row], self.responses[row]) for row in rows]
        return TokenBatch(*zip(*pairs, strict=True))

    def check_vocabulary(self, size: int) -> None:
        """Raise `TokenError` for an id that a model of ``size`` token ids does not know."""
        for row, parts in enumerate(zip(self.prompts, self.responses, strict=True)):
            for ids in parts:
                if ids and not (min(ids) >= 0 and max(ids) < size):
                    wrong = next(token for token in ids if not 0 <= token < size)
                    raise TokenError(
                        f"row {row} holds the token id {wrong}, and the model knows only 0 to {size - 1}; "
                        "give ids of the model's own tokenizer"
                    )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each row."""
        return tuple(len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True))


@dataclass(frozen=True)
class Sampling:
    """How to generate.

    Attributes:
        max_new_tokens: Length limit of a response in tokens, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: Nucleus: sample from the smallest set of tokens that has this probability.
        seeds: One seed a row, needed when temperature is above 0. A row's tokens depend on its seed alone, never on
            the other rows of the batch.
        use_cache: Keep keys and values of earlier tokens. False gives the same tokens, slower; it is there to check
            that.
        thinking_budget: How many thinking tokens a response may have, over all its blocks; then what closes thinking
            follows, and the answer within ``max_new_tokens``. See `persona_lens.backend.parts.budget`; None leaves
            it to the model.

    Raises:
        TokenError: If a value is out of range, or seeds are missing or given in vain.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seeds: tuple[int, ...] | None = None
    use_cache: bool = True
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise TokenError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise TokenError(f"thinking_budget must be 0 tokens (no thinking) or more, got {self.thinking_budget}")
        if not 0 <= self.temperature < float("inf"):
            raise TokenError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise TokenError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature > 0 and self.seeds is None:
            raise TokenError("sampling at a temperature needs seeds, one for each row")
        if self.temperature == 0 and (self.seeds is not None or self.top_p != 1):
            raise TokenError("seeds and top_p do nothing at temperature 0; leave them out, or set a temperature")
        if any(not 0 <= seed < 2**63 for seed in self.seeds or ()):
            raise TokenError("seeds must be whole numbers from 0 to 2**63 - 1")

    def rows(self, start: int, stop: int) -> Sampling:
        """The same settings for rows ``start`` to ``stop``."""
        return self if self.seeds is None else replace(self, seeds=self.seeds[start:stop])

    def check_rows(self, batch: int) -> None:
        """Raise `TokenError` unless there is a seed for each of ``batch`` rows."""
        if self.seeds is not None and len(self.seeds) != batch:
            raise TokenError(f"{len(self.seeds)} seeds for {batch} prompts; give one for each")


@dataclass(frozen=True)
class PaddedTokens:
    """A batch as the model takes it, padded on the left (on the right by `pad_right`).

    Attributes:
        ids: Token ids, int64 [batch, width].
        attention: True at tokens, False at padding, bool [batch, width].
        prompt: True at prompt tokens, bool [batch, width].
        response: True at response tokens, bool [batch, width].
        parts: What is thinking and what is answer, see `persona_lens.backend.parts.GivenParts.plain`; None where nobody
            asks, or every token of a response is answer.
    """

    ids: Int[Tensor, "batch width"]
    attention: Bool[Tensor, "batch width"]
    prompt: Bool[Tensor, "batch width"]
    response: Bool[Tensor, "batch width"]
    parts: Mapping[str, Tensor] | None = None

    @property
    def position_ids(self) -> Int[Tensor, "batch width"]:
        """Positions counted from each row's first token; padding gets 0."""
        return (self.attention.long().cumsum(-1) - 1).clamp(min=0)


def pad_left(
    batch: TokenBatch, pad_id: int, device: torch.device | str = "cpu", parts: Parts | None = None
) -> PaddedTokens:
    """Pad a batch on the left, with masks counted from the rows' lengths; with what tells thinking from answer."""
    rows = [torch.tensor(head + tail) for head, tail in zip(batch.prompts, batch.responses, strict=True)]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left").to(device)
    columns = torch.arange(ids.shape[1], device=device)
    start = len(columns) - torch.tensor(batch.lengths, device=device).unsqueeze(1)
    boundary = len(columns) - torch.tensor([len(tail) for tail in batch.responses], device=device).unsqueeze(1)
    attention, response = columns >= start, columns >= boundary
    given = None if parts is None else parts.given(batch.prompts, batch.responses).plain(ids.shape[1])
    return PaddedTokens(ids, attention, attention & ~response, response, given)


def pad_right(
    responses: Sequence[TokenIds],
    pad_id: int,
    device: torch.device | str = "cpu",
    parts: Parts | None = None,
    prompts: Sequence[TokenIds] = (),
) -> PaddedTokens:
    """Pad responses alone on the right, where causal attention never sees the padding.

    Args:
        responses: Their ids.
        pad_id: What is put behind them.
        device: Where they are to be.
        parts: What tells thinking from answer, if anybody asks.
        prompts: What each follows, which has to be known for that.
    """
    rows = [torch.tensor(tokens, dtype=torch.long) for tokens in responses]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id).to(device)
    lengths = torch.tensor([len(tokens) for tokens in responses], device=device).unsqueeze(1)
    response = torch.arange(ids.shape[1], device=device) < lengths
    given = None
    if parts is not None:
        given = parts.given(prompts, responses).of_responses(prompts).plain(ids.shape[1], left=False)
    return PaddedTokens(ids, response, torch.zeros_like(response), response, given)


def cut_responses(
    generated: Int[Tensor, "batch new"], end_ids: Sequence[int], max_new_tokens: int
) -> tuple[tuple[TokenIds, ...], tuple[bool, ...]]:
    """The responses in what a generation loop produced, and whether each row ended its turn in time.

    Args:
        generated: New token ids; after a row's end the loop pads.
        end_ids: Ids that end a response; the first one and all after it are cut off.
        max_new_tokens: Tokens beyond this are cut off too.
    """
    cut = [cut_response(row, end_ids, max_new_tokens) for row in generated.tolist()]
    return tuple(response for response, _ in cut), tuple(ended for _, ended in cut)


def cut_response(given: Sequence[int], end_ids: Sequence[int], max_new_tokens: int) -> tuple[TokenIds, bool]:
    """The same of one row."""
    kept = tuple(given[:max_new_tokens])
    stop = next((i for i, token in enumerate(kept) if token in end_ids), None)
    return kept[:stop], stop is not None


@dataclass(frozen=True)
class TokenScore:
    """How likely a token was after those before it, as the model is edited, before temperature and noise.

    Attributes:
        id: The token.
        logprob: Its log-probability in nats.
        top_ids: The likeliest tokens, the likeliest first.
        top_logprobs: Their log-probabilities.
    """

    id: int
    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


# Which of them an edit is made at

FURTHEST = 2**31


class EditError(PersonaLensError):
    """An edit, or a part of one, that cannot mean anything, or that does not fit the model or the batch."""


class Positions(StrEnum):
    """Tokens of a row by kind; padding is never among them."""

    ALL = "all"
    PROMPT = "prompt"
    RESPONSE = "response"
    GENERATING = "generating"  # the last prompt token and the response: every position that predicts a response token
    THINKING = "thinking"  # of a response, see `persona_lens.backend.parts`
    ANSWER = "answer"  # likewise; all of the response of a model that never thinks


@dataclass(frozen=True)
class Span:
    """A part of the tokens of a kind, written ``response[5:]``.

    Attributes:
        kind: Tokens that are counted, from 0 in each row.
        start: First token; negative numbers count from the end of a prompt.
        stop: One past the last token; None for all that follow, however long the response becomes.

    Raises:
        EditError: If no token is in it, or it counts from the end of what is still being generated.
    """

    kind: Positions
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if any(abs(bound or 0) >= FURTHEST for bound in (self.start, self.stop)):
            raise EditError(f"no text has {FURTHEST:,} tokens to count")
        if self.kind is not Positions.PROMPT and (self.start < 0 or (self.stop or 0) < 0):
            raise EditError(
                f"{self} counts from the end, which only a prompt has before it is generated; use prompt[-3:], or "
                "count from the beginning"
            )
        same_end = self.stop is not None and (self.start < 0) == (self.stop < 0)
        if same_end and self.stop is not None and self.start >= self.stop:
            raise EditError(f"{self} holds no token: it must end after it begins")

    def __str__(self) -> str:
        return f"{self.kind}[{self.start}:{'' if self.stop is None else self.stop}]"


@dataclass(frozen=True, eq=False)
class Condition:
    """True at a token whose projection on a direction is above (or below) a threshold.

    It is decided token by token, on the residual stream after the edits of its layer; at the edit's own layer, on the
    residual as that edit finds it.

    Attributes:
        layer: Where the projection is taken, 0-based; at or before the layer of the edit.
        direction: float [d_model]; its length does not matter.
        threshold: In residual-stream units.
        above: Whether the projection has to be above the threshold, or below.

    Raises:
        EditError: If the direction is no direction, or the threshold is not finite.
    """

    layer: int
    direction: Float[Tensor, " d_model"]
    threshold: float
    above: bool = True

    def __post_init__(self) -> None:
        if self.direction.ndim != 1 or not bool(torch.isfinite(self.direction).all() & self.direction.any()):
            raise EditError("the direction of a condition must be float [d_model], finite and not zero everywhere")
        if not isfinite(self.threshold):
            raise EditError(f"the threshold of a condition must be finite, got {self.threshold}")
        object.__setattr__(self, "direction", self.direction.detach().clone())

    def plain(self) -> dict[str, Any]:
        """The condition as a dictionary that needs no class of this package; its direction is of length one."""
        wide = self.direction.float()
        return {
            "layer": self.layer,
            "direction": wide / wide.norm(),
            "threshold": float(self.threshold),
            "above": self.above,
        }


@dataclass(frozen=True)
class Schedule:
    """A factor on an edit's coefficient, as a function of the token's index; data, so that it can travel and be kept.

    Between the points the factor is interpolated linearly; before the first and after the last it stays as it is there.
    The index counts, from 0 in each row, the tokens of the kind that the edit's positions name: for ``response`` and
    ``response[5:]`` the tokens of the response, for ``generating`` the last prompt token is number 0.

    Attributes:
        points: Pairs of a token index and a factor, in ascending order; at least two.

    Raises:
        EditError: If there are fewer points, or they are out of order, negative in their index or not finite.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        places = [place for place, _ in self.points]
        if len(places) < 2:
            raise EditError("a schedule needs at least two points, such as 0:1 20:0; one is only a coefficient")
        if places[-1] >= FURTHEST:
            raise EditError(f"no text has {FURTHEST:,} tokens to count")
        if places != sorted(set(places)) or places[0] < 0:
            raise EditError(f"the token indices of a schedule must ascend from 0 or more, got {places}")
        if not all(isfinite(factor) for _, factor in self.points):
            raise EditError("the factors of a schedule must be finite")

    def __str__(self) -> str:
        return " ".join(f"{place}:{factor:g}" for place, factor in self.points)

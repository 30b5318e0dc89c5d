"""Which tokens of a row are meant: `Positions` by kind, `Span` for a part of a kind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from persona_lens.errors import PersonaLensError

FURTHEST = 2**31


class PositionsError(PersonaLensError):
    """Positions that name no tokens, or tokens that cannot be known."""


class Positions(StrEnum):
    """Tokens of a row by kind; padding is never among them."""

    ALL = "all"
    PROMPT = "prompt"
    RESPONSE = "response"
    GENERATING = "generating"  # the last prompt token and the response: every position that predicts a response token


@dataclass(frozen=True)
class Span:
    """A part of the tokens of a kind, written ``response[5:]``.

    Attributes:
        kind: Tokens that are counted, from 0 in each row.
        start: First token; negative numbers count from the end of a prompt.
        stop: One past the last token; None for all that follow, however long the response becomes.

    Raises:
        PositionsError: If no token is in it, or it counts from the end of what is still being generated.
    """

    kind: Positions
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if any(abs(bound or 0) >= FURTHEST for bound in (self.start, self.stop)):
            raise PositionsError(f"no text has {FURTHEST:,} tokens to count")
        if self.kind is not Positions.PROMPT and (self.start < 0 or (self.stop or 0) < 0):
            raise PositionsError(
                f"{self} counts from the end, which only a prompt has before it is generated; use prompt[-3:], or "
                "count from the beginning"
            )
        same_end = self.stop is not None and (self.start < 0) == (self.stop < 0)
        if same_end and self.stop is not None and self.start >= self.stop:
            raise PositionsError(f"{self} holds no token: it must end after it begins")

    def __str__(self) -> str:
        return f"{self.kind}[{self.start}:{'' if self.stop is None else self.stop}]"

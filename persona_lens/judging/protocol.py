"""What every judge does: a score for each response, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from persona_lens.errors import PersonaLensError


class JudgingError(PersonaLensError):
    """A judge that cannot work as it is asked to."""


@dataclass(frozen=True)
class Exchange:
    """A question and the response to it.

    Attributes:
        question: What was asked, without any system prompt.
        response: The answer as text.
        response_ids: The answer's token ids under the subject model, where they are known.
    """

    question: str
    response: str
    response_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Score:
    """A judgement of one response.

    Attributes:
        value: How strongly the response shows the trait, 0 to 100; None where there is no score.
        reason: Why there is none.
    """

    value: float | None
    reason: str | None = None


class Judge(Protocol):
    """Scores responses for one trait."""

    def score(self, exchanges: Sequence[Exchange]) -> list[Score]:
        """A score for each exchange, in their order."""
        ...

    def describe(self) -> dict[str, Any]:
        """What determines the scores, as JSON values; part of a vector's provenance."""
        ...

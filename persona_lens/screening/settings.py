"""`ScreeningSettings`: how samples are scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from persona_lens.screening.errors import ScreeningError
from persona_lens.screening.samples import Turns


class BaseResponses(StrEnum):
    """Where the base model's own responses come from, against which the projection difference is taken."""

    NONE = "none"
    GENERATE = "generate"
    SUPPLIED = "supplied"


@dataclass(frozen=True)
class ScreeningSettings:
    """How samples are scored; every field is part of a run's configuration.

    Attributes:
        turns: Which answers count.
        base: Where base responses come from. Generated ones are greedy.
        base_share: Share of the rows, drawn at random, that get a base response.
        max_new_tokens: Length limit of a generated base response.
        max_tokens: Rows with a longer text are rejected; None takes what the model takes.
        look_ahead: Rows that are encoded before the first of them is scored, so that those of like length run together.
        batch_tokens: Tokens that run at once at most, padding included; None takes what the device is fast at.
        batch_size: Rows that run at once at most.
        seed: Of every random choice.

    Raises:
        ScreeningError: If a value is out of range.
    """

    turns: Turns = Turns.LAST
    base: BaseResponses = BaseResponses.NONE
    base_share: float = 1.0
    max_new_tokens: int = 128
    max_tokens: int | None = None
    look_ahead: int = 256
    batch_tokens: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.base_share <= 1:
            raise ScreeningError(f"the share of rows with a base response is above 0 and at most 1: {self.base_share}")
        if self.base_share < 1 and self.base is BaseResponses.NONE:
            raise ScreeningError("a share of base responses asks for base responses; generate or supply them")
        if self.base is BaseResponses.SUPPLIED and self.turns is Turns.ALL:
            raise ScreeningError("supplied base responses answer the last prompt; take turns 'last' with them")
        for name in ("max_new_tokens", "max_tokens", "look_ahead", "batch_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ScreeningError(f"{name} must be at least 1, got {value}")

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {name: value.value if isinstance(value, StrEnum) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_json(given: Mapping[str, Any]) -> ScreeningSettings:
        """The settings that `to_json` gave."""
        return ScreeningSettings(**{**given, "turns": Turns(given["turns"]), "base": BaseResponses(given["base"])})

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
        base: Where base responses come from.
        base_share: Share of the rows, drawn at random, that get a base response.
        base_samples: Base responses that are generated to each prompt. The mean over several is nearer to what the
            model would say than any one of them, and so a row's difference holds less noise.
        temperature: Of generated base responses; 0 is greedy, and allows for one of them.
        max_new_tokens: Length limit of a generated base response.
        max_tokens: Rows with a longer text are rejected; None takes what the model takes.
        look_ahead: Rows that are encoded before the first of them is scored, so that those of like length run together.
        batch_tokens: Tokens that run at once at most, padding included; None takes what the device is fast at.
        batch_size: Rows that run at once at most; base responses to one prompt always run together.
        seed: Of every random choice.

    Raises:
        ScreeningError: If a value is out of range.
    """

    turns: Turns = Turns.LAST
    base: BaseResponses = BaseResponses.NONE
    base_share: float = 1.0
    base_samples: int = 1
    temperature: float = 0.0
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
        if not 0 <= self.temperature < float("inf"):
            raise ScreeningError(f"the temperature of base responses is 0 (greedy) or more, got {self.temperature}")
        if self.base is not BaseResponses.GENERATE and (self.base_samples != 1 or self.temperature):
            raise ScreeningError("samples and temperature are for base responses that are generated; ask for these")
        if self.base_samples > 1 and not self.temperature:
            raise ScreeningError("greedy base responses to a prompt are all the same; set a temperature for several")
        if self.base is BaseResponses.SUPPLIED and self.turns is Turns.ALL:
            raise ScreeningError("supplied base responses answer the last prompt; take turns 'last' with them")
        for name in ("base_samples", "max_new_tokens", "max_tokens", "look_ahead", "batch_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ScreeningError(f"{name} must be at least 1, got {value}")

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {name: value.value if isinstance(value, StrEnum) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_json(given: Mapping[str, Any]) -> ScreeningSettings:
        """The settings that `to_json` gave."""
        return ScreeningSettings(**{**given, "turns": Turns(given["turns"]), "base": BaseResponses(given["base"])})

"""`RolloutSettings`: how responses are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from persona_lens.backend import Sampling, TokenError


@dataclass(frozen=True)
class RolloutSettings:
    """How responses are made; every field is part of a run's configuration.

    Attributes:
        max_new_tokens: Length limit of a response.
        temperature: 0 is greedy.
        top_p: Nucleus.
        thinking_budget: How many tokens a model may think before it has to answer; None does not limit it.
        batch_size: Rows that run at once at most, fewer where memory runs out. Part of the configuration since sums in
            other batches round otherwise.
        batch_tokens: Tokens that run at once at most, responses and padding included.
    """

    max_new_tokens: int = 48
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64
    batch_tokens: int = 32768
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        seeds = (0,) if self.temperature else None
        Sampling(self.max_new_tokens, self.temperature, self.top_p, seeds, thinking_budget=self.thinking_budget)
        if self.batch_size < 1 or self.batch_tokens < 1:
            raise TokenError(f"batches need at least 1 row and 1 token, got {self.batch_size} and {self.batch_tokens}")

    def sampling(self, seeds: Sequence[int]) -> Sampling:
        """Settings of one batch."""
        if self.temperature == 0:
            return Sampling(self.max_new_tokens, thinking_budget=self.thinking_budget)
        budget = self.thinking_budget
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, tuple(seeds), thinking_budget=budget)

    def for_server(self) -> RolloutSettings:
        """These, for a model on an OpenAI-compatible server.

        Raises:
            TokenError: If thinking is to be limited.
        """
        if self.thinking_budget is not None:
            raise TokenError(
                "servers of the OpenAI kind have no common way to limit thinking, and most pass over what they do not "
                "know; leave out the thinking budget (--thinking-budget), or run the model here"
            )
        return self


def settings_json(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as JSON values, for configurations and summaries.

    A thinking budget that is not given is left out: runs from before there was one stay what they are.
    """
    return asdict(
        settings,
        dict_factory=lambda pairs: {name: each for name, each in pairs if (name, each) != ("thinking_budget", None)},
    )

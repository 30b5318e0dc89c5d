"""What is asked of a server, and what comes back: the request, its completion, the form on the wire."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from persona_lens.completions.spending import Usage

SAMPLING = ("temperature", "top_p")
"""Parameters without which a model samples otherwise."""


@dataclass(frozen=True)
class CompletionRequest:
    """One chat completion to ask for; two of equal content are the same request.

    Attributes:
        messages: Role and content of each message.
        max_tokens: Length limit of the answer.
        temperature: 0 is greedy.
        top_p: Nucleus.
        seed: Seed of the sampling; None leaves it to the server.
        top_logprobs: How many of the likeliest tokens are reported at each position; None for none.
        schema: JSON Schema that the answer has to follow, for servers with structured output.
        firm: Sample in this way or not at all: a server that does not let temperature or nucleus be set is not asked
            without them, unless they are what it does anyway.
    """

    messages: tuple[tuple[str, str], ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    top_logprobs: int | None = None
    schema: Mapping[str, Any] | None = None
    firm: bool = False

    def body(self, model: str) -> dict[str, Any]:
        """The request as the server gets it, with nothing that cannot matter.

        What is greedy has no nucleus and no seed; and a nucleus of all tokens goes without saying where the sampling
        need not be exact.

        Args:
            model: The model's name there.
        """
        body = self._content(model)
        if not self.temperature or (self.top_p == 1.0 and not self.firm):
            del body["top_p"]
        if not self.temperature:
            body.pop("seed", None)
        return body

    def _content(self, model: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": role, "content": content} for role, content in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        if self.seed is not None:
            body["seed"] = self.seed
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.schema is not None:
            form = {"name": "answer", "strict": True, "schema": dict(self.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    def tokens(self) -> Usage:
        """About how many tokens the request takes: a token for each four bytes of text, and all that may come."""
        size = sum(len(content.encode("utf-8", "replace")) for _, content in self.messages)
        return Usage(1, -(-size // 4) + 4 * len(self.messages), self.max_tokens)

    def key(self, model: str, server: str) -> str:
        """A name for the request by its content, however it is worded, as a SHA-256 in hexadecimal digits."""
        content = {"server": server, **self._content(model)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Sampled:
    """One choice of a completion.

    Attributes:
        text: The answer.
        top_logprobs: The likeliest first tokens with their log-probabilities, in nats; None if none were reported.
        finished: Whether the model ended its turn, rather than being cut off; None where the server does not say.
    """

    text: str
    top_logprobs: tuple[tuple[str, float], ...] | None = None
    finished: bool | None = None


@dataclass(frozen=True)
class Completion:
    """What a server answered.

    Attributes:
        choices: At least one.
        usage: Tokens as the server counts them, or an estimate where it does not.
        without: Parameters of the request that the server did not take, so that it was asked without them.
    """

    choices: tuple[Sampled, ...]
    usage: Usage
    without: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The completion as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Completion:
        """The completion that `to_json` gave."""
        choices = tuple(
            Sampled(
                c["text"],
                tuple((t, p) for t, p in c["top_logprobs"]) if c["top_logprobs"] is not None else None,
                c.get("finished"),  # which older versions did not keep
            )
            for c in value["choices"]
        )
        return Completion(choices, Usage(**value["usage"]), tuple(value.get("without", ())))

    def fits(self, request: CompletionRequest) -> bool:
        """Whether this may stand for an answer to the request: it was sampled as that has to be."""
        return not request.firm or not any(name in self.without and getattr(request, name) != 1.0 for name in SAMPLING)


@dataclass(frozen=True)
class Refused:
    """A request that the server will not take, however often it is asked: too long, say, or against its rules."""

    reason: str

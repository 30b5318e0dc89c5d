"""What is asked of a server, and what comes back: the request, its completion, the form on the wire."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from persona_lens.completions.spending import Usage

LimitName = Literal["max_tokens", "max_completion_tokens"]


@dataclass
class Wording:
    """How a server wants a model's requests to be put, as far as its refusals have shown.

    Attributes:
        limit: Its name for the length limit of an answer. OpenAI's reasoning models want ``max_completion_tokens``,
            which other servers do not know.
    """

    limit: LimitName = "max_tokens"


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
    """

    messages: tuple[tuple[str, str], ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    top_logprobs: int | None = None
    schema: Mapping[str, Any] | None = None

    def body(self, model: str, limit: LimitName = "max_tokens") -> dict[str, Any]:
        """The request as the server gets it.

        Args:
            model: The model's name there.
            limit: What the server calls the length limit.
        """
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": role, "content": content} for role, content in self.messages],
            limit: self.max_tokens,
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
        content = {"server": server, **self.body(model)}
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
    """

    choices: tuple[Sampled, ...]
    usage: Usage

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
        return Completion(choices, Usage(**value["usage"]))


@dataclass(frozen=True)
class Refused:
    """A request that the server will not take, however often it is asked: too long, say, or against its rules."""

    reason: str


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Token(_Wire):
    token: str
    logprob: float = Field(le=1e-3)  # a little above 0 is rounding


class _Position(_Wire):
    top_logprobs: list[_Token] = []


class _Logprobs(_Wire):
    content: list[_Position] | None = None


class _Message(_Wire):
    content: str | None = None


class _Choice(_Wire):
    message: _Message
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(_Wire):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class _Body(_Wire):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def read_completion(body: bytes, request: CompletionRequest) -> Completion:
    """The completion in a server's answer.

    Raises:
        pydantic.ValidationError: If the body is no chat completion.
    """
    found = _Body.model_validate_json(body)
    usage = request.tokens()
    if found.usage is not None:
        usage = Usage(1, found.usage.prompt_tokens, found.usage.completion_tokens)
    return Completion(tuple(map(_sampled, found.choices)), usage)


def _sampled(choice: _Choice) -> Sampled:
    positions = choice.logprobs.content if choice.logprobs else None
    first = positions[0].top_logprobs if positions else []
    return Sampled(
        choice.message.content or "",
        tuple((t.token, t.logprob) for t in first) or None,
        None if choice.finish_reason is None else choice.finish_reason == "stop",
    )

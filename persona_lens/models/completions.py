"""What is asked of a server and what comes back, however the server words both: servers differ in much."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Usage:
    """Amounts that a server charges for.

    Attributes:
        requests: Answers.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens written.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


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

    def needs(self, parameter: str) -> bool:
        """Whether the request cannot do without that parameter."""
        return self.firm and parameter in SAMPLING and getattr(self, parameter) != 1.0

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
class Completion:
    """What a server answered.

    Attributes:
        text: The answer.
        usage: Tokens as the server counts them, or an estimate where it does not.
        top_logprobs: The likeliest first tokens with their log-probabilities, in nats; None if none were reported.
        finished: Whether the model ended its turn, rather than being cut off; None where the server does not say.
        without: Parameters of the request that the server did not take, so that it was asked without them.
    """

    text: str
    usage: Usage
    top_logprobs: tuple[tuple[str, float], ...] | None = None
    finished: bool | None = None
    without: tuple[str, ...] = ()

    def fits(self, request: CompletionRequest) -> bool:
        """Whether this may stand for an answer to the request: it was sampled as that has to be."""
        return not any(map(request.needs, self.without))


@dataclass(frozen=True)
class Refused:
    """A request that the server will not take, however often it is asked: too long, say, or against its rules."""

    reason: str


Answer = Completion | Refused


LIMIT, OTHER_LIMIT = "max_tokens", "max_completion_tokens"
LOGPROBS = ("logprobs", "top_logprobs")
# What matters least first: a server may name several, as in "temperature and top_p cannot both be set".
OPTIONAL = ("top_p", "seed", *LOGPROBS, "temperature")
_DECLINED = re.compile(
    r"unsupported|not? (?:be )?support|doesn't support|unknown|unrecogni[sz]ed|unexpected|unavailable|deprecated"
    r"|not (?:allow|permit|available|accept|valid|implement)|extra (?:inputs|field)|extra_forbidden"
    r"|can(?:not|'t) (?:both )?be|only the default|invalid|must be|no longer|use only one",
    re.IGNORECASE,
)
_OTHER_LIMIT = re.compile(r"unsupported|not supported|deprecated|instead|no longer", re.IGNORECASE)


class RefusalError(Exception):
    """A request that the server did not take, or an error in an answer which says that all is well.

    Args:
        status: As in HTTP; None if the server gives none.
        error: What it says, in whatever form.
        headers: Of its answer.

    Attributes:
        said: The server's words.
        parameter: The parameter that it names as such; None if it does not.
    """

    def __init__(self, status: int | None, error: object, headers: Mapping[str, str] | None = None) -> None:
        parameter = error.get("param") if isinstance(error, Mapping) else None
        self.status = status
        self.said = words_of(error)
        self.parameter = parameter if isinstance(parameter, str) else None
        self.headers = headers or {}
        super().__init__(self.said)

    def names(self, parameter: str) -> bool:
        """Whether it is about that parameter, or says its name."""
        return parameter == self.parameter or re.search(rf"\b{parameter}\b", self.said) is not None


@dataclass(frozen=True)
class Wording:
    """What is left out of requests, or named otherwise.

    Attributes:
        limit: The server's name for the length limit of an answer. OpenAI's reasoning models want
            ``max_completion_tokens``, which other servers do not know.
        refused: Parameters that are left out, with what the server said of each.
    """

    limit: str = LIMIT
    refused: Mapping[str, str] = field(default_factory=dict)

    def body(self, request: CompletionRequest, model: str) -> dict[str, Any]:
        """The request in these words."""
        body = request.body(model)
        body[self.limit] = body.pop(LIMIT)
        return {name: value for name, value in body.items() if name not in self.refused}

    def left_out(self, request: CompletionRequest, model: str) -> tuple[str, ...]:
        """The parameters that such a request lacks."""
        return tuple(name for name in request.body(model) if name in self.refused)

    def after(self, refusal: RefusalError, request: CompletionRequest, model: str) -> Wording | None:
        """Other words for a request that was refused in these; None if the refusal is about something else.

        A refusal may repeat the request, which says what it likes, so whether these words are right shows only when the
        server takes them.
        """
        if refusal.status not in (400, 422):
            return None
        body = self.body(request, model)
        if LIMIT in body and refusal.names(LIMIT) and refusal.names(OTHER_LIMIT) and _OTHER_LIMIT.search(refusal.said):
            return replace(self, limit=OTHER_LIMIT)
        if not _DECLINED.search(refusal.said) and refusal.parameter not in OPTIONAL:
            return None
        named = [name for name in (refusal.parameter, *OPTIONAL) if name in body and name in OPTIONAL]
        found = next((name for name in named if name is not None and refusal.names(name)), None)
        if found is None or request.needs(found):
            return None
        together = LOGPROBS if found in LOGPROBS else (found,)
        return replace(self, refused={**self.refused, **dict.fromkeys(together, refusal.said)})

    def and_also(self, other: Wording) -> Wording:
        """Both together."""
        limit = other.limit if self.limit == LIMIT else self.limit
        return Wording(limit, {**self.refused, **other.refused})


MOST_TOKENS = 10**7
"""Tokens of one answer that a server may say it used; more is no count."""
_ROUNDING = 1e-3  # by which a log-probability may be above 0
_MOST_MASS = 1.02  # of all probabilities together, in rounded numbers


class UnusableError(Exception):
    """An answer that is no chat completion; the text says why."""


def words_of(error: object) -> str:
    """A server's own words, in whatever form it has them."""
    if isinstance(error, Mapping):
        found = [error.get(name) for name in ("code", "message", "detail", "error") if error.get(name)]
        return " ".join(map(words_of, found)) or json.dumps(error, default=str)[:1000]
    return whole_characters(str(error))


def whole_characters(text: str) -> str:
    """A text without halves of characters, which fit into no file."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_completion(body: bytes, request: CompletionRequest) -> Completion:
    """The completion in a server's answer; what is missing or senseless beside the answer itself is left out.

    Raises:
        RefusalError: If it is an error under another status.
        UnusableError: If it is no chat completion.
    """
    try:
        found = json.loads(body.decode(json.detect_encoding(body), "replace"))
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(": ")[0]
        raise UnusableError(f"it is no JSON: {said}" if body.strip() else "it is empty") from None
    if not isinstance(found, Mapping):
        raise UnusableError("it is no JSON object")
    choices = found.get("choices")
    if found.get("error") and not choices:
        raise _reported(found["error"])
    if not isinstance(choices, list) or not choices:
        raise UnusableError("it has no choices")
    choice = choices[0]
    if not isinstance(choice, Mapping) or not isinstance(choice.get("message"), Mapping):
        raise UnusableError("its first choice has no message")
    reason, message = choice.get("finish_reason"), choice["message"]
    if choice.get("error") or reason == "error":
        raise _reported(choice.get("error") or "it ended its answer with an error")
    return Completion(
        _text(message.get("content")) or _text(message.get("refusal")),
        _usage(found.get("usage"), request),
        _first_tokens(choice.get("logprobs")),
        reason == "stop" if isinstance(reason, str) else None,
    )


def _reported(error: object) -> RefusalError:
    code = error.get("code") if isinstance(error, Mapping) else None
    return RefusalError(code if isinstance(code, int) and 400 <= code < 600 else None, error)


def _text(content: object) -> str:
    """The text of a message's content, which may come in chunks of several kinds."""
    chunks = [content or ""] if content is None or isinstance(content, str) else content
    if not isinstance(chunks, list) or not all(isinstance(chunk, (str, Mapping)) for chunk in chunks):
        raise UnusableError("its content is no text")
    texts = (chunk if isinstance(chunk, str) else chunk.get("text") for chunk in chunks)
    return "".join(whole_characters(text) for text in texts if isinstance(text, str))


def _first_tokens(logprobs: Any) -> tuple[tuple[str, float], ...] | None:
    """The likeliest first tokens that have a log-probability; None if there are none, or no distribution at all."""
    try:
        listed = [each for each in logprobs["content"][0]["top_logprobs"] if isinstance(each, Mapping)]
    except (LookupError, TypeError):
        return None
    found = []
    for each in listed:
        token, value = each.get("token"), each.get("logprob")
        if isinstance(token, str) and isinstance(value, int | float) and value == value:
            if value > _ROUNDING:
                return None
            found.append((whole_characters(token), min(float(value), 0.0) if value > -1e300 else -math.inf))
    mass = math.fsum(math.exp(value) for _, value in found)
    return tuple(found) if found and mass <= _MOST_MASS else None


def _usage(usage: object, request: CompletionRequest) -> Usage:
    """What the server counted, and an estimate of what it did not."""
    expected = request.tokens()

    def counted(name: str, otherwise: int) -> int:
        value = usage.get(name) if isinstance(usage, Mapping) else None
        return value if type(value) is int and 0 <= value <= MOST_TOKENS else otherwise

    read, written = expected.prompt_tokens, expected.completion_tokens
    return Usage(1, counted("prompt_tokens", read), counted("completion_tokens", written))

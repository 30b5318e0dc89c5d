"""How a server wants to be asked, and what its answers hold as far as it can be used: servers differ in much."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from persona_lens.models.server.messages import SAMPLING, Completion, CompletionRequest, Sampled, Usage

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


@dataclass(frozen=True)
class Refusal:
    """What a server said when it did not take a request.

    Attributes:
        status: As in HTTP.
        said: Its words.
        parameter: The parameter that it names as such; None if it does not.
        headers: Of its answer.
    """

    status: int
    said: str
    parameter: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

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

    def after(self, refusal: Refusal, request: CompletionRequest, model: str) -> Wording | None:
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
        if found is None or must_be_set(found, request):
            return None
        together = LOGPROBS if found in LOGPROBS else (found,)
        return replace(self, refused={**self.refused, **dict.fromkeys(together, refusal.said)})

    def and_also(self, other: Wording) -> Wording:
        """Both together."""
        limit = other.limit if self.limit == LIMIT else self.limit
        return Wording(limit, {**self.refused, **other.refused})


def must_be_set(parameter: str, request: CompletionRequest) -> bool:
    """Whether the request cannot do without that parameter."""
    return request.firm and parameter in SAMPLING and getattr(request, parameter) != 1.0


MOST_TOKENS = 10**7
"""Tokens of one answer that a server may say it used; more is no count."""
_ROUNDING = 1e-3  # by which a log-probability may be above 0
_MOST_MASS = 1.02  # of all probabilities together, in rounded numbers


class UnusableError(Exception):
    """An answer that is no chat completion; the text says why."""


class ReportedError(Exception):
    """An error that a server reports in an answer which says that all is well.

    Attributes:
        status: The code that it gives; None if that is no status of HTTP.
        said: Its words.
        parameter: The parameter that it names; None if it names none.
    """

    def __init__(self, error: object) -> None:
        entries = error if isinstance(error, Mapping) else {}
        code, parameter = entries.get("code"), entries.get("param")
        self.status = code if isinstance(code, int) and 400 <= code < 600 else None
        self.parameter = parameter if isinstance(parameter, str) else None
        self.said = words_of(error)
        super().__init__(self.said)


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
        ReportedError: If it is an error under another status.
        UnusableError: If it is no chat completion.
    """
    found = _json(body)
    if not isinstance(found, Mapping):
        raise UnusableError("it is no JSON object")
    choices = found.get("choices")
    if found.get("error") and not choices:
        raise ReportedError(found["error"])
    if not isinstance(choices, list) or not choices:
        raise UnusableError("it has no choices")
    return Completion((_sampled(choices[0]),), _usage(found.get("usage"), request))


def _json(body: bytes) -> Any:
    try:
        return json.loads(body.decode(json.detect_encoding(body), "replace"))
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(": ")[0]
        raise UnusableError(f"it is no JSON: {said}" if body.strip() else "it is empty") from None


def _sampled(choice: Any) -> Sampled:
    if not isinstance(choice, Mapping) or not isinstance(choice.get("message"), Mapping):
        raise UnusableError("its first choice has no message")
    reason = choice.get("finish_reason")
    if choice.get("error") or reason == "error":
        raise ReportedError(choice.get("error") or "it ended its answer with an error")
    message = choice["message"]
    text = _text(message.get("content")) or _text(message.get("refusal"))
    return Sampled(text, _first_tokens(choice.get("logprobs")), reason == "stop" if isinstance(reason, str) else None)


def _text(content: object) -> str:
    """The text of a message's content, which may come in chunks of several kinds."""
    if content is None:
        return ""
    if isinstance(content, str):
        return whole_characters(content)
    if isinstance(content, list) and all(isinstance(chunk, (str, Mapping)) for chunk in content):
        texts = (chunk if isinstance(chunk, str) else chunk.get("text") for chunk in content)
        return "".join(whole_characters(text) for text in texts if isinstance(text, str))
    raise UnusableError("its content is no text")


def _first_tokens(logprobs: object) -> tuple[tuple[str, float], ...] | None:
    """The likeliest first tokens that have a log-probability; None if there are none, or no distribution at all."""
    positions = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    first = positions[0] if isinstance(positions, list) and positions else None
    listed = first.get("top_logprobs") if isinstance(first, Mapping) else None
    entries = [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []
    found = []
    for each in entries:
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
    counts = usage if isinstance(usage, Mapping) else {}

    def counted(name: str, otherwise: int) -> int:
        value = counts.get(name)
        usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS
        return value if isinstance(value, int) and usable else otherwise

    return Usage(
        1,
        counted("prompt_tokens", expected.prompt_tokens),
        counted("completion_tokens", expected.completion_tokens),
    )

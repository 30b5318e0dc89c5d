"""`Wording`: how a server wants to be asked, as far as its refusals have shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from persona_lens.completions.messages import SAMPLING, CompletionRequest

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

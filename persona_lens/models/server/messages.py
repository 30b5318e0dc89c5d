"""Where a server is, what is asked of it, what comes back and what that costs; the cache that pays for each once."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import cache_folder, write_bytes
from persona_lens.core.text import without_credentials

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
NO_KEY = "none"
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
CONCURRENCY = 16
TIMEOUT = 60.0  # seconds


class ServerError(PersonaLensError):
    """A server that cannot be used, or that fails again and again."""


class SpendingLimitError(PersonaLensError):
    """Going on would cost more than was allowed."""


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


@dataclass(frozen=True)
class Prices:
    """What a server charges.

    Attributes:
        prompt: US dollars for a million tokens read.
        completion: US dollars for a million tokens written.
    """

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        if not all(isfinite(price) and price >= 0 for price in (self.prompt, self.completion)):
            raise PersonaLensError(
                f"prices are dollars a million tokens, 0 or more; got {self.prompt, self.completion}"
            )

    def cost(self, usage: Usage) -> float:
        """US dollars."""
        return (usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion) / 1e6


@dataclass
class Spending:
    """What was used so far, and how far it may go.

    What is under way counts with its estimate, so that many requests at once keep the limit too; and estimates are
    raised by as much as those before them were too low. Only the first few requests can cost more than was expected.

    Attributes:
        prices: None where nobody said what is charged.
        limit: US dollars; None for no limit.
        used: Answers of the server, those from the cache left out.
        cached: Answers from the cache.
    """

    prices: Prices | None = None
    limit: float | None = None
    used: Usage = field(default_factory=Usage)
    cached: Usage = field(default_factory=Usage)
    _reserved: float = 0.0
    _estimated: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        if self.limit is not None and self.prices is None:
            raise PersonaLensError("a spending limit needs prices: say what a million tokens cost (--prices IN,OUT)")
        if self.limit is not None and not (isfinite(self.limit) and self.limit > 0):
            raise PersonaLensError(f"a spending limit is a sum above 0 in dollars, got {self.limit}")

    @property
    def cost(self) -> float | None:
        """US dollars spent so far; None without prices."""
        return self.prices.cost(self.used) if self.prices else None

    def reserve(self, estimate: Usage) -> float:
        """Set money aside for a request, and return how much.

        Raises:
            SpendingLimitError: If the limit would be passed.
        """
        if self.prices is None:
            return 0.0
        spent, expected = self.prices.cost(self.used), self.prices.cost(self._estimated)
        price = self.prices.cost(estimate) * (max(1.0, spent / expected) if expected else 1.0)
        if self.limit is not None and spent + self._reserved + price > self.limit:
            raise SpendingLimitError(
                f"the spending limit of ${self.limit:,.2f} is reached: ${spent:,.4f} are spent, and the next request "
                f"costs up to ${price:,.4f}. All answers so far are kept; the same command with a higher limit goes on."
            )
        self._reserved += price
        return price

    def settle(self, reserved: float, estimate: Usage, used: Usage | None) -> None:
        """Give back what was set aside, and count what was used instead; None if there was no answer."""
        self._reserved -= reserved
        if used is not None:
            self.used += used
            self._estimated += estimate

    def found(self, usage: Usage) -> None:
        """Count an answer from the cache."""
        self.cached += usage


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


def default_cache() -> Path:
    """Where completions are kept unless something else is said."""
    return cache_folder() / "completions"


class CompletionCache:
    """A file for each answer, in folders by the first digits of its key.

    A file appears whole or not at all, so that any number of processes can share the folder, on network disks too.

    Args:
        folder: Where; `default_cache` by default.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_cache()

    def get(self, key: str) -> Completion | None:
        """The answer of that key, or None if there is none; a damaged file counts as none."""
        try:
            return Completion.from_json(json.loads(self._file(key).read_bytes()))
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        except OSError as error:
            raise PersonaLensError(f"cannot read the cache of answers in {self.folder}: {error}") from error

    def put(self, key: str, completion: Completion) -> None:
        """Keep an answer."""
        write_bytes(self._file(key), json.dumps(completion.to_json()).encode(), shared=True)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


Answer = Completion | Refused
Done = Callable[[int, Answer], None]
Keep = Callable[[CompletionRequest, Completion], bool]


@dataclass(frozen=True)
class ServerSettings:
    """Where a server is and how hard it may be driven.

    Attributes:
        model: The model's name there.
        base_url: Address, up to ``/v1``; None takes ``OPENAI_BASE_URL``, or OpenAI itself.
        key_variable: The environment variable that holds the key. It is read when the server is first asked.
        concurrency: Requests under way at the same time.
        timeout: Seconds that one attempt may take, to the last byte of its answer.
        attempts: How often a request is tried before the whole work stops.
        requests_per_minute: No more than so many; None for no limit.
        tokens_per_minute: No more than so many, answers counted at their longest; None for no limit.
    """

    model: str
    base_url: str | None = None
    key_variable: str = OPENAI_KEY
    concurrency: int = CONCURRENCY
    timeout: float = TIMEOUT
    attempts: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise ServerError("name the server's model")
        if not _VARIABLE.fullmatch(self.key_variable):
            raise ServerError("name the environment variable that holds the key, such as OPENAI_API_KEY, not the key")
        if self.concurrency < 1 or self.attempts < 1:
            raise ServerError(f"concurrency and attempts are at least 1, got {self.concurrency} and {self.attempts}")
        for name in ("timeout", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise ServerError(f"{name} must be above 0, got {value}")
        if not _is_address(self.url):
            raise ServerError(f"a server's address looks like http://127.0.0.1:8000/v1, got {self.shown!r}")

    @property
    def url(self) -> str:
        """The address that is asked."""
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")

    @property
    def shown(self) -> str:
        """The address without a name, password or key that may stand in it."""
        return without_credentials(self.url)

    def key(self) -> str:
        """The key to send.

        Raises:
            ServerError: If there is none, and OpenAI itself is asked or the variable was named.
        """
        found = os.environ.get(self.key_variable, "").strip()
        if not (found.isascii() and found.isprintable()):
            raise ServerError(f"the key in {self.key_variable} has characters that no key has; set it again")
        if not found and urlsplit(self.url).hostname == urlsplit(OPENAI).hostname:
            raise ServerError(f"{self.shown} needs a key: set {self.key_variable}")
        if self.key_variable != OPENAI_KEY and self.key_variable not in os.environ:
            raise ServerError(f"{self.shown}: no environment variable of the name that was given for the key is set")
        return found or NO_KEY


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:
        return False

"""An OpenAI-compatible server: where it is, how hard it may be driven, what it charges, and what it has answered."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import TypeAdapter

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import cache_folder, write_bytes
from persona_lens.core.text import without_credentials
from persona_lens.models.completions import Answer, Completion, CompletionRequest, Usage

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
NO_KEY = "none"
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
CONCURRENCY = 16
TIMEOUT = 60.0  # seconds

Done = Callable[[int, Answer], None]
Keep = Callable[[CompletionRequest, Completion], bool]


class ServerError(PersonaLensError):
    """A server that cannot be used, or that fails again and again."""


class SpendingLimitError(PersonaLensError):
    """Going on would cost more than was allowed."""


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


class CompletionCache:
    """A file for each answer, in folders by the first digits of its key.

    A file appears whole or not at all, so that any number of processes can share the folder, on network disks too.

    Args:
        folder: Where; a folder in the project's cache by default.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder) if folder is not None else cache_folder() / "completions"

    def get(self, key: str) -> Completion | None:
        """The answer of that key, or None if there is none; a damaged file counts as none."""
        try:
            return _COMPLETION.validate_json(self._file(key).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        except OSError as error:
            raise PersonaLensError(f"cannot read the cache of answers in {self.folder}: {error}") from error

    def put(self, key: str, completion: Completion) -> None:
        """Keep an answer."""
        write_bytes(self._file(key), json.dumps(asdict(completion)).encode(), shared=True)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


_COMPLETION = TypeAdapter(Completion)

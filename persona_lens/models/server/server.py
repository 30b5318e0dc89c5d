"""`CompletionServer`: an OpenAI-compatible server, asked for many completions at a time."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import without_credentials
from persona_lens.models.server.messages import Completion, CompletionCache, CompletionRequest, Refused, Spending
from persona_lens.models.server.reading import Wording

if TYPE_CHECKING:
    from persona_lens.models.server.sending import Sender

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
NO_KEY = "none"
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
CONCURRENCY = 16
TIMEOUT = 60.0  # seconds

Answer = Completion | Refused
Done = Callable[[int, Answer], None]
Keep = Callable[[CompletionRequest, Completion], bool]


class ServerError(PersonaLensError):
    """A server that cannot be used, or that fails again and again."""


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


@dataclass
class CompletionServer:
    """A server and what is known of it.

    Attributes:
        settings: Where and how.
        cache: Answers so far; what is in it is not asked again.
        spending: What was used, and how much may be.
        wording: How it wants to be asked; found out as it is.
    """

    settings: ServerSettings
    cache: CompletionCache = field(default_factory=CompletionCache)
    spending: Spending = field(default_factory=Spending)
    wording: Wording = field(default_factory=Wording)

    def check(self) -> None:
        """Make sure, without asking anything, that something could be asked.

        Raises:
            ServerError: If packages for it are missing, or a key.
        """
        _sender(self)

    def complete(
        self,
        requests: Sequence[CompletionRequest],
        done: Done = lambda index, answer: None,
        *,
        keep: Keep = lambda request, answer: True,
    ) -> list[Answer]:
        """Ask for many completions; equal requests are asked once.

        May be called from anywhere, a running event loop included. Each answer is in the cache before ``done`` hears
        of it. When one request fails for good, or the program is interrupted, no new one begins, and the answers to
        those under way are still kept.

        Args:
            requests: What to ask.
            done: Told the index of a request and its answer, as they come; called from another thread. What it raises
                ends the work as a failure does.
            keep: Which answers are worth to be kept in the cache, so that they are not asked for again.

        Returns:
            An answer for each request, in their order.

        Raises:
            ServerError: If the server cannot be reached or used, or fails again and again.
            SpendingLimitError: If the limit is reached.
        """
        answers: dict[int, Answer] = {}
        twins: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            twins.setdefault(request.key(self.settings.model, self.settings.shown), []).append(index)

        def settle(key: str, answer: Answer) -> None:
            for index in twins[key]:
                answers[index] = answer
                done(index, answer)

        missing: dict[str, CompletionRequest] = {}
        for key, indices in twins.items():
            found = self.cache.get(key)
            if found is None or not found.fits(requests[indices[0]]):
                missing[key] = requests[indices[0]]
            else:
                self.spending.found(found.usage)
                settle(key, found)
        if missing:
            sender = _sender(self, keep)
            try:
                _in_own_loop(sender, missing, settle)
            finally:
                self.wording = sender.wording
        return [answers[index] for index in range(len(requests))]


def _sender(server: CompletionServer, keep: Keep = lambda request, answer: True) -> Sender:
    try:
        from persona_lens.models.server.sending import Sender
    except ModuleNotFoundError as error:
        if error.name not in ("openai", "tenacity", "aiolimiter"):
            raise
        raise ServerError("asking a server needs more packages: pip install 'persona-lens[openai]'") from None
    return Sender(server.settings, server.cache, server.spending, server.wording, keep)


def _in_own_loop(sender: Sender, requests: dict[str, CompletionRequest], settle: Callable[[str, Answer], None]) -> None:
    """Run the sender in a thread of its own, since a notebook's thread has a running event loop already."""
    failure: list[BaseException] = []
    ended = threading.Event()  # an interrupted join() would take the thread for ended

    def run() -> None:
        try:
            asyncio.run(sender.send_all(requests, settle))
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            failure.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        ended.wait()
    except BaseException:
        sender.stop()
        ended.wait(sender.settings.timeout)
        raise
    if failure:
        raise failure[0]

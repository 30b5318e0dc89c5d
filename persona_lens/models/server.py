"""`CompletionServer`: an OpenAI-compatible server, asked for many completions at a time, each paid for once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from persona_lens.core.plugins import install_command
from persona_lens.models.completions import Answer, Completion, CompletionRequest, Refused, Usage, Wording
from persona_lens.models.endpoint import (
    CompletionCache,
    Done,
    Keep,
    Prices,
    ServerError,
    ServerSettings,
    Spending,
    SpendingLimitError,
)

if TYPE_CHECKING:
    from persona_lens.models.sending import Sender

__all__ = [
    "Completion",
    "CompletionCache",
    "CompletionRequest",
    "CompletionServer",
    "Prices",
    "Refused",
    "ServerError",
    "ServerSettings",
    "Spending",
    "SpendingLimitError",
    "Usage",
]


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
                self.spending.cached += found.usage
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
        from persona_lens.models.sending import Sender
    except ModuleNotFoundError as error:
        if error.name not in ("openai", "tenacity", "aiolimiter"):
            raise
        raise ServerError(f"asking a server needs more packages: {install_command('openai')}") from None
    return Sender(server.settings, server.cache, server.spending, server.wording, keep)


def _in_own_loop(sender: Sender, requests: dict[str, CompletionRequest], settle: Callable[[str, Answer], None]) -> None:
    """Run the sender in a thread of its own, since a notebook's thread has a running event loop already."""
    ended: Future[None] = Future()

    def run() -> None:
        try:
            asyncio.run(sender.send_all(requests, settle))
            ended.set_result(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            ended.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        ended.result()
    except BaseException:
        if not ended.done():  # the program was interrupted
            sender.stop()
            wait([ended], sender.settings.timeout)
        raise

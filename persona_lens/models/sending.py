"""`Sender`: the requests of one piece of work, so many at a time, tried again when that may help.

The only module that imports the ``openai`` client.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from email.utils import parsedate_to_datetime
from math import isfinite
from time import time
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import openai
from aiolimiter import AsyncLimiter
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from persona_lens.core.text import forms_of, hide, printable, secrets_in, without_secrets
from persona_lens.core.transport import MIB, AnswerError, AsyncBoundedClient, Bounds
from persona_lens.models.completions import (
    SAMPLING,
    Answer,
    Completion,
    CompletionRequest,
    RefusalError,
    Refused,
    UnusableError,
    Wording,
    read_completion,
)
from persona_lens.models.endpoint import NO_KEY, CompletionCache, Keep, ServerError, ServerSettings, Spending

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
LONGEST_RETRY_AFTER = 600.0
# Tasks that exist at once for each request that may be under way: the others wait for a second attempt.
WINDOW = 8
# Refusals that named a parameter and came again without it: from then on they are of their requests alone.
MOST_TRIALS = 3
LEAST_SECRET = 12  # characters of a key that is looked for in answers
# Bytes of an answer for each of its tokens, and for each with the likeliest tokens beside it.
TOKEN_BYTES, LISTED_TOKEN_BYTES = 256, 8192


class TransientError(Exception):
    """An attempt that failed, where another may not."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Sender:
    """Sends requests to one server; for one piece of work, in one event loop.

    Args:
        settings: Where and how.
        cache: Where answers are kept.
        spending: What may be spent.
        wording: How the server wants to be asked, as far as it has said; `wording` afterwards.
        keep: Which answers are worth to be kept.
    """

    def __init__(
        self, settings: ServerSettings, cache: CompletionCache, spending: Spending, wording: Wording, keep: Keep
    ) -> None:
        self.settings = settings
        self.wording = wording
        self._cache = cache
        self._spending = spending
        self._worth = keep
        self._key = settings.key()
        self._secrets = forms_of([self._key] if self._key != NO_KEY else []) + secrets_in(settings.url)
        self._trials: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending: set[asyncio.Task[Any] | None] = set()

    def stop(self) -> None:
        """Begin nothing new, and let what is under way end; may be called from another thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._stopped = True
        for task in self._tasks - self._sending:
            task.cancel()

    async def send_all(self, requests: Mapping[str, CompletionRequest], settle: Callable[[str, Answer], None]) -> None:
        """Send every request, and hand each answer over under the request's key.

        Raises:
            ServerError: If a request fails for good, after the answers to those under way are kept.
            SpendingLimitError: If the limit is reached, likewise.
        """
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(self.settings.concurrency)
        self._limits = _limiters(self.settings)
        window = asyncio.Semaphore(WINDOW * self.settings.concurrency)
        failures: list[BaseException] = []

        async def run(key: str, request: CompletionRequest) -> None:
            try:
                answer = await self._answer(request)
                if isinstance(answer, Completion) and self._worth(request, answer):
                    await self._keep(key, answer)
                settle(key, answer)
            except Exception as error:  # noqa: BLE001 - the first is raised below
                failures.append(error)
                self._stop()

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            window.release()

        size = max(map(_most_bytes, requests.values()), default=MIB)
        async with self._client(size) as self._asking, asyncio.TaskGroup() as group:
            for key, request in requests.items():
                await window.acquire()
                if self._stopped:
                    break
                task = group.create_task(run(key, request))
                self._tasks.add(task)
                task.add_done_callback(ended)
        if failures:
            raise failures[0]

    async def _keep(self, key: str, answer: Completion) -> None:
        with self._undisturbed():
            await asyncio.to_thread(self._cache.put, key, answer)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """While open, the task goes on when the work is stopped: it holds an answer, or waits for one."""
        task = asyncio.current_task()
        self._sending.add(task)
        try:
            yield
        finally:
            self._sending.discard(task)

    def _client(self, size: int) -> openai.AsyncOpenAI:
        parts = urlsplit(self.settings.url)
        # An address that redirects is shown instead: what is asked goes nowhere that nobody named.
        client: Any = AsyncBoundedClient(Bounds(self.settings.timeout, size), follow_redirects=False)
        # Attempts are counted here, so that a request that waits for its next one leaves its place to another.
        return openai.AsyncOpenAI(
            base_url=urlunsplit(parts._replace(query="", fragment="")),
            default_query=dict(parse_qsl(parts.query)),
            api_key=self._key,
            timeout=self.settings.timeout,
            max_retries=0,
            http_client=client,
        )

    async def _answer(self, request: CompletionRequest) -> Answer:
        """The answer after as many attempts as are allowed."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.settings.attempts),
            wait=_wait,
            retry=retry_if_exception(lambda error: isinstance(error, TransientError) and not self._stopped),
            reraise=True,
        )
        try:
            return await retrying(self._attempt, request)
        except TransientError as error:
            raise ServerError(
                f"{self.settings.shown} failed {self.settings.attempts} times in a row: {error}. All answers so far "
                "are kept; the same command goes on where it stopped."
            ) from error.__cause__

    async def _attempt(self, request: CompletionRequest) -> Answer:
        for limiter, amount in self._limits:
            await limiter.acquire(amount(request))
        async with self._slots:
            estimate, answer = request.tokens(), None
            reserved = self._spending.reserve(estimate)
            try:
                with self._undisturbed():
                    answer = await self._completion(request)
            finally:
                used = answer.usage if isinstance(answer, Completion) else None
                self._spending.settle(reserved, estimate, used)
            return answer

    async def _completion(self, request: CompletionRequest) -> Answer:
        """The server's answer; it is asked again where its refusal shows how it wants to be asked."""
        model, wording = self.settings.model, self.wording
        tried: list[str] = []
        while True:
            found = await self._once(request, wording)
            if isinstance(found, Completion):
                self.wording = self.wording.and_also(wording)
                return replace(found, without=wording.left_out(request, model))
            other = wording.after(found, request, model)
            name = _change(wording, other) if other else ""
            if other is None or self._trials[name] >= MOST_TRIALS:
                self._trials.update(tried)
                return self._refused(found, request)
            wording = other
            tried.append(name)

    async def _once(self, request: CompletionRequest, wording: Wording) -> Completion | RefusalError:
        """What comes of a request in these words, without what is secret."""
        body = wording.body(request, self.settings.model)
        try:
            # The answer is read by us, not by the client: what a server sends is checked before it counts as one.
            raw = await self._asking.post("/chat/completions", body=body, cast_to=openai.HttpxBinaryResponseContent)
            return self._without_secrets(read_completion(raw.content, request))
        except openai.APIStatusError as error:
            entries = error.body if isinstance(error.body, Mapping) else error.response.text or error.message
            refusal = RefusalError(error.status_code, entries, error.response.headers)
        except RefusalError as error:
            refusal = error
        except UnusableError as error:
            raise TransientError(f"its answer is no chat completion: {self._clean(error)}") from None
        except openai.APITimeoutError as error:
            raise TransientError(f"no answer within {self.settings.timeout:g} seconds") from error
        except openai.APIConnectionError as error:
            said = self._clean(error.__cause__ or error)
            known = isinstance(error.__cause__, AnswerError)
            raise TransientError(said if known else f"no connection ({said})") from None
        except openai.OpenAIError as error:
            raise ServerError(f"{self.settings.shown}: {self._clean(error)}") from None
        refusal.said = self._clean(refusal.said)
        if refusal.status is None:
            raise TransientError(f"its answer is an error: {refusal.said}")
        return refusal

    def _without_secrets(self, found: Completion) -> Completion:
        """The answer without what is secret; a key such as "test" is none, and stands in many an honest answer."""
        secrets = [secret for secret in self._secrets if len(secret) >= LEAST_SECRET]
        top = found.top_logprobs
        hidden = tuple((hide(token, secrets), value) for token, value in top) if top is not None else None
        return replace(found, text=hide(found.text, secrets), top_logprobs=hidden)

    def _refused(self, refusal: RefusalError, request: CompletionRequest) -> Refused:
        """What a refusal means, if it is for this request alone.

        Raises:
            ServerError: If it is for all.
            TransientError: If it is for the moment.
        """
        status, said, url, model = refusal.status or 0, refusal.said, self.settings.shown, self.settings.model
        named = next((name for name in SAMPLING if request.needs(name) and refusal.names(name)), None)
        if status in (400, 422) and named:
            raise ServerError(
                f"{url}: the model {model!r} does not let {named} be set to {getattr(request, named):g}, and with "
                f"another the answers would be others; set it to 1, or choose another model. It says: {said}"
            )
        if 300 <= status < 400:
            place = self._clean(without_secrets(refusal.headers.get("location", "somewhere else")))
            raise ServerError(f"{url} sends on to {place}; give the address that answers itself")
        if status in (401, 403):
            raise ServerError(f"{url} does not accept the key in {self.settings.key_variable}: {said}")
        if status == 404:
            raise ServerError(f"{url} has no chat completions by the model {model!r}: {said}")
        if status == 402 or (status == 429 and "insufficient_quota" in said):
            raise ServerError(f"{url}: the account has no quota left: {said}")
        if status in (408, 409, 425, 429) or status >= 500:
            raise self._later(refusal)
        return Refused(f"the server does not take the request (status {status}): {said}")

    def _later(self, refusal: RefusalError) -> Exception:
        seconds = _retry_after(refusal.headers)
        if seconds is not None and seconds > LONGEST_RETRY_AFTER:
            return ServerError(
                f"{self.settings.shown} takes no requests for the next {seconds / 60:,.0f} minutes (status "
                f"{refusal.status}: {refusal.said}). All answers so far are kept; the same command goes on then."
            )
        return TransientError(f"status {refusal.status}: {refusal.said}", seconds)

    def _clean(self, text: object) -> str:
        """A server's words in one harmless line of reasonable length, without what is secret, which some repeat."""
        line = printable(" ".join(without_secrets(hide(str(text), self._secrets)).split()))
        return line if len(line) <= 300 else line[:300] + " …"


def _change(wording: Wording, other: Wording) -> str:
    """What the second leaves out or names otherwise."""
    return next((name for name in other.refused if name not in wording.refused), other.limit)


def _most_bytes(request: CompletionRequest) -> int:
    """Bytes that an answer to the request may have."""
    each = TOKEN_BYTES if request.top_logprobs is None else LISTED_TOKEN_BYTES
    return MIB + min(request.max_tokens * each, 64 * MIB)


def _limiters(settings: ServerSettings) -> list[tuple[AsyncLimiter, Callable[[CompletionRequest], float]]]:
    limiters: list[tuple[AsyncLimiter, Callable[[CompletionRequest], float]]] = []
    if settings.requests_per_minute:
        # A minute's allowance is not spent at once: servers count in shorter spans too.
        limiters.append((_evenly(settings.requests_per_minute), lambda request: 1.0))
    if most := settings.tokens_per_minute:
        limiters.append((AsyncLimiter(most, 60), lambda request: min(float(request.tokens().tokens), most)))
    return limiters


def _evenly(per_minute: float) -> AsyncLimiter:
    return AsyncLimiter(max(1.0, per_minute / 60), 60 * max(1.0, per_minute / 60) / per_minute)


def _wait(state: RetryCallState) -> float:
    """Seconds until the next attempt: what the server asks for, else twice as long each time; never quite the same."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, TransientError) else None
    if asked is not None:
        return asked * random.uniform(1.0, 1.1)
    return min(FIRST_WAIT * 2.0 ** (state.attempt_number - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait for, as a number or until a date; None where it says nothing sensible."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time()
        except (ValueError, OverflowError):
            return None
    return seconds if isfinite(seconds) and seconds > 0 else None

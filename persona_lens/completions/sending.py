"""`Sender`: the requests of one piece of work, so many at a time, tried again when that may help.

The only module that imports the ``openai`` client.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

import openai
from aiolimiter import AsyncLimiter
from pydantic import ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from persona_lens.completions.cache import CompletionCache
from persona_lens.completions.messages import Completion, CompletionRequest, Refused, Wording, read_completion
from persona_lens.completions.server import NO_KEY, Answer, ServerError, ServerSettings
from persona_lens.completions.spending import Spending

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
LONGEST_RETRY_AFTER = 600.0
# Tasks that exist at once for each request that may be under way: the others wait for a second attempt.
WINDOW = 8
# What a refusal begins with, after its code: further on it may repeat the request, which says what it likes.
_WANTS_COMPLETION_TOKENS = re.compile(
    r"(?:\w+ )?unsupported parameter\W+max_tokens\b.*\buse\b.*\bmax_completion_tokens\b", re.I | re.S
)
_UNSUPPORTED_SAMPLING = re.compile(r"(?:\w+ )?unsupported (?:value|parameter)\W+(?P<name>temperature|top_p)\b", re.I)


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
        wording: How the server wants to be asked; changed when it says so.
    """

    def __init__(self, settings: ServerSettings, cache: CompletionCache, spending: Spending, wording: Wording) -> None:
        self.settings = settings
        self._cache = cache
        self._spending = spending
        self._wording = wording
        self._key = settings.key()
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
                if isinstance(answer, Completion):
                    await self._keep(key, answer)
                settle(key, answer)
            except Exception as error:  # noqa: BLE001 - the first is raised below
                failures.append(error)
                self._stop()

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            window.release()

        async with self._client() as self._asking, asyncio.TaskGroup() as group:
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

    def _client(self) -> openai.AsyncOpenAI:
        # Attempts are counted here, so that a request that waits for its next one leaves its place to another.
        return openai.AsyncOpenAI(
            base_url=self.settings.url, api_key=self._key, timeout=self.settings.timeout, max_retries=0
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
                    answer = await self._send(request)
            finally:
                used = answer.usage if isinstance(answer, Completion) else None
                self._spending.settle(reserved, estimate, used)
            return answer

    async def _send(self, request: CompletionRequest) -> Answer:
        try:
            return read_completion(await self._body_of_answer(request), request)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "body"
            raise TransientError(f"its answer is no chat completion ({place}: {first['msg']})") from error
        except openai.APITimeoutError as error:
            raise TransientError(f"no answer within {self.settings.timeout:g} seconds") from error
        except openai.APIConnectionError as error:
            raise TransientError(f"no connection ({self._clean(error.__cause__ or error)})") from error
        except openai.APIStatusError as error:
            refused = self._refusal(error)
            if isinstance(refused, Refused):
                return refused
            raise refused from None
        except openai.OpenAIError as error:
            raise ServerError(f"{self.settings.shown}: {self._clean(error)}") from None

    async def _body_of_answer(self, request: CompletionRequest) -> bytes:
        """What the server answers; it is asked again if it wants the request worded otherwise."""
        body = request.body(self.settings.model, self._wording.limit)
        try:
            return await self._post(body)
        except openai.APIStatusError as error:
            if "max_tokens" not in body or not _WANTS_COMPLETION_TOKENS.match(_said(error)):
                raise
        self._wording.limit = "max_completion_tokens"
        return await self._post(request.body(self.settings.model, self._wording.limit))

    async def _post(self, body: dict[str, Any]) -> bytes:
        # The answer is read by us, not by the client: what a server sends is checked before it counts as one.
        raw = await self._asking.post("/chat/completions", body=body, cast_to=openai.HttpxBinaryResponseContent)
        return raw.content

    def _refusal(self, error: openai.APIStatusError) -> Refused | Exception:
        """What a status other than success means: for this request, for all, or for the moment."""
        said, url, model = self._clean(_said(error)), self.settings.shown, self.settings.model
        if sampling := _UNSUPPORTED_SAMPLING.match(said):
            name = sampling["name"]
            return ServerError(
                f"{url}: the model {model!r} does not let {name} be set, and with another {name} the answers would be "
                f"others; choose another model. It says: {said}"
            )
        if error.status_code in (401, 403):
            return ServerError(f"{url} does not accept the key in {self.settings.key_variable}: {said}")
        if error.status_code == 404:
            return ServerError(f"{url} has no chat completions by the model {model!r}: {said}")
        if error.status_code == 429 and "insufficient_quota" in said:
            return ServerError(f"{url}: the account has no quota left: {said}")
        if error.status_code in (408, 409, 425, 429) or error.status_code >= 500:
            return TransientError(f"status {error.status_code}: {said}", _retry_after(error.response.headers))
        return Refused(f"the server does not take the request (status {error.status_code}): {said}")

    def _clean(self, text: object) -> str:
        """A server's words in one line of reasonable length, without the key, which some servers repeat."""
        line = " ".join(str(text).split())
        if self._key != NO_KEY:
            line = line.replace(self._key, "…")
        return line if len(line) <= 300 else line[:300] + " …"


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
    """Seconds that the server asks to wait for, as a number or until a date."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time()
        except ValueError:
            return None
    return min(seconds, LONGEST_RETRY_AFTER) if seconds > 0 else None


def _said(error: openai.APIStatusError) -> str:
    """The server's own words."""
    body = error.body
    if isinstance(body, Mapping):
        return " ".join(str(body[name]) for name in ("code", "message", "detail") if body.get(name))
    return error.response.text or error.message

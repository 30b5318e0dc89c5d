"""HTTP whose answers end: every one has a deadline as a whole and a largest size, whatever the peer does."""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

import httpx

MIB = 2**20
Result = TypeVar("Result")


class AnswerError(httpx.TransportError):
    """An answer that is not taken: it is too long, or compressed in an unknown way."""


@dataclass(frozen=True)
class Bounds:
    """What an answer may take.

    Attributes:
        seconds: From the request to the last byte, however the bytes are spread over it.
        size: Bytes of the body, compressed or not.
    """

    seconds: float
    size: int = 16 * MIB

    def late(self) -> httpx.ReadTimeout:
        """The error of an answer that took too long."""
        return httpx.ReadTimeout(f"no whole answer within {self.seconds:g} seconds")

    def too_long(self) -> AnswerError:
        """The error of an answer that is too long."""
        return AnswerError(f"its answer is longer than {self.size / MIB:,.1f} MB, so it was not read")


class AsyncBoundedClient(httpx.AsyncClient):
    """A client that reads each answer whole, within bounds.

    A subclass rather than a transport: a client with a transport of its own would not use the proxies that the
    environment names.

    Args:
        bounds: What an answer may take.
        given: As for `httpx.AsyncClient`.
    """

    def __init__(self, bounds: Bounds, **given: Any) -> None:
        super().__init__(**{"timeout": bounds.seconds, **given})
        self._bounds = bounds

    async def send(self, request: httpx.Request, *, stream: bool = False, **given: Any) -> httpx.Response:
        """Send a request; see `httpx.AsyncClient.send`.

        Raises:
            AnswerError: The answer is too long.
            httpx.TimeoutException: It took too long.
        """
        _ask_plain(request)
        try:
            async with asyncio.timeout(self._bounds.seconds):
                answer = await super().send(request, stream=True, **given)
                try:
                    content = await _Content(self._bounds, answer).gather_async(answer.aiter_raw())
                finally:
                    await answer.aclose()
        except TimeoutError as error:
            raise self._bounds.late() from error
        return _whole(answer, content)


class BoundedClient(httpx.Client):
    """As `AsyncBoundedClient`, without an event loop.

    An answer that is asked for as a stream has the deadline for its beginning only, and whoever reads it keeps the
    bounds of the rest.
    """

    def __init__(self, bounds: Bounds, **given: Any) -> None:
        super().__init__(**{"timeout": bounds.seconds, **given})
        self._bounds = bounds

    def send(self, request: httpx.Request, *, stream: bool = False, **given: Any) -> httpx.Response:
        """Send a request; see `httpx.Client.send`, and for errors `AsyncBoundedClient.send`."""
        bounds, ends, send = self._bounds, monotonic() + self._bounds.seconds, super().send
        if stream:
            return _within(bounds, lambda: send(request, stream=True, **given))
        _ask_plain(request)

        def whole() -> httpx.Response:
            answer = send(request, stream=True, **given)
            try:
                return _whole(answer, _Content(bounds, answer).gather(answer.iter_raw(), ends))
            finally:
                answer.close()

        return _within(bounds, whole)


class _Content:
    """The body of an answer as it comes, decompressed no further than the bounds allow."""

    def __init__(self, bounds: Bounds, answer: httpx.Response) -> None:
        self._bounds, self._left, self._chunks = bounds, bounds.size, list[bytes]()
        said = answer.headers.get("content-length", "")
        if said.isdecimal() and (len(said) > 18 or int(said) > bounds.size):
            raise bounds.too_long()
        coding = answer.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise AnswerError(f"its answer is compressed ({coding[:40]}), which nobody asked for")
        self._inflate = zlib.decompressobj(wbits=47) if coding not in ("identity", "") else None

    def add(self, chunk: bytes) -> None:
        if self._inflate is not None:
            try:
                chunk = self._inflate.decompress(chunk, self._left + 1)
            except zlib.error as error:
                raise AnswerError(f"its answer is not compressed as it says: {error}") from error
        self._left -= len(chunk)
        if self._left < 0:
            raise self._bounds.too_long()
        self._chunks.append(chunk)

    def gather(self, chunks: Iterator[bytes], ends: float) -> bytes:
        for chunk in chunks:
            self.add(chunk)
            if monotonic() > ends:
                raise self._bounds.late()
        return b"".join(self._chunks)

    async def gather_async(self, chunks: AsyncIterator[bytes]) -> bytes:
        async for chunk in chunks:
            self.add(chunk)
        return b"".join(self._chunks)


def _ask_plain(request: httpx.Request) -> None:
    request.headers["accept-encoding"] = "identity"


def _whole(answer: httpx.Response, content: bytes) -> httpx.Response:
    """The answer with its content in it."""
    left_out = ("content-encoding", "content-length", "transfer-encoding")
    headers = [(name, value) for name, value in answer.headers.multi_items() if name.lower() not in left_out]
    whole = httpx.Response(answer.status_code, headers=headers, content=content, request=answer.request)
    whole.history = answer.history
    return whole


def _within(bounds: Bounds, work: Callable[[], Result]) -> Result:
    """The result of work in a thread of its own, which is left to itself when its time is over."""
    results: list[Result] = []
    failures: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            failures.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    if not ended.wait(bounds.seconds):
        raise bounds.late()
    if failures:
        raise failures[0]
    return results[0]

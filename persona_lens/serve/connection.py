"""`Connection`: HTTP in which a client that neither asks nor takes its answer is not waited for.

uvicorn has a time limit for the pause between two requests, and none for a head that never comes to its end, for a body
that goes on after its answer, or for an answer that nobody takes: each holds a connection, and the last a reply in
memory. What it refuses itself, it refuses as plain text; here that is in OpenAI's form, as all other errors are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from persona_lens.serve.answers import failure

PATIENCE = 30.0  # seconds for the head of a request to come
STALLED = 60.0  # seconds in which a client takes nothing of what is sent to it
MOST = 1024  # connections


class Connection(H11Protocol):
    """One connection of a client."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """See asyncio; the client has to ask for something from now on."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that every wait for the client is told, by `pause_writing`
        self._answering = self.app
        self._asking, self._taking = _Timer(self.loop), _Timer(self.loop)
        self._untaken = 0  # bytes
        self._asking.start(PATIENCE, self._never_asked)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._asking.stop()
        self._taking.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio; what is no request under way is the head of one, or what a refused one goes on with."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._asking.stop()
        elif not self._asking.runs:
            self._asking.start(PATIENCE, self._never_asked)

    def handle_events(self) -> None:
        """See uvicorn; beyond `MOST` connections a request is told to come again."""
        self.app = self._answering if len(self.connections) <= MOST else _too_many
        super().handle_events()

    def send_400_response(self, msg: str) -> None:
        """See uvicorn; in OpenAI's form."""
        self._refuse(failure(400, msg, "invalid_http", connection="close"))

    def _never_asked(self) -> None:
        begun, _ = self.conn.trailing_data
        if begun and self.conn.our_state is h11.IDLE:
            self._refuse(failure(408, "the request did not come to an end", "timeout", connection="close"))
        else:  # a browser that connected beforehand, or a body that goes on after its answer
            self.transport.abort()

    def _refuse(self, answer: JSONResponse) -> None:
        reason = HTTPStatus(answer.status_code).phrase.encode()
        head = h11.Response(status_code=answer.status_code, headers=answer.raw_headers, reason=reason)
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        """See asyncio: something is left that the client has not taken."""
        super().pause_writing()
        self._untaken = self.transport.get_write_buffer_size()
        self._taking.start(STALLED, self._look)

    def resume_writing(self) -> None:
        """See asyncio: the client has taken all of it."""
        self._taking.stop()
        super().resume_writing()

    def _look(self) -> None:
        """Give up a client that took nothing since the last look; one that is slow goes on."""
        left = self.transport.get_write_buffer_size()
        if left >= self._untaken:
            self.transport.abort()  # to close it would be to wait until all is taken
        else:
            self._untaken = left
            self._taking.start(STALLED, self._look)


class _Timer:
    """Does something later, unless it is stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float, work: Callable[[], None]) -> None:
        self.stop()
        self._handle = self._loop.call_later(seconds, self._over, work)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _over(self, work: Callable[[], None]) -> None:
        self._handle = None
        work()


async def _too_many(scope: Any, receive: Any, send: Any) -> None:
    told = failure(503, "too many connections; try again", "busy", retry_after="2", connection="close")
    await told(scope, receive, send)

"""One trace on its way to an NDIF server: captured once, sent as often as it takes, and what it cost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from persona_lens.backend.protocol import RemoteError, RequestTooLargeError, Traffic
from persona_lens_nnsight.failures import failure_of
from persona_lens_nnsight.library import nnsight
from persona_lens_nnsight.server import Server

assert nnsight  # before the next lines, which would import it otherwise than quietly
from nnsight.intervention.backends.remote import RemoteBackend as Transport  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import Status  # noqa: E402

CONNECT_SECONDS = 10.0
INLINE_BYTES = 8 * 2**20  # larger results do not come back on the connection, but through a store
Saved = TypeVar("Saved")


@dataclass
class Connection:
    """How requests of one model are sent; shared by all of them.

    Attributes:
        server: Where they go.
        model: Its name, for messages.
        key: Its name on the server.
        options: What the server sets before it runs a trace.
        timeout: Seconds that one request may take, its time in the queue included.
        attempts: How often a request is sent at most when the server or the line fails.
        patience: Seconds before the second attempt; doubled before each further one.
        on_status: Told what the server says of a request, such as its place in the queue.
        store_hosts: Hosts other than the server's that results may be fetched from.
    """

    server: Server
    model: str
    key: str
    options: dict[str, Any] = field(default_factory=dict)
    timeout: float = 3600.0
    attempts: int = 5
    patience: float = 2.0
    on_status: Callable[[str], None] = lambda text: None
    store_hosts: tuple[str, ...] = ()
    _traffic: Traffic = field(default_factory=Traffic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def traffic(self) -> Traffic:
        """Requests sent so far."""
        return self._traffic

    def count(self, traffic: Traffic) -> None:
        """Add to `traffic`, from any thread."""
        with self._lock:
            self._traffic += traffic


class Request(Transport):  # type: ignore[misc]  # nnsight has no types
    """A captured trace; `send` gets its result.

    nnsight calls it when the body of a trace ends, with what it captured; nothing is sent then, so that the lock on
    the model need not be held for as long as the server takes.
    """

    def __init__(self, connection: Connection) -> None:
        server = connection.server
        super().__init__(connection.key, host=server.host, api_key=server.key, env=connection.options)
        self.display.enabled = False
        self.connection = connection
        self.payload = b""

    def __call__(self, tracer: Any = None) -> None:
        """Take the trace."""
        self.payload = self._serialize(tracer)

    def send(self) -> dict[str, Any]:
        """The saved values, by the names that the trace gave them.

        Raises:
            RemoteError: What went wrong, after as many attempts as it deserves.
        """
        connection, wait = self.connection, self.connection.patience
        for attempt in range(1, connection.attempts + 1):
            try:
                return self._attempt()
            except Exception as error:  # noqa: BLE001 - of many libraries; raised again in words
                failure = failure_of(error, self.host, connection.model, self.api_key)
                if not failure.transient or attempt == connection.attempts:
                    raise failure.error from failure.error.__cause__
                connection.on_status(f"{failure.error}; attempt {attempt + 1} in {wait:.0f} s")
            time.sleep(wait)
            wait *= 2
        raise AssertionError("every attempt returns or raises")

    def _attempt(self) -> dict[str, Any]:
        import websocket

        deadline = time.monotonic() + self.connection.timeout
        header = {"ndif-api-key": self.api_key} if self.api_key else None
        socket = websocket.create_connection(f"{self.ws_host}/subscribe", timeout=CONNECT_SECONDS, header=header)
        try:
            request = RequestModel(model_key=self.model_key, compress=self.compress, env=self.env)
            request.session_id = json.loads(socket.recv())["session_id"]
            self.connection.count(Traffic(requests=1, bytes_up=len(self.payload)))
            self.handle(self._post(request, self.payload))
            while True:
                response = self.parse(self._next(socket, deadline))
                result = self.handle(response)
                if response.status == Status.COMPLETED:
                    return dict(result or {})
        finally:
            socket.close()

    def _next(self, socket: Any, deadline: float) -> str | bytes:
        import websocket

        socket.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            message: str | bytes = socket.recv()
        except websocket.WebSocketTimeoutException:
            raise RemoteError(
                f"no result after {self.connection.timeout:.0f} s; the server may be busy: try again later, or allow "
                "more with --request-timeout"
            ) from None
        if not message:  # what a closed line reads as
            raise websocket.WebSocketConnectionClosedException("the server closed the connection")
        return message

    def note(self, response: Any) -> bool:
        """Pass on what the server says of the request."""
        if response.status not in (Status.COMPLETED, Status.ERROR):
            self.connection.on_status(f"{response.status.value.lower()}: {response.description or ''}".rstrip(": "))
        return bool(super().note(response))

    def download_result(self, url: Any) -> Any:
        """Take the result off the response, or from a store at a host that is trusted: loading it can run code."""
        if isinstance(url, str) and url:
            host = urlsplit(url).hostname
            if host not in (urlsplit(self.host).hostname, *self.connection.store_hosts):
                raise RequestTooLargeError(
                    f"the server put a large result at {host}, and what comes from there can run code here: let fewer "
                    f"rows run at once (--batch-size), or trust it with --store-host {host}"
                )
        return super().download_result(url)

    def finalize(self, content: bytes) -> Any:
        """Count and load the result."""
        self.connection.count(Traffic(bytes_down=len(content)))
        return super().finalize(content)

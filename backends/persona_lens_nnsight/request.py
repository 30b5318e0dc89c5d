"""One trace on its way to an NDIF server, and what is different there: no weights are here, and code has to get there.

nnsight sends the body of a trace as source, with the names that it reads. Functions and classes of installed packages
go by reference, which fails on a server that does not have the package, unless their module is registered: then their
source goes too. `TRAVELLING` are the engine's modules that traces use; at run time they need nothing but torch.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from transformers import GenerationConfig

from persona_lens.backend import Operation, intervention, sampling, writing
from persona_lens.backend.parts import budget, masks
from persona_lens.backend.protocol import RemoteError, RequestTooLargeError, Traffic
from persona_lens.models import ModelSource
from persona_lens_nnsight.library import nnsight
from persona_lens_nnsight.server import Server, failure_of, no_ndif_server

assert nnsight  # before the next lines, which would import it otherwise than quietly
from nnsight.intervention.backends.remote import RemoteBackend as Transport  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import Status  # noqa: E402

TRAVELLING: tuple[ModuleType, ...] = (budget, intervention, masks, sampling, writing)
# Names and not settings, or settings that do nothing beside a limit on new tokens.
LEFT_ALONE = {"bos_token_id", "decoder_start_token_id", "max_length", "transformers_version"}


def register_travelling() -> None:
    """Let what traces use go to servers that do not have this package; doing it again changes nothing."""
    for module in (*TRAVELLING, *dict.fromkeys(sys.modules[each.moves.__module__] for each in Operation)):
        nnsight.register(module)


def weightless(source: ModelSource, tokenizer: Any, task: str, trust_remote_code: bool = False) -> Any:
    """The nnsight model without weights, its configuration and generation defaults read from ``source``."""
    place: dict[str, Any] = {} if source.revision is None else {"revision": source.revision}
    options = {"trust_remote_code": True} if trust_remote_code else {}
    model = nnsight.TransformersModel(source.location, tokenizer=tokenizer, task=task, **place, **options)
    # Without such a file the defaults follow from the configuration, and they are there already.
    with contextlib.suppress(OSError):
        model._module.generation_config = GenerationConfig.from_pretrained(source.location, **place)
    return model


def model_key(model: Any, source: ModelSource, task: str, revision: str | None) -> str:
    """The name under which the server knows the model.

    Args:
        model: The weightless model.
        source: Where it comes from. A folder's name is its path, which must be the same on the server.
        task: What the model is deployed for.
        revision: What the user asked for: a model deployed without a revision has another key than one with it.
    """
    kind = type(model)
    name = source.location if source.is_local else json.loads(model.to_model_key().partition(":")[2])["repo_id"]
    identity = {"repo_id": name, "revision": revision}
    if model.kwargs.get("trust_remote_code"):
        identity["trust_remote_code"] = True
    return f"{kind.__module__}.{kind.__qualname__}:{json.dumps({**identity, 'task': task})}"


def plain_config(config: GenerationConfig, defaults: GenerationConfig | None) -> dict[str, Any]:
    """Arguments for ``generate`` that say what ``config`` says and switch off what the model's files set beyond it.

    Locally the model's own defaults are put aside while a generation runs. A server's model belongs to all of its
    users, so there every one of them is overruled.
    """
    settings = {name: value for name, value in config.to_dict().items() if value is not None}
    set_there = {} if defaults is None else defaults.to_dict()
    beyond = {name for name, value in set_there.items() if value is not None} - settings.keys() - LEFT_ALONE
    settings = {name: value for name, value in settings.items() if name not in LEFT_ALONE}
    neutral = GenerationConfig._get_default_generation_params()  # of settings that None does not switch off
    return settings | {name: neutral.get(name) for name in beyond}


CONNECT_SECONDS = 10.0
INLINE_BYTES = 8 * 2**20  # larger results do not come back on the connection, but through a store


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
        traffic: Requests sent so far.
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
    traffic: Traffic = field(default_factory=Traffic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, traffic: Traffic) -> None:
        """Add to `traffic`, from any thread."""
        with self._lock:
            self.traffic += traffic


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
        socket: Any = websocket.create_connection(f"{self.ws_host}/subscribe", timeout=CONNECT_SECONDS, header=header)
        try:
            request = RequestModel(model_key=self.model_key, compress=self.compress, env=self.env)
            request.session_id = self._session(socket)
            self.connection.count(Traffic(requests=1, bytes_up=len(self.payload)))
            self.handle(self._post(request, self.payload))
            while True:
                response = self.parse(self._next(socket, deadline))
                result = self.handle(response)
                if response.status == Status.COMPLETED:
                    return dict(result or {})
        finally:
            socket.close()
            socket.shutdown()  # which `close` does not do where the server has hung up

    def _session(self, socket: Any) -> str:
        """What the server calls this request, the first that it says."""
        message = _received(socket)
        try:
            return str(json.loads(message)["session_id"])
        except (ValueError, TypeError, KeyError):
            raise RemoteError(no_ndif_server(self.host)) from None

    def _next(self, socket: Any, deadline: float) -> str | bytes:
        import websocket

        try:
            if (left := deadline - time.monotonic()) <= 0:  # even where something has just arrived
                raise websocket.WebSocketTimeoutException
            socket.settimeout(left)
            return _received(socket)
        except websocket.WebSocketTimeoutException:
            raise RemoteError(
                f"no result after {self.connection.timeout:.0f} s; the server may be busy: try again later, or allow "
                "more with --request-timeout"
            ) from None

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


def _received(socket: Any) -> str | bytes:
    import websocket

    message: str | bytes = socket.recv()
    if not message:  # what a closed line reads as
        raise websocket.WebSocketConnectionClosedException("the server closed the connection")
    return message

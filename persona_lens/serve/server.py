"""`serve` runs a server until it is told to end; `Running` is one in a thread, for notebooks and tests."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from types import FrameType
from urllib.parse import quote

import uvicorn

from persona_lens.core.errors import PersonaLensError
from persona_lens.serve.app import Server
from persona_lens.serve.connection import Connection
from persona_lens.serve.workbench import Workbench

LOOPBACK, PORT = "127.0.0.1", 8017
TOKEN = "PERSONA_LENS_TOKEN"
PATIENCE = 8  # seconds that replies under way have when the server is told to end
# Seconds for which a thread that writes answers may keep the one waiting that runs the model, which lets go of Python
# at every operation and wants it back at once.
SWITCH = 0.0005
SHORTEST = 16


class ServeError(PersonaLensError):
    """A server that cannot be started as it was asked for."""


def token_for(host: str, token: str | None) -> str:
    """The secret that clients have to know: the one given, or on the loopback interface one that is drawn.

    Args:
        host: Address to listen on.
        token: The one given, if one was; else the environment variable ``PERSONA_LENS_TOKEN``.

    Raises:
        ServeError: If others could reach the server and none was given, or it is too short to be one.
    """
    given = token or os.environ.get(TOKEN)
    if given is None and not is_loopback(host):
        raise ServeError(
            f"on {host} others can reach the server: choose a token of your own, --token or the environment variable "
            f"{TOKEN}"
        )
    if given is not None and len(given) < SHORTEST:
        raise ServeError(f"a token has {SHORTEST} characters or more: everybody who guesses it can use the model")
    return given or secrets.token_urlsafe(24)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    workbench: Workbench,
    *,
    host: str = LOOPBACK,
    port: int = PORT,
    token: str | None = None,
    hosts: Sequence[str] = (),
    waiting: int = 128,
    on_ready: Callable[[str, str], None] = lambda address, token: None,
) -> None:
    """Run a server until SIGTERM or SIGINT. Replies under way have 8 seconds then to come to an end.

    Args:
        workbench: The model and its vectors.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        token: See `token_for`.
        hosts: Names that the server goes by, beside ``localhost`` and addresses written as numbers.
        waiting: Requests that may wait.
        on_ready: Told where it listens, and the token.

    Raises:
        ServeError: If it cannot listen there, or needs a token.
    """
    secret = token_for(host, token)
    listening = _listen(host, port)
    sys.setswitchinterval(SWITCH)
    server = Server(workbench, waiting)
    running = _Uvicorn(server, secret, hosts)
    on_ready(address_of(listening), secret)
    try:
        running.run(sockets=[listening])
    finally:
        listening.close()


def address_of(listening: socket.socket) -> str:
    """Where a socket listens, as browsers take it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def link_of(address: str, token: str) -> str:
    """The link that lets a browser in."""
    return f"{address}/?token={quote(token, safe='')}"


class Running:
    """A server in a thread of its own, on the loopback interface.

    Args:
        workbench: The model and its vectors.
        port: Port; 0 takes a free one.
        waiting: Requests that may wait.

    Attributes:
        address: Where it listens.
        token: What clients have to know.
        server: What answers.

    Raises:
        ServeError: If it cannot listen there.
    """

    def __init__(self, workbench: Workbench, port: int = 0, waiting: int = 128) -> None:
        self.token = secrets.token_urlsafe(24)
        listening = _listen(LOOPBACK, port)
        self.address = address_of(listening)
        self.server = Server(workbench, waiting)
        self._uvicorn = _Uvicorn(self.server, self.token, ())
        self._thread = threading.Thread(target=self._run, args=(listening,), daemon=True)
        self._thread.start()
        while not self._uvicorn.started and self._thread.is_alive():
            time.sleep(0.01)
        if not self._thread.is_alive():
            raise ServeError("the server did not start; what is above says why")

    def _run(self, listening: socket.socket) -> None:
        with listening:
            asyncio.run(self._uvicorn.serve(sockets=[listening]))

    @property
    def link(self) -> str:
        """The link that lets a browser in."""
        return link_of(self.address, self.token)

    def close(self) -> None:
        """Let replies under way come to an end, and stop."""
        self._uvicorn.end()
        self._thread.join(PATIENCE + 4)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Uvicorn(uvicorn.Server):
    """Says so to those who ask while it ends."""

    def __init__(self, server: Server, token: str, hosts: Sequence[str]) -> None:
        self._server = server
        config = uvicorn.Config(
            server.app(token, hosts),
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=PATIENCE,
            timeout_keep_alive=30,
            server_header=False,
            http=Connection,
            ws="none",
        )
        super().__init__(config)

    def end(self) -> None:
        """Take no more requests, and end once those under way are answered."""
        self._server.draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End as one who is asked to; uvicorn's own would raise the signal once more afterwards."""
        self.force_exit |= self.should_exit and sig == signal.SIGINT  # the second Ctrl-C
        self.end()


def _listen(host: str, port: int) -> socket.socket:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(kind, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        why = getattr(error, "strerror", None) or str(error)
        raise ServeError(f"cannot listen on {host}:{port}: {why}; choose another --port") from error
    listening.set_inheritable(False)
    return listening

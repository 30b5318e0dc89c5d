"""The NDIF server that nnsight is configured for: which models it has, and its failures in words."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import httpx
import websocket

from persona_lens.backend.protocol import Deployment, RemoteError, RequestTooLargeError, ServerStatus
from persona_lens.core.text import without_credentials
from persona_lens.core.transport import BoundedClient, Bounds
from persona_lens_nnsight.library import nnsight

assert nnsight  # before the next line, which would import it otherwise than quietly
from nnsight.intervention.backends.remote import RemoteError as JobError  # noqa: E402

CONFIGURE = "set NDIF_HOST, or API.HOST in nnsight's configuration"
STATUS_COMMAND = "`persona-lens remote status` shows what can be used"
KEY = "get one at https://login.ndif.us and set NDIF_API_KEY, or run `python -c 'import nnsight; nnsight.login()'`"


class ServerText(Exception):  # noqa: N818 - not an error of its own, but the text of one
    """The server's own words, its traceback included; shown by ``--debug``."""


@dataclass(frozen=True)
class Failure:
    """One failed attempt.

    Attributes:
        error: What to raise.
        transient: Whether the same request may do better a little later.
    """

    error: RemoteError
    transient: bool = False


# What a server says of a job that failed, and what it means.
JOBS: tuple[tuple[str, type[RemoteError], str, bool], ...] = (
    (
        r"exceeded the execution timeout",
        RequestTooLargeError,
        "a request took longer than the server allows; let fewer rows run at once (--batch-size) or shorten responses",
        False,
    ),
    (
        r"out of memory|OutOfMemory",
        RequestTooLargeError,
        "a request needs more memory than the server has; let fewer rows run at once (--batch-size)",
        False,
    ),
    (
        r"Could not deploy|Error starting model|CANT_ACCOMMODATE",
        RemoteError,
        f"the server cannot run {{model}}: {{last}} ({STATUS_COMMAND})",
        False,
    ),
    (
        r"OutOfOrderError|already ran past",
        RemoteError,
        "{model} ran on the server without a block that was to be read or edited: {last}; choose other layers",
        False,
    ),
    (
        r"ModuleNotFoundError|No module named",
        RemoteError,
        "the server lacks a module that the request needs: {last}; the versions here and there do not fit together",
        False,
    ),
    (
        r"object.?store|Could not connect to the endpoint|EndpointConnectionError",
        RequestTooLargeError,
        "a result is larger than the server hands back, and it has no place to store it; let fewer rows run at once "
        "(--batch-size)",
        False,
    ),
    (
        r"try again later|evicted|preempted|cancelled|Critical server error|reconnecting",
        RemoteError,
        "the server gave the request up: {last}",
        True,
    ),
)


def failure_of(error: Exception, host: str, model: str, key: str = "") -> Failure:
    """What an exception of nnsight, httpx or the web socket means.

    Args:
        error: What was raised.
        host: The server.
        model: The model asked for.
        key: The key in use, which servers repeat in their messages; it appears in nothing that is returned.
    """
    text = without_key(str(error), key)
    if isinstance(error, RemoteError):
        return Failure(error)
    if isinstance(error, JobError):
        cause = error.__cause__
        if isinstance(cause, httpx.HTTPStatusError):
            return _refused(cause.response.status_code, text, host)
        if isinstance(cause, httpx.HTTPError):
            return Failure(_error(f"{host} does not answer; {CONFIGURE}, or wait until it is back", text), True)
        return _failed_job(text, model)
    if isinstance(error, websocket.WebSocketBadStatusException):
        busy = error.status_code in (502, 503, 504)
        sentence = f"{host} is busy or restarting" if busy else no_ndif_server(host)
        return Failure(_error(sentence, text), busy)
    if isinstance(error, (websocket.WebSocketConnectionClosedException, ConnectionResetError, BrokenPipeError)):
        sentence = f"{host} closed the connection in the middle of a request"
        return Failure(_error(sentence, text), True)
    if isinstance(error, websocket.WebSocketAddressException):
        return Failure(_error(f"the address {host} is not known; {CONFIGURE}", text))
    if isinstance(error, (OSError, httpx.HTTPError, websocket.WebSocketException)):
        return Failure(_error(f"nothing answers at {host}; {CONFIGURE}, or wait until it is back", text), True)
    return Failure(_error(f"a request to {host} failed: {type(error).__name__}: {text}", text))


def no_ndif_server(host: str) -> str:
    """What to say where something else answers."""
    return f"{host} answers, but is no NDIF server; {CONFIGURE}"


def key_failure(status: int, text: str, host: str) -> RemoteError | None:
    """What is wrong with the key, if that is why a request was refused; ``text`` must not hold the key."""
    if status not in (401, 403) and "API key" not in text:
        return None
    known = "wants a key" if status == 401 else "does not accept the key"
    return _error(f"{host} {known}; {KEY}", text)


def _refused(status: int, text: str, host: str) -> Failure:
    if of_key := key_failure(status, text, host):
        return Failure(of_key)
    if status == 413:
        return Failure(
            _error(
                f"a request is larger than {host} takes; let fewer rows run at once (--batch-size)",
                text,
                RequestTooLargeError,
            )
        )
    if status in (502, 503, 504):
        return Failure(_error(f"{host} is busy or restarting; try again in a few minutes", text), True)
    said = text.removeprefix("Failed to send request: ")
    if "version" in text:
        return Failure(_error(f"{host} does not take requests of this client: {said}", text))
    return Failure(_error(f"{host} refused the request (HTTP {status}): {said}", text))


def _failed_job(text: str, model: str) -> Failure:
    last = (text.strip().splitlines() or ["no reason given"])[-1]
    for pattern, kind, sentence, transient in JOBS:
        if re.search(pattern, text, re.IGNORECASE):
            return Failure(_error(sentence.format(model=model, last=last), text, kind), transient)
    return Failure(_error(f"a trace failed on the server: {last} (--debug shows the server's traceback)", text))


def _error(sentence: str, text: str, kind: type[RemoteError] = RemoteError) -> RemoteError:
    error = kind(sentence)
    error.__cause__ = ServerText(text)
    return error


def without_key(text: str, key: str) -> str:
    """A server's text, from which the key is taken out that some of them repeat."""
    return text.replace(key, "(the key)") if key else text


TIMEOUT = httpx.Timeout(10.0, read=60.0)
BOUNDS = Bounds(90.0)
DEPLOYED = ("HOT", "WARM")


@dataclass(frozen=True)
class Server:
    """The server that nnsight is configured for.

    Attributes:
        host: Its address, without a slash at the end.
        key: The key; never shown.
    """

    host: str
    key: str

    @staticmethod
    def configured() -> Server:
        """The one in ``NDIF_HOST`` and ``NDIF_API_KEY``, or in nnsight's configuration file.

        Raises:
            RemoteError: If the address is not one.
        """
        settings = nnsight.CONFIG.API
        host = str(settings.HOST).rstrip("/")
        if not host.startswith(("http://", "https://")):
            raise RemoteError(f"the address {host!r} must begin with http:// or https://; {CONFIGURE}")
        return Server(host, settings.APIKEY or "")

    def __repr__(self) -> str:
        return f"Server({without_credentials(self.host)!r}, key={'set' if self.key else 'not set'})"

    def status(self) -> ServerStatus:
        """What runs there.

        Raises:
            RemoteError: If it does not answer, is no NDIF server, cannot compute, or does not accept the key.
        """
        if self._get("/ping").text.strip('"\n ') != "pong":
            raise RemoteError(no_ndif_server(self.host))
        if self._get("/connected").status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise RemoteError(f"{self.host} is up, but its compute nodes are not connected; try again in a few minutes")
        self._check_key()
        listed = self._get("/status")
        if not listed.is_success:
            raise RemoteError(f"{self.host} does not say which models it has (HTTP {listed.status_code})")
        account = self._get("/whoami").json().get("email")
        return ServerStatus(without_credentials(self.host), bool(self.key), account, _deployments(listed.json()))

    def _check_key(self) -> None:
        """Send a request without a payload: it is refused either for its key or for the payload, and does nothing."""
        answer = self._call("POST", "/request", data={"data": json.dumps({"model_key": "none"})})
        error = key_failure(answer.status_code, without_key(answer.text, self.key), self.host)
        if error is not None:
            raise error

    def _get(self, path: str) -> httpx.Response:
        return self._call("GET", path)

    def _call(self, method: str, path: str, **content: Any) -> httpx.Response:
        headers = {"ndif-api-key": self.key} if self.key else {}
        try:
            with BoundedClient(BOUNDS, timeout=TIMEOUT) as client:
                return client.request(method, self.host + path, headers=headers, **content)
        except httpx.HTTPError as error:
            failure = failure_of(error, self.host, "", self.key)
            raise failure.error from failure.error.__cause__


def missing_model(model: str, revision: str | None, status: ServerStatus) -> str | None:
    """Why the model may not answer, in a sentence that names those that would; None if it will."""
    found = [d for d in status.deployments if d.model == model and revision in (None, d.revision)]
    if any(deployment.usable for deployment in found):
        return None
    usable = ", ".join(sorted({d.model for d in status.deployments if d.usable})) or "none at the moment"
    state = f"is {found[0].state}" if found else "is not deployed"
    return f"{model} {state} on {status.host}; models that answer now: {usable} ({STATUS_COMMAND})"


def _deployments(answer: dict[str, Any]) -> tuple[Deployment, ...]:
    """One entry a model and revision; of its replicas the one that answers soonest."""
    found: dict[tuple[str, str], Deployment] = {}
    for name, entry in answer.get("deployments", {}).items():
        if entry.get("deployment_level") not in DEPLOYED:
            continue
        state = str(entry.get("application_state", "UNKNOWN"))
        model, revision = str(entry.get("repo_id", name)), str(entry.get("revision") or "main")
        deployment = Deployment(model, revision, state, state == "RUNNING")
        if (model, revision) not in found or deployment.usable:
            found[model, revision] = deployment
    return tuple(sorted(found.values(), key=lambda d: (d.model, d.revision)))

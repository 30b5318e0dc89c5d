"""An NDIF server, asked before any work whether the work can be done there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

from persona_lens.backend.protocol import Deployment, RemoteError, ServerStatus
from persona_lens.core.text import without_credentials
from persona_lens.core.transport import BoundedClient, Bounds
from persona_lens_nnsight.failures import CONFIGURE, STATUS_COMMAND, failure_of, key_failure, without_key
from persona_lens_nnsight.library import nnsight

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
            raise RemoteError(f"{self.host} answers, but is no NDIF server; {CONFIGURE}")
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

"""What a backend says about models that run on a server: `ServerStatus`, and how its requests are doing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from persona_lens.backend.edits import Edit
from persona_lens.backend.protocol import Backend
from persona_lens.backend.reads import Read
from persona_lens.backend.registry import BackendError
from persona_lens.backend.tokens import Sampling, TokenBatch


class RemoteError(BackendError):
    """A server cannot be used, or a request to it failed; the message says what to do."""


class RequestTooLargeError(RemoteError):
    """What a request sends or brings back is more than the server takes; fewer rows at once may do."""


@dataclass(frozen=True)
class Deployment:
    """A model on a server.

    Attributes:
        model: Hub id.
        revision: Branch, tag or commit.
        state: The server's own word for it, such as ``RUNNING`` or ``DEPLOYING``.
        usable: Whether a request would be answered now.
    """

    model: str
    revision: str
    state: str
    usable: bool


@dataclass(frozen=True)
class ServerStatus:
    """A server that answered.

    Attributes:
        host: Its address.
        key: Whether a key is configured; never the key itself.
        account: Whom the server takes the key to belong to, if it says.
        deployments: Its models.
    """

    host: str
    key: bool
    account: str | None
    deployments: tuple[Deployment, ...]


@dataclass(frozen=True)
class Traffic:
    """Requests to a server, planned or made.

    Attributes:
        requests: Their number.
        bytes_up: Sent.
        bytes_down: Received.
    """

    requests: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.requests + other.requests, self.bytes_up + other.bytes_up, self.bytes_down + other.bytes_down
        )


@runtime_checkable
class RemoteBackend(Backend, Protocol):
    """A backend whose model is on a server."""

    @property
    def traffic(self) -> Traffic:
        """Requests made so far, those that were tried again counted each time."""
        ...

    def generation_traffic(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Traffic:
        """What `generate` with these arguments would send, and receive at most; nothing is sent."""
        ...

    def forward_traffic(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> Traffic:
        """What `forward` with these arguments would send and receive; nothing is sent."""
        ...

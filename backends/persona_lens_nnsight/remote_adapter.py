"""The adapter for models on an NDIF server: the same traces, sent as requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from persona_lens.backend import (
    BackendError,
    Edit,
    Edits,
    Read,
    Sampling,
    TokenBatch,
)
from persona_lens.backend.arrivals import WatchedByReplay
from persona_lens.backend.edits import edits_of_rows
from persona_lens.backend.protocol import RemoteError, RequestTooLargeError, Traffic
from persona_lens.backend.sinks import depend_on_sinks
from persona_lens.models import ModelSource, load_tokenizer, pinned, resolve
from persona_lens_nnsight.adapter import TASK, NNsightBackend
from persona_lens_nnsight.library import logits_envoy
from persona_lens_nnsight.request import (
    INLINE_BYTES,
    Connection,
    Request,
    model_key,
    plain_config,
    register_travelling,
    weightless,
)
from persona_lens_nnsight.server import Server, missing_model

FLOAT_BYTES, ID_BYTES = 4, 8


class RemoteNNsightBackend(WatchedByReplay, NNsightBackend):
    """A model on the NDIF server that nnsight is configured for.

    Args:
        model: The nnsight model, without weights.
        tokenizer: The model's own.
        source: Where configuration and tokenizer come from.
        connection: How requests are sent.
        requests_at_once: How many may be under way at the same time.
    """

    watched_as = "a remote generation"  # where no callback can travel

    def __init__(
        self, model: Any, tokenizer: Any, source: ModelSource, connection: Connection, requests_at_once: int = 1
    ) -> None:
        super().__init__(model, tokenizer, source.id, source.identity)
        # Neither the weights nor what they are held in can be seen from here.
        self.info = replace(self.info, weights=None, dtype="remote", device="remote", remote=True)
        self.calls_at_once = requests_at_once
        self._head = logits_envoy(model)
        self._connection = connection
        self._payloads: dict[tuple[object, ...], int] = {}

    @classmethod
    def open_remote(
        cls,
        model: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        request_timeout: float = 3600.0,
        requests_at_once: int = 4,
        store_hosts: Sequence[str] = (),
        on_status: Callable[[str], None] | None = None,
        offline: bool = False,
    ) -> RemoteNNsightBackend:
        """Open a model on the server; here only its configuration and its tokenizer are loaded.

        Args:
            model: Hub id, or a folder that has the same path on the server.
            revision: Branch, tag or commit on the hub; must be the one that is deployed.
            trust_remote_code: Run code that the model's repository brings.
            chat_template: The text of a chat template instead of the tokenizer's.
            request_timeout: Seconds that a request may take, its time in the queue included.
            requests_at_once: How many requests may be under way at the same time.
            store_hosts: Hosts that large results may be fetched from. Loading a result can run code, so that only the
                server itself is trusted without being named.
            on_status: Told what the server says of a request, such as its place in the queue.
            offline: Neither ask the server whether it has the model, nor send it a first small request.

        Raises:
            RemoteError: If the server cannot be used, or does not run the model.
        """
        if request_timeout <= 0 or requests_at_once < 1:
            raise RemoteError("request_timeout must be above 0 and requests_at_once at least 1")
        server = Server.configured()
        source = pinned(resolve(model, revision, weights=False))
        register_travelling()
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, chat_template=chat_template)
        wrapped = weightless(source, tokenizer, TASK, trust_remote_code)
        connection = Connection(
            server=server,
            model=source.id,
            key=model_key(wrapped, source, TASK, revision),
            options={"attn_implementation": wrapped.attn_implementation},
            timeout=request_timeout,
            store_hosts=tuple(store_hosts),
        )
        if on_status is not None:
            connection.on_status = on_status
        backend = cls(wrapped, tokenizer, source, connection, requests_at_once)
        if not offline:
            backend.check(source.location if source.is_local else source.id, revision)
        return backend

    def check(self, name: str, revision: str | None) -> None:
        """Make sure that the server can be used and runs the model, by asking it and by a small request.

        The request measures the limits of attention sinks.

        Raises:
            RemoteError: If not; says which models the server has.
        """
        status = self._connection.server.status()
        missing = missing_model(name, revision, status)
        try:
            assert self.sink_limits
        except RemoteError as error:
            if missing is None:
                raise
            raise RemoteError(f"{missing}. Asked nevertheless, it said: {error}") from error.__cause__

    @property
    def traffic(self) -> Traffic:
        """See `persona_lens.backend.protocol.RemoteBackend.traffic`."""
        return self._connection.traffic

    def generation_traffic(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Traffic:
        """See `persona_lens.backend.protocol.RemoteBackend.generation_traffic`."""
        longest, lengths = sampling.max_new_tokens + 1, [len(prompt) for prompt in prompts]

        def capture(rows: int, some: Sequence[Edit], request: Request) -> None:
            self._capture_generation(prompts[:rows], sampling.rows(0, rows), some, reads, request)

        ids = len(prompts) * longest * ID_BYTES
        return self._traffic("generate", lengths, max(lengths) + longest, edits, reads, capture, ids)

    def forward_traffic(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> Traffic:
        """See `persona_lens.backend.protocol.RemoteBackend.forward_traffic`."""

        def capture(rows: int, some: Sequence[Edit], request: Request) -> None:
            self._capture_forward(tokens.rows(0, rows), some, reads, logprobs, request)

        values = sum(map(len, tokens.responses)) * FLOAT_BYTES if logprobs else 0
        what = f"forward, {logprobs}"
        return self._traffic(what, tokens.lengths, max(tokens.lengths), edits, reads, capture, values)

    def _traffic(
        self,
        what: str,
        lengths: Sequence[int],
        width: int,
        edits: Sequence[Edit],
        reads: Sequence[Read],
        capture: Callable[[int, Sequence[Edit], Request], object],
        beside: int,
    ) -> Traffic:
        """What a call sends, in batches halved until what they bring back fits; so many bytes come beside the reads.

        The bytes of another request of the same shape are as good as the same.
        """
        rows = len(lengths)
        while self._is_too_large(self._result_bytes(reads, rows, width), rows):
            rows = -(-rows // 2)
        shape = (what, rows, width, len(edits), *(read.kind for read in reads))
        if shape not in self._payloads:
            request = Request(self._connection)
            capture(rows, edits_of_rows(edits, 0, rows, lengths), request)
            self._payloads[shape] = len(request.payload)
        requests = -(-len(lengths) // rows)
        down = self._result_bytes(reads, len(lengths), width) + beside
        return Traffic(requests, requests * self._payloads[shape], down)

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """Not possible: the weights are on the server."""
        raise BackendError("editing() needs the weights, which are on the server; open the model without remote")

    def _result_bytes(self, reads: Sequence[Read], rows: int, width: int) -> int:
        per_row = sum(read.values_per_row(self.info.n_layers, self.info.d_model, width) for read in reads)
        return FLOAT_BYTES * rows * per_row

    def _is_too_large(self, result: int, rows: int) -> bool:
        return rows > 1 and result > INLINE_BYTES and not self._connection.store_hosts

    @property
    def device(self) -> None:
        """Left to the server."""
        return None

    def _request(self, edits: Sequence[Edit], reads: Sequence[Read], rows: int, width: int) -> Request:
        if self._is_too_large(result := self._result_bytes(reads, rows, width), rows):
            raise RequestTooLargeError(
                f"{rows} rows bring back {result / 2**20:.0f} MiB, and a server hands back {INLINE_BYTES / 2**20:.0f} "
                "at once; fewer rows or layers do, or a store for large results (--store-host)"
            )
        if depend_on_sinks(edits, reads):
            assert self.sink_limits  # by a request of its own, if the model was opened offline
        return Request(self._connection)

    def known_limits(self) -> tuple[float, ...] | None:
        """Those that were measured already: to count what a request would cost, none is sent."""
        return self.__dict__.get("sink_limits")

    def _arguments(self, config: Any) -> dict[str, Any]:
        return plain_config(config, self._defaults)

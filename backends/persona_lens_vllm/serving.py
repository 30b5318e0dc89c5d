"""`Orders`: lets a ``vllm serve`` take edits and reads with its completions.

An ASGI middleware (``--middleware``), which runs in vLLM's API server around its own routes and keeps to their
authentication: a request is looked at when the route that it goes to begins to read it. Of one that carries an order,
see `persona_lens_vllm.wire`, the order is checked and handed to the workers, and its name is all that goes on to the
engine; what was read is added to the answer. The request is given a cache salt of its edits, so that nobody, with or
without an order, goes on from keys and values that were computed under others.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from persona_lens.backend import BackendError, ModelInfo
from persona_lens.backend.packed.run import reads_of
from persona_lens.backend.parts import Parts
from persona_lens.backend.parts.asked import limited_for, parts_for
from persona_lens.core.errors import PersonaLensError
from persona_lens_vllm.caches import cache_keys
from persona_lens_vllm.facts import facts_of
from persona_lens_vllm.fidelity import check_outcome
from persona_lens_vllm.opening import require_ours
from persona_lens_vllm.tags import ORDER, TAG, written
from persona_lens_vllm.wire import TOLD, VERSION, OrderError, RowOrder, tensor_data
from persona_lens_vllm.worker import Expected, Order, Outcome

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Any, Receive, Send], Awaitable[None]]

COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
MODELS = "/v1/models"
ANSWER = "persona_lens"  # the field of an answer that is ours
MOST_AT_ONCE = 1024  # orders that are kept for requests under way
# What no token before a response depends on.
_SAMPLING = ("vllm_xargs", "seed", "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "user")


class Orders:
    """The middleware.

    Args:
        app: What it is around.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._engine: _Engine | None = None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer a request as the server does, and what it orders too."""
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        method = scope.get("method") if scope["type"] == "http" else None
        if (method, path) == ("GET", MODELS):
            models = _Answer(send, self._with_facts(scope))
            await self._app(scope, receive, models.send)
        elif method == "POST" and path in COMPLETIONS:
            self._engine = self._engine or _Engine(scope["app"].state)
            exchange = _Exchange(self._engine, receive, send)
            try:
                await self._app(scope, exchange.receive, exchange.send)
            finally:
                await exchange.end()
        else:
            await self._app(scope, receive, send)

    def _with_facts(self, scope: Any) -> Callable[[int, bytes], Awaitable[tuple[int, bytes]]]:
        async def add(status: int, body: bytes) -> tuple[int, bytes]:
            if status != 200:
                return status, body
            self._engine = self._engine or _Engine(scope["app"].state)
            return status, json.dumps({**json.loads(body), ANSWER: self._engine.facts}).encode()

        return add


class _Engine:
    """The server's engine and its model.

    Attributes:
        refusal: Why it takes no orders; None if it does.
        facts: What clients are told of it.
        under_way: Names of the orders that the workers keep.
    """

    def __init__(self, state: Any) -> None:
        self._client = state.engine_client
        config = self._client.vllm_config
        self.info: ModelInfo = facts_of(config, str(config.model_config.model))
        self.refusal: str | None = None
        self.under_way: set[str] = set()
        try:
            require_ours(config)
            if config.parallel_config.data_parallel_size != 1:
                raise BackendError("orders are not told to several copies of a model; start a server for each")
        except BackendError as error:
            self.refusal = str(error)
        self.facts = {
            "version": VERSION,
            "refusal": self.refusal,
            "context_length": int(config.model_config.max_model_len),
            "vocabulary": int(config.model_config.get_vocab_size()),
            **{name: getattr(self.info, name) for name in TOLD},
        }

    async def expect(self, name: str, order: RowOrder) -> None:
        """Hand an order to the workers."""
        if len(self.under_way) >= MOST_AT_ONCE:
            raise OrderError(f"{MOST_AT_ONCE} orders are under way; send fewer at once")
        tokenizer = self._client.get_tokenizer()
        told = None if order.parts is None else Parts.marked(tokenizer, *order.parts)
        parts = parts_for(tokenizer, order.edits, order.reads, told)
        limited = limited_for(tokenizer, order.thinking_budget, told)
        self.under_way.add(name)
        expected = Expected(order, self.info.n_layers, self.info.d_model, parts, limited)
        await self._client.collective_rpc("persona_lens_expect", args=(name, pickle.dumps(expected)))

    async def take(self, name: str) -> list[str | tuple[Order, Outcome]]:
        """What came of it."""
        self.under_way.discard(name)
        taken = await self._client.collective_rpc("persona_lens_take", args=(name,))
        return [pickle.loads(each) for each in taken if each is not None]


class _Answer:
    """An answer that is held back until it is whole, and then sent as something makes it of it."""

    def __init__(self, send: Send, change: Callable[[int, bytes], Awaitable[tuple[int, bytes]]]) -> None:
        self._send, self._change = send, change
        self._start: Message = {}
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        """Take a part of it."""
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                status, body = await self._change(int(self._start["status"]), bytes(self._body))
                kept = [pair for pair in self._start["headers"] if pair[0].lower() != b"content-length"]
                headers = [*kept, (b"content-length", str(len(body)).encode())]
                await self._send({**self._start, "status": status, "headers": headers})
                await self._send({"type": "http.response.body", "body": body})


class _Exchange:
    """A request and its answer."""

    def __init__(self, engine: _Engine, receive: Receive, send: Send) -> None:
        self._engine, self._receive, self._send = engine, receive, send
        self._read = False
        self._order: RowOrder | None = None
        self._refusal: tuple[int, str] | None = None
        self._name: str | None = None
        self._answer = _Answer(send, self._answered)

    async def receive(self) -> Message:
        """The request, when the route asks for it, without its order."""
        if self._read:
            return await self._receive()
        self._read = True
        parts: list[bytes] = []
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        body = b"".join(parts)
        if ORDER.encode() in body:
            body = await self._without_order(body)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """A part of the answer."""
        asked = self._order is not None or self._refusal is not None
        await (self._answer.send(message) if asked else self._send(message))

    async def end(self) -> None:
        """Leave nothing behind in the workers."""
        if self._name is not None:
            name, self._name = self._name, None
            await self._engine.take(name)

    async def _without_order(self, body: bytes) -> bytes:
        try:
            request = json.loads(body)
            text = request["vllm_xargs"].pop(ORDER)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return body  # no order where one has its place; the server says what it is
        try:
            if self._engine.refusal is not None:
                raise OrderError(self._engine.refusal)
            order = RowOrder.read(text, self._engine.info.n_layers, self._engine.info.d_model)
            changed = _ordered(request, order, self._engine.info)
            name = secrets.token_hex(16)
            changed["vllm_xargs"][TAG] = written(name, order.noise)
            self._order, self._name = order, name
            await self._engine.expect(name, order)
        except PersonaLensError as error:
            self._refusal = 400, str(error)
        except Exception as error:  # noqa: BLE001 - in here it would become an error of reading the request
            self._refusal = 500, f"{type(error).__name__}: {error}"
        else:
            return json.dumps(changed).encode()
        return b"{}"  # which no route takes; what it says to it is replaced

    async def _answered(self, status: int, body: bytes) -> tuple[int, bytes]:
        """The answer with what was read; an error instead where something was not done as it had to be."""
        if self._refusal is None and status == 200 and self._order is not None:
            try:
                answer = json.loads(body)
                answer[ANSWER] = await self._found(self._order, answer["usage"])
                return status, json.dumps(answer).encode()
            except OrderError as error:
                self._refusal = 400, str(error)
            except Exception as error:  # noqa: BLE001 - the client is told
                self._refusal = 500, f"{type(error).__name__}: {error}"
        if self._refusal is None:
            return status, body
        code, said = self._refusal
        told = {"message": said, "type": "BadRequestError" if code == 400 else "InternalServerError", "code": code}
        return code, json.dumps({"error": told}).encode()

    async def _found(self, order: RowOrder, usage: Any) -> dict[str, Any]:
        assert self._name is not None
        name, self._name = self._name, None
        outcomes: list[Outcome] = []
        tokens = int(usage["prompt_tokens"]) + int(usage["completion_tokens"]) - 1  # the last one is not run over
        for taken in await self._engine.take(name):
            if isinstance(taken, str):
                raise OrderError(taken)
            planned, outcome = taken
            if outcome.error is not None:
                raise OrderError(outcome.error)
            tokens = min(tokens, planned.call.texts[0] + planned.call.room)
            check_outcome(planned, outcome, [tokens])
            outcomes.append(outcome)
        logprobs = next((o.logprobs for o in outcomes if o.logprobs is not None), None)
        return {
            "version": VERSION,
            "tokens": tokens,
            "reads": {
                kind: tensor_data(value)
                for kind, value in reads_of(order.reads, [each.reads for each in outcomes], [tokens]).items()
            },
            **({"logprobs": tensor_data(logprobs)} if logprobs is not None else {}),
        }


def _ordered(request: dict[str, Any], order: RowOrder, info: ModelInfo) -> dict[str, Any]:
    """The request as it goes on.

    Raises:
        OrderError: If it is one that an order cannot be for.
    """
    several = [name for name in ("n", "best_of") if request.get(name) not in (None, 1)]
    several += [name for name in ("stream", "use_beam_search", "truncate_prompt_tokens") if request.get(name)]
    if several:
        raise OrderError(f"an order is for one answer that comes whole; leave out {', '.join(several)}")
    prompt = request.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list | str):
        prompt = prompt[0]
    ids = prompt if isinstance(prompt, list) else None
    if ids is not None and not all(type(token) is int for token in ids):
        raise OrderError("an order is for one prompt; send a request for each")
    if ids:
        key = cache_keys(order.edits, order.check_tokens(len(ids), info.n_layers, info.d_model))[0]
    else:  # how long it is, on which it may depend where edits are made, is not known yet
        fixed = {name: value for name, value in request.items() if name not in _SAMPLING}
        edited = "".join(edit.content_hash for edit in order.edits)
        key = edited and hashlib.sha256(json.dumps([edited, fixed], sort_keys=True).encode()).hexdigest()
    parts = [key, secrets.token_hex(16) if order.whole else ""]
    if any(parts):
        request["cache_salt"] = hashlib.sha256(json.dumps([request.get("cache_salt"), *parts]).encode()).hexdigest()
    if order.noise is not None:
        request["temperature"] = 0  # the noise is added to the logits, and the largest is taken
    return request

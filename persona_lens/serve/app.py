"""The server's routes: OpenAI's, and those of its own under ``/v1/persona_lens``."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from persona_lens.backend import BackendError, EditError, Operation
from persona_lens.core.documents import DocumentError, parse_json
from persona_lens.core.errors import PersonaLensError
from persona_lens.monitoring import Panel
from persona_lens.serve import answers
from persona_lens.serve.admission import BusyError
from persona_lens.serve.guard import Guard, TooLargeError
from persona_lens.serve.metrics import KIND
from persona_lens.serve.panel import read_conversation, steering_shown, vectors_shown
from persona_lens.serve.replies import Replies, gathered
from persona_lens.serve.requests import (
    ChatRequest,
    CompletionRequest,
    ConversationRequest,
    EditsRequest,
    Generation,
    PreviewRequest,
    RequestError,
    read_request,
    steering_in,
)
from persona_lens.serve.session import Session
from persona_lens.serve.workbench import Answer, Begun, Planned, Said, TooLongError, Workbench
from persona_lens.steering.history import DEFAULT_HISTORY, History, HistoryError

Found = TypeVar("Found")
GONE = 499  # the client went away; nobody reads this answer
LARGEST = 64 * 2**20
MOST_REPLIES = 64  # of one request: all its prompts and choices


class Server:
    """What the routes answer with.

    Args:
        workbench: The model and its vectors.
        waiting: Requests that may wait.
    """

    def __init__(self, workbench: Workbench, waiting: int = 128) -> None:
        self.workbench = workbench
        self.replies = Replies(workbench, waiting)
        self.name = workbench.backend.info.model
        self.draining = False

    def app(self, token: str, hosts: Sequence[str] = (), largest: int = LARGEST) -> ASGIApp:
        """The application, guarded."""
        own = "/v1/persona_lens"
        routes = [
            Route("/health", self._answered(self.health)),
            Route("/metrics", self._answered(self.metrics)),
            Route("/v1/models", self._answered(self.models)),
            Route("/v1/chat/completions", self._answered(self.chat), methods=["POST"]),
            Route("/v1/completions", self._answered(self.completions), methods=["POST"]),
            Route(f"{own}/vectors", self._answered(self.vectors)),
            Route(f"{own}/vectors", self._answered(self.bring), methods=["POST"]),
            Route(own + "/vectors/{name}", self._answered(self.remove), methods=["DELETE"]),
            Route(f"{own}/preview", self._answered(self.preview), methods=["POST"]),
            Route(f"{own}/read", self._answered(self.read), methods=["POST"]),
            Route(f"{own}/export", self._answered(self.export), methods=["POST"]),
            Route(f"{own}/presets", self._answered(self.presets)),
            Route(own + "/presets/{name}", self._answered(self.preset), methods=["PUT", "DELETE"]),
        ]
        page = files("persona_lens.serve") / "page"
        if page.is_dir():
            routes.append(Mount("/", _Page(directory=str(page), html=True)))  # type: ignore[arg-type]

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            self.replies.close()

        errors: dict[Any, Any] = {404: _no_such_route, 405: _no_such_method}
        return Guard(Starlette(routes=routes, lifespan=lifespan, exception_handlers=errors), token, hosts, largest)

    def _answered(
        self, work: Callable[[Request], Coroutine[Any, Any, Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route whose errors are answers, and which is counted."""
        route = work.__name__

        async def answer(request: Request) -> Response:
            try:
                found = await work(request)
            except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer and the server goes on
                found = refusal(error)
            self.replies.metrics.requests.labels(route, str(found.status_code)).inc()
            return found

        return answer

    async def health(self, _: Request) -> Response:
        """Whether the server answers."""
        return JSONResponse({"status": "draining" if self.draining else "ok"}, 503 if self.draining else 200)

    async def metrics(self, _: Request) -> Response:
        """What was counted."""
        return Response(self.replies.metrics.text(), headers={"content-type": KIND})

    async def models(self, _: Request) -> Response:
        """The model, and the model under each preset."""
        names = [self.name, *(f"{self.name}:{preset}" for preset in self.workbench.shelf.presets)]
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "persona-lens"} for name in names]
        return JSONResponse({"object": "list", "data": listed})

    async def chat(self, request: Request) -> Response:
        """``/v1/chat/completions``."""
        asked: ChatRequest = await self._read(request, ChatRequest)
        prompt = await asyncio.to_thread(self.workbench.encode, asked.conversation)
        planned = await self._plan(asked, [prompt])
        wording = answers.Wording(True, asked.model or self.name, f"chatcmpl-{secrets.token_hex(12)}", self._tokenizer)
        if asked.stream:
            return await self._streamed(asked, planned, wording)
        return await self._whole(request, asked, planned, wording)

    async def completions(self, request: Request) -> Response:
        """``/v1/completions``."""
        asked: CompletionRequest = await self._read(request, CompletionRequest)
        if asked.persona_lens is not None and asked.persona_lens.history is not None:
            what = "a text has no turns that are over; leave history out, or ask /v1/chat/completions"
            raise RequestError(what, param="persona_lens.history")
        prompts = await asyncio.to_thread(lambda: [self._ids(prompt) for prompt in asked.prompts])
        wording = answers.Wording(False, asked.model or self.name, f"cmpl-{secrets.token_hex(12)}", self._tokenizer)
        if asked.echo and asked.stream:
            raise RequestError("echo is given without stream here", param="echo")
        if asked.max_tokens == 0 and not asked.echo:
            raise RequestError("max_tokens is to be 1 or more", param="max_tokens")
        if asked.max_tokens == 0 and asked.logprobs is None:
            texts = [self._tokenizer.decode(prompt) for prompt in prompts for _ in range(asked.choices)]
            choices = [wording.choice(number, text, None, "length", {}) for number, text in enumerate(texts)]
            return JSONResponse(wording.whole(choices, answers.usage(prompts, [])))
        planned = await self._plan(asked, prompts)
        if asked.stream:
            return await self._streamed(asked, planned, wording)
        return await self._whole(request, asked, planned, wording)

    def _ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        ids = self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if not ids:
            raise RequestError("the prompt is empty", param="prompt")
        return tuple(map(int, ids))

    @property
    def _tokenizer(self) -> Any:
        return self.workbench.backend.tokenizer

    async def _read(self, request: Request, kind: Any) -> Any:
        return read_request(kind, await _json(request))

    async def _plan(self, asked: Generation, prompts: Sequence[tuple[int, ...]]) -> list[Planned]:
        if self.draining:
            raise RequestError("the server is about to end", 503, "draining")
        shelf = self.workbench.shelf
        named = steering_in(asked.model, self.name, shelf.vectors)
        given = asked.persona_lens.edits if asked.persona_lens is not None else ""
        if named and given:
            raise RequestError("the model's name steers, and persona_lens.edits does too; use one", param="model")
        if len(prompts) * asked.choices > MOST_REPLIES:
            raise RequestError(f"a request may ask for {MOST_REPLIES} replies in all", param="n")
        wanted = asked.asked(prompts, named or given)
        return await asyncio.to_thread(lambda: [self.workbench.plan(each) for each in wanted])

    async def _whole(
        self, request: Request, asked: Generation, planned: Sequence[Planned], wording: answers.Wording
    ) -> Response:
        found = await _unless_gone(request, gathered(self.replies, planned))
        echo, unsaid = (asked.echo, asked.max_tokens == 0) if isinstance(asked, CompletionRequest) else (False, False)
        choices = []
        for number, each in enumerate(planned):
            answer, said, prompt = found.answers[number], found.said[number], each.asked.prompt
            if unsaid:  # what was generated to read the prompt
                answer, said = answers.unsaid(answer, len(prompt)), []
            told = {
                **answers.begun_told(each, found.begun[number]),
                "tokens": [answers.said_told(token) for token in said],
                **answers.answer_told(each, answer),
            }
            text = wording.text_of(answer)
            text = self._tokenizer.decode(prompt) + text if echo else text
            scores = answer.scores if each.asked.top_of_prompt else None
            logprobs = wording.said_logprobs(said) if scores is None else wording.text_logprobs(scores, prompt[0])
            choices.append(
                wording.choice(number, text, logprobs, answers.finish_reason(answer), told, answer.reasoning)
            )
            found.answers[number] = answer
        prompts = {each.asked.prompt: None for each in planned}
        return JSONResponse(wording.whole(choices, answers.usage(prompts, found.answers.values())))

    async def _streamed(self, asked: Generation, planned: Sequence[Planned], wording: answers.Wording) -> Response:
        self.replies.admission.check()  # while there can be another answer than a stream
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage

        async def events() -> AsyncGenerator[bytes, None]:
            over: list[Answer] = []
            try:
                async with aclosing(self.replies.of(planned)) as news:
                    async for number, what in news:
                        yield answers.event(_chunk(wording, number, planned[number], what))
                        if isinstance(what, Answer):
                            over.append(what)
            except Exception as error:  # noqa: BLE001 - the stream has begun: it says what went wrong, and ends
                yield answers.event(json.loads(bytes(refusal(error).body)))
            else:
                if with_usage:
                    yield answers.event(wording.used(answers.usage({p.asked.prompt: None for p in planned}, over)))
            yield answers.DONE

        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return _Stream(events(), media_type="text/event-stream", headers=headers)

    async def vectors(self, _: Request) -> Response:
        """The model's vectors, and where each is read."""
        shown = await asyncio.to_thread(vectors_shown, self.workbench)
        return JSONResponse({**shown, "operations": [str(operation) for operation in Operation]})

    async def bring(self, request: Request) -> Response:
        """Add vectors: the body is a file of them."""
        name, content = request.headers.get("x-name", ""), await request.body()
        vectors = await asyncio.to_thread(self.workbench.shelf.bring, name, content)
        return JSONResponse({"name": vectors.trait}, 201)

    async def remove(self, request: Request) -> Response:
        """Remove vectors that were added."""
        self.workbench.shelf.remove(request.path_params["name"])
        return JSONResponse({"removed": request.path_params["name"]})

    async def preview(self, request: Request) -> Response:
        """What a steering does, and to which tokens."""
        asked: PreviewRequest = await self._read(request, PreviewRequest)
        messages = None if asked.messages is None else [message.plain() for message in asked.messages]
        history = None if asked.history is None else History(asked.history)
        return JSONResponse(await asyncio.to_thread(steering_shown, self.workbench, asked.edits, messages, history))

    async def read(self, request: Request) -> Response:
        """Read traits off a conversation."""
        asked: ConversationRequest = await self._read(request, ConversationRequest)
        shelf = self.workbench.shelf
        panel = Panel(tuple(shelf.gauges(asked.watch)))
        steering = shelf.steering(asked.edits)
        messages = [message.plain() for message in asked.messages]
        history = DEFAULT_HISTORY if asked.history is None else History(asked.history)
        found = await asyncio.to_thread(read_conversation, self.workbench, panel, messages, steering, history)
        return JSONResponse(found)

    async def export(self, request: Request) -> Response:
        """A session's file as a page that stands alone."""
        content = await request.body()
        page = await asyncio.to_thread(lambda: Session.from_jsonl(content).html())
        return Response(page, media_type="text/html", headers={"content-disposition": "attachment"})

    async def presets(self, _: Request) -> Response:
        """Steerings by name."""
        return JSONResponse({"presets": self.workbench.shelf.presets})

    async def preset(self, request: Request) -> Response:
        """Store a steering, or forget it."""
        name, shelf = request.path_params["name"], self.workbench.shelf
        if request.method == "DELETE":
            await asyncio.to_thread(shelf.drop_preset, name)
            return JSONResponse({"removed": name})
        asked: EditsRequest = await self._read(request, EditsRequest)
        return JSONResponse({"name": name, "edits": await asyncio.to_thread(shelf.keep_preset, name, asked.edits)})


class _Stream(StreamingResponse):
    """A stream that is over once its client has gone, and not when Python comes to collect it."""

    body_iterator: AsyncGenerator[bytes, None]

    async def __call__(self, *given: Any) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(*given)


class _Page(StaticFiles):
    """The page's files; the browser asks for them anew each time, so that a newer version is seen at once."""

    def file_response(self, *given: Any, **options: Any) -> Response:
        found = super().file_response(*given, **options)
        found.headers["cache-control"] = "no-cache"
        return found


def _chunk(wording: answers.Wording, number: int, planned: Planned, what: Begun | Said | Answer) -> dict[str, Any]:
    if isinstance(what, Begun):
        return wording.chunk(number, "", answers.begun_told(planned, what), first=True)
    if isinstance(what, Said):
        told = {"tokens": [answers.said_told(what)]}
        return wording.chunk(number, what.text, told, part=what.part, content=what.content, said=[what])
    told, reason = answers.answer_told(planned, what), answers.finish_reason(what)
    rest = what.rest or None
    return wording.chunk(number, rest, told, part=what.rest_of, content=what.content_rest, reason=reason)


def refusal(error: Exception) -> JSONResponse:
    """An error as an answer: what the client can put right is said, and of anything else only that it happened."""
    if isinstance(error, RequestError):
        return answers.failure(error.status, error.message, error.code, error.param)
    if isinstance(error, BusyError):
        return answers.failure(429, "too many requests wait; try again", "busy", retry_after="2")
    if isinstance(error, TooLongError):
        return answers.failure(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, TooLargeError):
        return answers.failure(413, "the request is too large", "request_too_large")
    if isinstance(error, TimeoutError):
        return answers.failure(408, "the request did not come to an end", "timeout", connection="close")
    if isinstance(error, ClientDisconnect):
        return answers.failure(GONE, "the client went away")
    if isinstance(error, EditError) and not isinstance(error, HistoryError):  # found while it ran: too strong
        return answers.failure(400, str(error), "edit_too_strong")
    if isinstance(error, PersonaLensError) and not isinstance(error, BackendError):
        return answers.failure(400, str(error))
    if isinstance(error, BackendError):
        return answers.failure(500, str(error), "model_failed")
    return answers.failure(500, f"the server failed ({type(error).__name__}); it goes on", "internal_error")


async def _json(request: Request) -> Any:
    try:
        return parse_json(await request.body())
    except DocumentError as error:
        raise RequestError(f"the body is no JSON: {error}") from None


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Found]) -> Found:
    """The result of some work, which ends when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def _no_such_route(request: Request, _: Exception) -> Response:
    return answers.failure(404, f"there is nothing at {request.url.path[:100]}", "not_found")


async def _no_such_method(request: Request, _: Exception) -> Response:
    return answers.failure(405, f"{request.method} is not for this address", "method_not_allowed")

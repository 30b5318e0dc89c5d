"""`Guard`: who may speak to the server: those with its token, from its own pages, in requests of bounded size.

A server on the loopback interface is within reach of every page that a browser on the machine has open. So a request
must name the server as its host (a name that is made to point here does not), must not come from another page, and
must carry the token, in a header or in the cookie that the link with the token leaves.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persona_lens.serve.answers import failure

COOKIE = "persona_lens_token"
OPEN = ("/health",)
PATIENCE = 30.0  # seconds for the whole of a request to come
SAFE = ("GET", "HEAD")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'self' http://localhost:* "
    "http://127.0.0.1:* vscode-webview:; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_OWN = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


class Guard:
    """An ASGI middleware around everything that the server answers.

    Args:
        app: What it answers with.
        token: The secret that clients have to know.
        hosts: Names of the server beside ``localhost`` and addresses written as numbers.
        largest: Bytes of a body at most.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Iterable[str] = (), largest: int = 64 * 2**20) -> None:
        self._app, self._token, self._largest = app, token, largest
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refusal(scope, headers)
        if refused is not None:
            await refused(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._largest:
            await self._too_large()(scope, receive, send)
            return
        body = _Body(receive, self._largest)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_OWN]
            await send(message)

        await self._app(scope, body, sent)

    def _too_large(self) -> Response:
        return failure(413, f"a request may have {self._largest} bytes at most", "request_too_large")

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            return failure(403, "this server does not go by that name", "forbidden")
        origin = headers.get("origin")
        if (origin is not None and _place(origin) != host) or (
            scope["method"] not in SAFE and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
        ):
            return failure(403, "requests from other pages are not answered", "forbidden")
        if scope["path"] in OPEN:
            return None
        given = _token_asked(scope["query_string"].decode("latin-1"))
        if scope["path"] == "/" and scope["method"] in SAFE and given:
            return self._welcome() if self._is_token(given) else self._stranger()
        return None if self._is_token(_token_in(headers)) else self._stranger()

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode("utf-8", "replace"), self._token.encode())

    def _welcome(self) -> Response:
        """Leave the token in a cookie, and take it out of the address."""
        answer = RedirectResponse("/", status_code=303, headers=HEADERS)
        answer.set_cookie(COOKIE, self._token, httponly=True, samesite="strict")
        return answer

    def _stranger(self) -> Response:
        return failure(
            401, "this server wants its token: `Authorization: Bearer TOKEN`, or the link it printed", "invalid_api_key"
        )


def _place(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _token_asked(query: str) -> str:
    try:
        return parse_qs(query, max_num_fields=16).get("token", [""])[0]
    except ValueError:  # more fields than any link of the server has
        return ""


def _token_in(headers: Headers) -> str:
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return token.strip()
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


class TooLargeError(Exception):
    """A body that says nothing of its size, or not the truth, goes on beyond what is taken."""


class _Body:
    """Receives a body of bounded size, within bounded time; then only that the client has gone."""

    def __init__(self, receive: Receive, largest: int) -> None:
        self._receive, self._left = receive, largest
        self._until = asyncio.get_running_loop().time() + PATIENCE
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        async with asyncio.timeout_at(self._until):
            message: Any = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._left < 0:
                raise TooLargeError
        found: Message = message
        return found

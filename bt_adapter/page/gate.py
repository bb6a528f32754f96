"""Checks before a request reaches the page: the server's key, the routes that the page uses, the size of the body."""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bt_adapter.serve.errors import ApiError
from bt_adapter.serve.gate import JsonCount, too_large

# gradio has more routes, among them a proxy, redirects to other hosts and an editor
_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/(assets|static|svelte)/.+"
    r"|/gradio_api/(info|startup-events|app_id|upload|upload_progress|cancel|reset|run/predict|queue/join|queue/data)/?"
    r"|/gradio_api/(heartbeat|stream)/.+|/gradio_api/file=(?!https?:|//).+"
)
# browsers then refuse requests to other hosts, whatever a later version of gradio asks them for
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}


class PageGate:
    """ASGI middleware around the page.

    Args:
        app: the page. api_key: the server's key, which the browser asks for as a password (HTTP Basic; the user name
            does not matter); None: none. most: bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, most: int) -> None:
        self.app, self.most = app, most
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":  # the page opens none
            await send({"type": "websocket.close", "code": 1008})
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check(headers, scope["path"])
        except ApiError as error:
            asked = {"WWW-Authenticate": 'Basic realm="BT-Adapter"'} if error.status == 401 else {}
            await JSONResponse(error.body, error.status, error.headers | asked)(scope, receive, answer)
            return
        await self.app(scope, _Counted(headers, receive, self.most).receive, answer)

    def _check(self, headers: Headers, path: str) -> None:
        """Raise ApiError for a wrong key, a route that the page does not use, or a body stated to be too large."""
        if self.api_key is not None and not hmac.compare_digest(_password(headers), self.api_key):
            raise ApiError(401, "the page's password is missing or wrong: it is the API key", code="invalid_api_key")
        if not _ROUTES.fullmatch(path):
            raise ApiError(404, "Not Found")
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self.most:
            raise too_large(self.most)


class _Counted:
    """A request's body, which ends as if the browser had gone when it is too long or has too many values."""

    def __init__(self, headers: Headers, receive: Receive, most: int) -> None:
        self._receive, self._left, self._values = receive, most, JsonCount(headers)

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        piece = message.get("body", b"")
        self._left -= len(piece)
        try:
            self._values.add(piece)
        except ApiError:
            self._left = -1
        return message if self._left >= 0 else {"type": "http.disconnect"}


def _password(headers: Headers) -> bytes:
    """Return the password of HTTP Basic authentication, empty if there is none."""
    kind, _, text = headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return b""
    try:
        return base64.b64decode(text.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""

"""Checks before a request reaches its route: API key, size of the body, request id; and the count of answers."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bt_adapter.serve.errors import ApiError, error_response
from bt_adapter.serve.limits import Limits
from bt_adapter.serve.service import Service

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_GUARDED = "/v1/"
# other paths are counted as one, so that hostile requests add no series to the metrics
_COUNTED = ("/v1/chat/completions", "/v1/models", "/health", "/version", "/metrics", "/openapi.json")


class JsonCount:
    """Counts the values of a JSON body as it comes, so that none is parsed that takes far more memory than its bytes.

    Signs within texts count too: a request about what a model can read has a few thousand of them.

    Args:
        headers: of the request; bodies of other types are not counted.
    """

    most = 100_000

    def __init__(self, headers: Headers) -> None:
        self._is_json, self._values = "json" in headers.get("content-type", "").lower(), 0

    def add(self, piece: bytes) -> None:
        """Count a piece of the body. Raises ApiError if there are too many values."""
        if self._is_json:
            self._values += piece.count(b",") + piece.count(b"[") + piece.count(b"{")
            if self._values > self.most:
                text = f"the request's JSON holds more than the limit of {self.most:,} values"
                raise ApiError(413, text, code="request_too_large")


class Gate:
    """ASGI middleware around the routes.

    Args:
        app: the next application. service: its limits and metrics. api_key: required below ``/v1/``; None: none.
        local: refuse requests to another name than localhost or an IP address. A page of any site, whose name its owner
            lets stand for 127.0.0.1 after it was loaded, could else ask a server of this machine.
    """

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None, local: bool) -> None:
        self.app, self.service, self.limits, self.local = app, service, service.options.limits, local
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        number = given if _ID.fullmatch(given) else secrets.token_hex(16)
        path = scope["path"] if scope["path"] in _COUNTED else "other"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = number
                self.service.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        with self.service.held.account() as hold:
            try:
                if self.local:
                    _check_host(headers.get("host", ""))
                if scope["path"].startswith(_GUARDED):
                    self._check(headers)
                    receive = _Body(self.limits, headers, hold, receive).receive
                await self.app(scope, receive, answer)
            except ApiError as error:
                await error_response(error)(scope, receive, answer)

    def _check(self, headers: Headers) -> None:
        """Raise ApiError for a missing or wrong key, and for a body that is stated to be too large."""
        kind, _, key = headers.get("authorization", "").partition(" ")
        if self.api_key is not None:
            given = key.strip().encode("latin-1", "replace")
            if kind.lower() != "bearer" or not hmac.compare_digest(given, self.api_key):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self.limits.body:
            raise too_large(self.limits.body)


class _Body:
    """A request's body, counted as it comes."""

    def __init__(self, limits: Limits, headers: Headers, hold: Callable[[int], None], receive: Receive) -> None:
        self.limits, self._hold, self._receive, self._size = limits, hold, receive, 0
        self._values = JsonCount(headers)
        self._end = time.monotonic() + limits.upload
        self._complete = False

    async def receive(self) -> MutableMapping[str, Any]:
        """Receive the next message. Raises HTTPException, which the reader of the body lets through."""
        limits = self.limits
        try:
            if self._complete:  # only the end of the connection is still to come
                return await self._receive()
            async with asyncio.timeout(self._end - time.monotonic()):
                message = await self._receive()
            self._complete = not message.get("more_body", False)
            piece = message.get("body", b"")
            self._size += len(piece)
            if self._size > limits.body:
                raise too_large(limits.body)
            self._values.add(piece)
            self._hold(len(piece))
            return message
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not come within {limits.upload:g} seconds") from error
        except ApiError as error:
            raise HTTPException(error.status, error.message, error.headers) from error


def _check_host(host: str) -> None:
    """Raise ApiError unless a request's Host is localhost or an IP address, with any port."""
    name = re.sub(r":\d*$", "", host, flags=re.ASCII).rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError as error:
        text = "this server answers to localhost or an IP address in the header Host alone, as it has no --api-key"
        raise ApiError(403, text, code="host_not_allowed") from error


def too_large(limit: int) -> ApiError:
    """Make the error of a body above the limit."""
    return ApiError(413, f"the request's body is larger than the limit of {limit:,} bytes", code="request_too_large")

"""Checks before a request reaches its route: API key, size of the body, request id; and the count of answers."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bt_adapter.serve.errors import ApiError, error_response
from bt_adapter.serve.service import Service

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_GUARDED = "/v1/"
# other paths are counted as one, so that hostile requests add no series to the metrics
_COUNTED = ("/v1/chat/completions", "/v1/models", "/health", "/version", "/metrics", "/openapi.json")


class Gate:
    """ASGI middleware around the routes.

    Args:
        app: the next application. service: its limits and metrics. api_key: required below ``/v1/``; None: none.
    """

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None) -> None:
        self.app, self.service, self.limits = app, service, service.options.limits
        self.api_key = None if api_key is None else api_key.encode()
        self._held = 0  # bytes of the bodies of all requests

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

        body = _Body(self, receive)
        try:
            if scope["path"].startswith(_GUARDED):
                self._check(headers)
                receive = body.receive
            await self.app(scope, receive, answer)
        except ApiError as error:
            await error_response(error)(scope, receive, answer)
        finally:
            self._held -= body.size

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

    def hold(self, size: int) -> None:
        """Count bytes of a body. Raises ApiError if all bodies together are too large."""
        if self._held + size > self.limits.bodies:
            raise self.service.busy("too many large requests at once")
        self._held += size


class _Body:
    """A request's body, counted as it comes."""

    def __init__(self, gate: Gate, receive: Receive) -> None:
        self.gate, self._receive, self.size = gate, receive, 0
        self._end = time.monotonic() + gate.limits.upload
        self._complete = False

    async def receive(self) -> MutableMapping[str, Any]:
        """Receive the next message. Raises HTTPException, which the reader of the body lets through."""
        limits = self.gate.limits
        try:
            if self._complete:  # only the end of the connection is still to come
                return await self._receive()
            async with asyncio.timeout(self._end - time.monotonic()):
                message = await self._receive()
            self._complete = not message.get("more_body", False)
            new = len(message.get("body", b""))
            if self.size + new > limits.body:
                raise too_large(limits.body)
            self.gate.hold(new)
            self.size += new
            return message
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not come within {limits.upload:g} seconds") from error
        except ApiError as error:
            raise HTTPException(error.status, error.message, error.headers) from error


def too_large(limit: int) -> ApiError:
    """Make the error of a body above the limit."""
    return ApiError(413, f"the request's body is larger than the limit of {limit:,} bytes", code="request_too_large")

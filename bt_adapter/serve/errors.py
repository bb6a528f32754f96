"""Errors of requests, in the shape of OpenAI's API."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

from bt_adapter.files import encode_json

# Beginnings of advice in a reader's errors that is meant for those who run the server.
_ADVICE = ("; to read it, raise max_pixels", "; PIL.Image.MAX_IMAGE_PIXELS sets")
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused or fails.

    Args:
        status: HTTP status code. message: what is wrong and what to do; without paths and addresses of the server.
        param: the field of the request, such as ``messages[0].content[1].video_url``. code: machine-readable reason.
        retry_after: seconds after which to try again, sent as the header ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer, ``{"error": {"message", "type", "param", "code"}}``."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Make the error of a request that asks for something impossible or unsupported (400)."""
    return ApiError(400, message, param, code)


def stopping() -> ApiError:
    """Make the error of a request that the server's end cuts short (503)."""
    return ApiError(503, "the server is stopping", code="stopping")


def reader_text(error: Exception) -> str:
    """Return what a reader of media says in an error, without its name for bytes and without its advice."""
    text = str(error).removeprefix("<bytes>: ")
    for advice in _ADVICE:
        text = text.partition(advice)[0]
    return text


class JsonResponse(JSONResponse):
    """A JSON answer that may repeat any text of a request, also half a surrogate pair, which UTF-8 lacks."""

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return encode_json(json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def error_response(error: ApiError) -> JsonResponse:
    """Make the answer that tells an error."""
    return JsonResponse(error.body, error.status, error.headers)

"""The routes of the server, as a FastAPI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bt_adapter.files import VERSION
from bt_adapter.serve.errors import ApiError, JsonResponse, bad_request, error_response, stopping
from bt_adapter.serve.gate import Gate
from bt_adapter.serve.live import add_live_routes
from bt_adapter.serve.replies import Completion
from bt_adapter.serve.requests import AnswerFields, ChatRequest, FieldError
from bt_adapter.serve.service import Prepared, Service

T = TypeVar("T")
_LONGEST_MESSAGE = 500


class ErrorDetails(BaseModel):
    """An error in OpenAI's shape."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of an answer that refuses a request."""

    error: ErrorDetails


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


def make_app(service: Service, api_key: str | None = None, local: bool = False) -> FastAPI:
    """Make the application of a service, which it closes at its end.

    More routes, such as a page at ``/``, may be added to it: a path is looked up in the order of addition.

    Args:
        service: answers. api_key: key that requests below ``/v1/`` must have; None: none.
        local: answer only requests to localhost or an IP address, see `Gate`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # the pages of /docs would load scripts from another host
    app = FastAPI(title="BT-Adapter", version=VERSION, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Gate, service=service, api_key=api_key, local=local)
    _add_error_handlers(app)
    errors: dict[int | str, dict[str, Any]] = {kind: {"model": ErrorBody} for kind in ("4XX", "5XX")}
    model = {"id": service.options.name, "object": "model", "created": int(time.time()), "owned_by": "bt-adapter"}

    @app.post("/v1/chat/completions", responses=errors)
    async def complete_chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation about stills and videos."""
        return await _answer(request, lambda: service.prepare(body), body, {})

    @app.get("/v1/models", responses=errors)
    async def list_models() -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", responses=errors)
    async def show_model(name: str) -> dict[str, Any]:
        """Describe the model that is served."""
        service.check_model(name)
        return model

    @app.get("/health", responses=errors)
    async def check_health() -> dict[str, str]:
        """Tell that requests are answered."""
        if not service.model.alive:
            raise ApiError(503, "the model has stopped")
        return {"status": "ok"}

    @app.get("/version", responses=errors)
    async def show_version() -> dict[str, str]:
        """Tell the version of the package."""
        return {"version": VERSION}

    @app.get("/metrics", responses=errors)
    async def show_metrics() -> Response:
        """Return counts and times in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    add_live_routes(app, service, _answer, errors)
    return app


async def _answer(
    request: Request, prepare: Callable[[], Coroutine[Any, Any, Prepared]], body: AnswerFields, headers: dict[str, str]
) -> Response:
    """Answer a prompt, whole or as a stream. headers: sent beside those of the answer, read when it is prepared."""
    service = request.app.state.service
    with ExitStack() as held:
        held.enter_context(service.admit())
        held.callback(_observe, service, time.perf_counter())
        prepared = await _unless_gone(request, prepare())
        completion = Completion(
            service, prepared, body.stream_options is not None and bool(body.stream_options.include_usage)
        )
        if body.stream:
            return _Stream(completion, held.pop_all().close, headers)
        whole = await _unless_gone(request, completion.whole())
        return JsonResponse(whole, headers=completion.headers | headers)


class _Stream(StreamingResponse):
    """A streamed answer. close: called when it has ended, however it ends. headers: sent beside its own."""

    def __init__(self, completion: Completion, close: Callable[[], None], headers: dict[str, str]) -> None:
        headers = completion.headers | headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(completion.events(), media_type="text/event-stream", headers=headers)
        self.completion, self.close = completion, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = self.completion.prepared.answering
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not answering.ended:
                self.completion.service.metrics.cancelled.inc()
            answering.cancelled.set()
            self.close()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for work, and cancel it when the client closes the connection or the server stops.

    Raises ClientGone, ApiError.
    """
    service = request.app.state.service

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.create_task(work), asyncio.create_task(gone())
    ending = asyncio.create_task(service.stopping.wait())
    try:
        await asyncio.wait((working, waiting, ending), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if ending.done():
            raise stopping()
        service.metrics.cancelled.inc()
        raise ClientGone
    finally:
        for task in (working, waiting, ending):
            task.cancel()


def _observe(service: Service, begin: float) -> None:
    service.metrics.request_seconds.observe(time.perf_counter() - begin)


def _add_error_handlers(app: FastAPI) -> None:
    """Give every error OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(_of_validation(error))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        response = error_response(ApiError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "the server failed to answer"))


def _of_validation(error: RequestValidationError) -> ApiError:
    """Convert the most specific of a request's validation errors."""
    found = max(error.errors(), key=_specificity)
    if found["type"] == "json_invalid":
        return bad_request(f"the body is not JSON: {found.get('ctx', {}).get('error', found['msg'])}")
    if found["loc"] == ("body",) and found["type"] != "value_error":
        return bad_request("the body must be a JSON object, sent with the header Content-Type: application/json")
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        return bad_request(str(cause), cause.param)
    param = ""
    before: Any = None
    for part in found["loc"][1:]:
        if isinstance(part, int):
            param += f"[{part}]"
        # after a place in a list stands the kind of its item, and some names are of types
        elif not isinstance(before, int) and part.isidentifier() and part != "str":
            param += f".{part}" if param else part
        before = part
    known = {"missing": "is missing", "extra_forbidden": "is not supported"}
    text = known.get(found["type"], found["msg"].removeprefix("Value error, "))
    return bad_request(f"{param or 'body'}: {text}"[:_LONGEST_MESSAGE], param or None)


def _specificity(found: Any) -> tuple[bool, int]:
    """Rank a validation error: of a field that takes several types, those of the other types say little."""
    return not found["type"].endswith("_type"), len(found["loc"])

"""Live sessions over HTTP: frames are sent one by one, and questions are asked at any moment."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from bt_adapter.chat.prompts import Turn
from bt_adapter.chat.watch import EncodedVisual
from bt_adapter.data import VideoError
from bt_adapter.live.session import LiveSession, SessionClosed
from bt_adapter.live.video import WindowKind
from bt_adapter.serve.decoding import DecodingTime
from bt_adapter.serve.errors import ApiError, JsonResponse, bad_request, reader_text
from bt_adapter.serve.media import Media
from bt_adapter.serve.requests import AnswerFields, Count, Rate, Text
from bt_adapter.serve.service import Prepared, Service
from bt_adapter.serve.tokens import Seen

_PICTURES = "image/*"
Answer = Callable[
    [Request, Callable[[], Coroutine[Any, Any, Prepared]], AnswerFields, dict[str, str]], Awaitable[Response]
]


class SessionFields(BaseModel):
    """The window of a live session: see ``LiveVideo``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    window: WindowKind = "sliding"
    frames: Count | None = None
    fps: Rate | None = None
    branch: bool | None = None


class Question(AnswerFields):
    """A question about a live session at the moment of the request."""

    question: Annotated[Text, Field(min_length=1)]


class LiveSessions:
    """The live sessions of a server: at most some, in a bounded number of bytes, closed when idle.

    It is used in the event loop; frames are decoded in threads and encoded in the model's thread.

    Args:
        service: the model, limits and metrics.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.limits = service, service.options.limits
        self._sessions: dict[str, LiveSession] = {}
        self._timer: asyncio.TimerHandle | None = None  # of the next look for idle sessions
        service.metrics.watch("live_sessions", "Open live sessions.", lambda: len(self._sessions))

    def create(self, fields: SessionFields) -> tuple[str, LiveSession]:
        """Open a session. Raises ApiError."""
        self._drop_closed()
        limits, sampling = self.limits, self.service.options.sampling
        if len(self._sessions) >= limits.live_sessions:
            raise self.service.busy(f"{limits.live_sessions} live sessions are open, which is the limit")
        if fields.frames is not None and fields.frames > limits.frames:
            raise bad_request(f"frames must be at most {limits.frames} on this server", "frames")
        branch = self.service.branch_of(fields.branch)
        try:
            session = LiveSession(
                self.service.chat, fields.window, fields.frames, fields.fps, branch, sampling.long, limits.live_idle
            )
        except ValueError as error:
            raise bad_request(str(error)) from error
        if session.nbytes > limits.live_bytes:
            raise bad_request(f"the window takes more than the limit of {limits.live_bytes:,} bytes", "frames")
        if session.nbytes + sum(one.nbytes for one in self._sessions.values()) > limits.live_bytes:
            raise self.service.busy("the open live sessions take all memory that they may")
        key = secrets.token_urlsafe(16)
        self._sessions[key] = session
        if self._timer is None:
            self._drop_later()
        return key, session

    def find(self, key: str) -> LiveSession:
        """Return an open session. Raises ApiError (404)."""
        session = self._sessions.get(key)
        if session is None or session.closed:
            raise _unknown()
        return session

    def close(self, key: str) -> None:
        """Close a session. Raises ApiError (404)."""
        self.find(key).close()
        del self._sessions[key]

    async def push(self, key: str, picture: bytes, time: float | None) -> bool:
        """Add a frame from a picture file, and tell whether it was kept; others are not decoded. Raises ApiError."""
        session, timer = self.find(key), DecodingTime(self.limits.seconds)
        try:
            if not await asyncio.to_thread(session.wants, time):  # it waits while a frame is encoded
                return False
            async with self.service.decoded:
                still = await asyncio.to_thread(self.service.decoder.still, Media((picture,)), timer)
                return await asyncio.wrap_future(self.service.model.run(lambda: session.push(still.pixels, time)))
        except SessionClosed as error:
            raise _unknown() from error
        except VideoError as error:
            raise bad_request(f"the frame cannot be used: {reader_text(error)}", "body", "invalid_media") from error
        except ValueError as error:
            raise bad_request(str(error), "time") from error
        except MemoryError as error:
            raise bad_request("the frame takes too much memory", "body", "invalid_media") from error
        finally:
            timer.cancelled.set()  # the client may have gone

    async def prepare(self, key: str, body: Question, headers: dict[str, str]) -> Prepared:
        """Encode a session's window and build the prompt; the frames' times are added to headers. Raises ApiError."""
        session, turns = self.find(key), [Turn(body.question, ("video",))]
        self.service.check_text(turns, None)
        try:
            view = await asyncio.wrap_future(self.service.model.run(session.view))
        except SessionClosed as error:
            raise _unknown() from error
        except ValueError as error:
            raise bad_request(str(error)) from error
        headers["X-Live-Span"] = ",".join(f"{time:.3f}" for time in view.span)
        visual = EncodedVisual(
            "video", view.visual.tokens, "", view.visual.reads, view.frames, view.kept, encode=view.encode
        )
        return await self.service.make_prompt(body, turns, None, [(Seen(visual, (), visual.tokens.nbytes), False)])

    def _drop_closed(self) -> None:
        self._sessions = {key: session for key, session in self._sessions.items() if not session.closed}

    def _drop_later(self) -> None:
        """Free idle sessions even if no further request comes."""
        self._timer = asyncio.get_running_loop().call_later(self.limits.live_idle / 2, self._drop_idle)

    def _drop_idle(self) -> None:
        self._timer = None
        self._drop_closed()
        if self._sessions:
            self._drop_later()


def add_live_routes(app: FastAPI, service: Service, answer: Answer, errors: dict[int | str, dict[str, Any]]) -> None:
    """Add the routes of live sessions to the application.

    answer: answers a request with a prepared prompt, whole or streamed. errors: descriptions of the routes' errors.
    """
    sessions = app.state.live_sessions = LiveSessions(service)
    content = {_PICTURES: {"schema": {"type": "string", "format": "binary"}}}
    picture = {"requestBody": {"required": True, "content": content}}

    @app.post("/v1/live/sessions", status_code=201, responses=errors)
    async def open_live_session(body: SessionFields) -> dict[str, Any]:
        """Open a live session."""
        key, _ = sessions.create(body)
        about = {"window": body.window, "frames": body.frames, "fps": body.fps}
        return {"id": key, "object": "live.session", **about, "idle_seconds": service.options.limits.live_idle}

    @app.post("/v1/live/sessions/{key}/frames", responses=errors, openapi_extra=picture)
    async def push_live_frame(
        key: str, request: Request, time: Annotated[float | None, Query(allow_inf_nan=False)] = None
    ) -> dict[str, bool]:
        """Add a frame, a picture file as the body; time: seconds, by default those since the session was opened."""
        with service.admit():
            return {"kept": await sessions.push(key, await request.body(), time)}

    @app.post("/v1/live/sessions/{key}/ask", responses=errors)
    async def ask_live_session(key: str, body: Question, request: Request) -> Response:
        """Answer a question about the session's window at this moment, as a chat completion."""
        headers: dict[str, str] = {}
        return await answer(request, lambda: sessions.prepare(key, body, headers), body, headers)

    @app.delete("/v1/live/sessions/{key}", responses=errors)
    async def close_live_session(key: str) -> Response:
        """Close a live session."""
        sessions.close(key)
        return JsonResponse({"id": key, "object": "live.session", "deleted": True})


def _unknown() -> ApiError:
    return ApiError(404, "there is no such live session; it may have been idle for too long", code="session_not_found")

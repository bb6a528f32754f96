"""A live camera on the page: frames are pushed as they come, and questions are about the last of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from bt_adapter.page.answers import stream
from bt_adapter.page.talk import Answers
from bt_adapter.serve.batching import Ended
from bt_adapter.serve.errors import bad_request
from bt_adapter.serve.live import LiveSessions, Question, SessionFields
from bt_adapter.serve.media import MediaError, read_data_url
from bt_adapter.serve.service import Prepared

FPS = 4.0  # frames kept per second, as in bt-adapter live


class LiveTalk(Answers):
    """The camera of one browser's page: a live session of the server, and its answers. Raises ApiError if too many run.

    came, kept, dropped: frames of the camera, those that the model has seen,
    and those that came while it was busy.
    """

    def __init__(self, sessions: LiveSessions) -> None:
        super().__init__()
        self._sessions = sessions
        self._key, _ = sessions.create(SessionFields(fps=FPS))
        self.came = self.kept = self.dropped = 0
        self._busy = False

    @property
    def line(self) -> str:
        """The counts of frames in one line."""
        return f"{self.came} frames came, {self.kept} were taken ({FPS:g} per second), {self.dropped} dropped"

    async def push(self, url: str) -> None:
        """Add the camera's next frame, a picture as a data URL. Raises ApiError."""
        self.came += 1
        if self._busy:
            self.dropped += 1
            return
        self._busy = True
        try:
            media = await asyncio.to_thread(read_data_url, url, self._sessions.limits.media)
            self.kept += await self._sessions.push(self._key, media.pieces[0], None)
        except MediaError as error:
            raise bad_request(f"the frame cannot be used: {error}") from error
        finally:
            self._busy = False

    async def ask(self, question: str) -> AsyncIterator[Prepared | str | Ended]:
        """Answer a question about the window of frames at this moment. Raises ApiError."""
        service = self._sessions.service
        with service.admit():
            prepared = await self._sessions.prepare(self._key, Question(question=question), {})
            yield prepared
            async for piece in stream(service, prepared.answering):
                yield piece

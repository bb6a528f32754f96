"""What the page does when a question is asked, stopped, or another video is chosen."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from pydantic import ValidationError

from bt_adapter.page.answers import ColumnAnswer, answer, answer_columns
from bt_adapter.page.live import LiveTalk
from bt_adapter.page.talk import Choice, Exchange, Talk, make_request
from bt_adapter.serve.batching import Ended
from bt_adapter.serve.errors import ApiError, bad_request
from bt_adapter.serve.live import LiveSessions
from bt_adapter.serve.service import Prepared, Service

Updates = tuple[Any, ...]
LONGEST_QUESTION = 4000  # characters
_UNCHANGED: Updates = (gr.skip(),) * 8  # all outputs of the conversation stay
_STOPPABLE = gr.update(interactive=True)  # of the button that stops; before an answer runs it has nothing to stop


class OpenTalks:
    """The talks with answers in progress, by the browser's page, so that a closed page stops its answers."""

    def __init__(self) -> None:
        self._talks: list[tuple[str | None, Talk | LiveTalk]] = []

    @contextmanager
    def noted(self, request: gr.Request, talk: Talk | LiveTalk) -> Iterator[None]:
        """Note a talk within the context."""
        noted = (request.session_hash, talk)
        self._talks.append(noted)
        try:
            yield
        finally:
            self._talks.remove(noted)

    async def leave(self, request: gr.Request) -> None:
        """Stop the answers of a page that was closed."""
        for key, talk in self._talks:
            if key == request.session_hash:
                talk.stop()


class VideoCallbacks:
    """Callbacks of the conversation about a video and stills.

    Their outputs are the two columns' conversations and lines, the gallery of frames, the question, the button that
    stops and the talk.
    """

    def __init__(self, service: Service, open_talks: OpenTalks) -> None:
        self.service, self.open_talks = service, open_talks
        sampling = service.options.sampling
        self.fps, self.branch = sampling.fps, sampling.branch

    async def ask(
        self,
        question: str,
        video: str | None,
        stills: Sequence[str] | None,
        frames: int,
        compare: bool,
        talk: Talk,
        request: gr.Request,
    ) -> AsyncIterator[Updates]:
        """Answer a question in one column, or with and without the branch in two."""
        question = (question or "").strip()
        if refusal := _refusal(question, talk.running):
            tell(refusal)
            yield _UNCHANGED  # without any result the page would be emptied
            return
        if (path := Path(video) if video else None) != talk.video:
            talk.begin(path)
        given = [Path(still) for still in stills or ()]
        choice, turns = Choice(int(frames), self.fps), talk.turns
        asked = [Exchange(question, talk.new_visuals(n, given), "") for n in range(2 if compare else 1)]
        starts = [partial(self._answer, [*turns[n], one], path, choice, n) for n, one in enumerate(asked)]
        answers: list[ColumnAnswer] = []
        field: Any = ""  # once only: what is typed during the answer stays
        with self.open_talks.noted(request, talk):
            async for answers in answer_columns(starts, talk.running):
                if talk.turns is turns:  # else another video was chosen meanwhile
                    gallery = _frames(talk, choice, answers[0].prepared)
                    yield (*_show(turns, asked, answers), gallery, field, _STOPPABLE, talk)
                    field = gr.skip()
        for n, one in enumerate(answers):
            if one.text or one.ended is not None:
                turns[n].append(Exchange(question, asked[n].visuals, one.text))
        stopping = gr.update(interactive=bool(talk.running))  # by now another question may be answered
        if talk.turns is not turns:
            yield (*_UNCHANGED[:-2], stopping, talk)
            return
        errors = [one.error for one in answers if one.error]
        yield (*_show(turns, [], answers), gr.skip(), question if errors else gr.skip(), stopping, talk)
        for error in dict.fromkeys(errors):
            tell(error)

    async def choose(self, video: str | None, talk: Talk) -> Updates:
        """Begin a new conversation about a video, if it is another one."""
        if (path := Path(video) if video else None) == talk.video:
            return _UNCHANGED
        talk.begin(path)
        return [], [], "", "", [], gr.skip(), gr.skip(), talk

    async def clear(self, video: str | None, talk: Talk) -> Updates:
        """Begin a new conversation about the same video."""
        talk.begin(Path(video) if video else None)
        return [], [], "", "", [], "", gr.skip(), talk

    async def _answer(
        self, turns: Sequence[Exchange], video: Path | None, choice: Choice, column: int
    ) -> AsyncIterator[Prepared | str | Ended]:
        branch = self.branch and column == 0
        options = self.service.options
        try:
            request = await asyncio.to_thread(
                make_request, options.name, turns, video, choice, branch, options.limits.media
            )
        except ValidationError as error:
            raise bad_request(str(error.errors()[0]["msg"])) from error
        async for piece in answer(self.service, request):
            yield piece


class LiveCallbacks:
    """Callbacks of the live camera."""

    def __init__(self, sessions: LiveSessions, open_talks: OpenTalks) -> None:
        self.sessions, self.open_talks = sessions, open_talks

    async def push(self, frame: Any, talk: LiveTalk | None) -> tuple[str, LiveTalk | None]:
        """Add a frame of the camera; the first one, or the first after a long pause, opens a session."""
        if frame is None:
            return "The camera is off", talk
        try:
            talk = talk or LiveTalk(self.sessions)
            await talk.push(frame)
        except ApiError as error:
            return error.message, None if error.code == "session_not_found" else talk
        return talk.line, talk

    async def ask(self, question: str, talk: LiveTalk | None, request: gr.Request) -> AsyncIterator[Updates]:
        """Answer a question about the last frames. Its outputs are the answer, its line and the button that stops."""
        question = (question or "").strip()
        if refusal := "start the camera first" if talk is None else _refusal(question, talk.running):
            tell(refusal)
            yield gr.skip(), gr.skip(), gr.skip()
            return
        assert talk is not None
        answers: list[ColumnAnswer] = []
        with self.open_talks.noted(request, talk):
            async for answers in answer_columns([partial(talk.ask, question)], talk.running):
                yield answers[0].text, answers[0].line, _STOPPABLE
        yield gr.skip(), gr.skip(), gr.update(interactive=bool(talk.running))
        if answers and answers[0].error:
            tell(answers[0].error)


async def stop(talk: Talk | LiveTalk | None) -> None:
    """Stop the answers in progress; what was generated stays. A coroutine, so that it runs in the tasks' event loop."""
    if talk is not None:
        talk.stop()


def tell(message: str) -> None:
    """Show a message over the page."""
    gr.Warning(message, title="Not answered")


def _refusal(question: str, running: Sequence[Any]) -> str | None:
    """Say why a question is not asked; None: it is."""
    if running:
        return "an answer is still running: wait for it, or stop it"
    if not question:
        return "type a question first"
    if len(question) > LONGEST_QUESTION:
        return f"the question has more than {LONGEST_QUESTION} characters"
    return None


def _messages(turns: Sequence[Exchange]) -> list[dict[str, str]]:
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        if turn.answer:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


def _show(turns: dict[int, list[Exchange]], asked: Sequence[Exchange], answers: Sequence[ColumnAnswer]) -> Updates:
    """Return the content of the columns and their lines. asked: the questions being answered; empty: none is."""
    chats: list[Any] = [gr.skip(), gr.skip()]
    lines: list[Any] = [gr.skip(), ""]
    for n, one in enumerate(answers):
        new = [Exchange(asked[n].question, (), one.text)] if asked else []
        chats[n] = _messages([*turns[n], *new])
        lines[n] = one.line
    return (*chats, *lines)


def _frames(talk: Talk, choice: Choice, prepared: Prepared | None) -> Any:
    """Return the gallery's new content: the frames of the video with their numbers; or that it stays."""
    if prepared is None or talk.shown == choice:
        return gr.skip()
    talk.shown = choice
    return [
        (Image.open(io.BytesIO(picture)), f"{number + 1} of {seen.visual.total}")
        for seen, _ in prepared.seen
        for picture, number in zip(seen.pictures, seen.numbers, strict=True)
    ]

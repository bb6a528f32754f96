"""A conversation on the page: one video, stills beside it, and the turns with and without the branch."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt_adapter.serve.errors import bad_request
from bt_adapter.serve.requests import ChatRequest


@dataclass(frozen=True)
class Exchange:
    """A question, the video and stills that came with it, and its answer."""

    question: str
    visuals: tuple[Path, ...]
    answer: str


class Answers:
    """The answers in progress on one browser's page. running: their tasks."""

    def __init__(self) -> None:
        self.running: list[asyncio.Task[None]] = []

    def stop(self) -> None:
        """Stop the answers in progress."""
        for task in self.running:
            task.cancel()


class Talk(Answers):
    """The state of one browser's page.

    video: the clip that the conversation is about. turns: by column; a column lacks the turns of the time when it was
    not shown. shown: the choice of frames in the gallery.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begin(None)

    def begin(self, video: Path | None) -> None:
        """Begin a new conversation about a video; None: about stills, or nothing yet."""
        self.stop()
        self.video = video
        self.turns: dict[int, list[Exchange]] = {0: [], 1: []}
        self.shown: Choice | None = None

    def new_visuals(self, column: int, stills: Sequence[Path]) -> tuple[Path, ...]:
        """Return the video and stills that a column's conversation has not seen yet."""
        seen = {path for turn in self.turns[column] for path in turn.visuals}
        given = ([] if self.video is None else [self.video]) + list(stills)
        return tuple(path for path in dict.fromkeys(given) if path not in seen)


@dataclass(frozen=True)
class Choice:
    """The frames of a question: ``frames`` of them, or with ``fps`` at most so many."""

    frames: int
    fps: float | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a request."""
        return {"num_frames": self.frames} if self.fps is None else {"fps": self.fps, "max_frames": self.frames}


def make_request(
    model: str, turns: Sequence[Exchange], video: Path | None, choice: Choice, branch: bool, most_bytes: int
) -> ChatRequest:
    """Make the request of the API for a conversation whose last turn has no answer yet.

    video: which of the visuals is the video. branch: see ``ChatRequest``. most_bytes: limit of one file.
    Raises ApiError for a file that is too large or gone; ValueError for fields that the API refuses.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns:
        parts = [_part(path, path == video, most_bytes) for path in turn.visuals]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    fields = choice.fields if video is not None else {}
    return ChatRequest(model=model, messages=messages[:-1], branch=branch, **fields)  # type: ignore[arg-type]


def read_file(path: Path, most: int) -> bytes:
    """Read an uploaded file of at most so many bytes. Raises ApiError if it is gone, empty or larger."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise bad_request("an uploaded file is gone: upload it again") from error
    if not content:
        raise bad_request("a file is empty, or nothing was recorded")
    if len(content) > most:
        raise bad_request(f"a file holds more than the limit of {most:,} bytes")
    return content


def _part(path: Path, is_video: bool, most: int) -> dict[str, Any]:
    """Return the part of a message that holds a file; the server finds its format by the content."""
    kind = "video" if is_video else "image"
    url = f"data:application/octet-stream;base64,{base64.b64encode(read_file(path, most)).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}

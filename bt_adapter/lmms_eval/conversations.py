"""Conversations of lmms-eval's tasks as turns of this package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bt_adapter.chat.prompts import Turn
from bt_adapter.data.finding import is_still


@dataclass(frozen=True)
class Medium:
    """A video or still of a task.

    Attributes:
        kind: "video" or "image".
        source: a file's name, or a PIL image.
        start, end: seconds between which a video's frames are taken; None: its start and end.
    """

    kind: str
    source: Any
    start: float | None = None
    end: float | None = None

    @property
    def key(self) -> tuple[Any, ...] | None:
        """Identity of a file's medium, by which its tokens are reused; None for a picture in memory."""
        return (self.kind, self.source, self.start, self.end) if isinstance(self.source, str) else None


@dataclass(frozen=True)
class Asked:
    """A conversation whose last turn waits for an answer, and its media in the order of their places."""

    turns: tuple[Turn, ...]
    media: tuple[Medium, ...]


def read_messages(messages: Sequence[Mapping[str, Any]]) -> Asked:
    """Convert chat messages, ``{"role", "content": [{"type": "text" | "image" | "video", ...}]}``.

    Raises:
        ValueError: a system message, a part of another type, or messages that do not alternate between user and
            assistant, from a user's to a user's.
    """
    turns: list[Turn] = []
    media: list[Medium] = []
    wanted = "user"
    for number, message in enumerate(messages):
        if message["role"] != wanted:
            raise ValueError(f"message {number} has the role {message['role']}, expected {wanted}")
        parts = message["content"]
        if wanted == "assistant":
            turns[-1] = Turn(turns[-1].question, turns[-1].kinds, "".join(_text(part) for part in parts))
        else:
            found = [_medium(part) for part in parts if part["type"] != "text"]
            # the places of visuals in a question are written as <video> and <image>
            question = "".join(f"<{part['type']}>" if part["type"] != "text" else _text(part) for part in parts)
            turns.append(Turn(question, tuple(one.kind for one in found)))
            media += found
        wanted = "assistant" if wanted == "user" else "user"
    if wanted == "user":
        raise ValueError(f"the last of {len(messages)} messages must be a user's")
    return Asked(tuple(turns), tuple(media))


def read_context(context: str, visuals: Iterable[Any]) -> Asked:
    """Convert a text and its visuals: files' names or PIL images, or lists of them.

    Without a place (``<video>``, ``<image>``) in the text, the visuals come first.

    Raises:
        TypeError: a visual of another type.
    """
    media = tuple(_visual(one) for one in _flat(visuals))
    return Asked((Turn(context, tuple(one.kind for one in media)),), media)


def _flat(visuals: Any) -> Iterable[Any]:
    if isinstance(visuals, (list, tuple)):
        for one in visuals:
            yield from _flat(one)
    elif visuals is not None:
        yield visuals


def _visual(one: Any) -> Medium:
    if isinstance(one, (str, os.PathLike)):
        name = os.fspath(one)
        return Medium("image" if is_still(name) else "video", name)
    if not hasattr(one, "convert"):
        raise TypeError(f"a visual must be a file's name or a PIL image, but is {type(one).__name__}")
    return Medium("image", one)


def _medium(part: Mapping[str, Any]) -> Medium:
    if part["type"] not in ("image", "video"):
        raise ValueError(f"a part of a message must be text, an image or a video, but is {part['type']}")
    source = part["url"]
    return Medium(
        part["type"],
        os.fspath(source) if isinstance(source, os.PathLike) else source,
        part.get("start_time"),
        part.get("end_time"),
    )


def _text(part: Mapping[str, Any]) -> str:
    if part["type"] != "text":
        raise ValueError(f"an assistant's message must be text, but has a part of type {part['type']}")
    return str(part["text"])

"""Options of the command ``live``; needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction, arg

from bt_adapter.chat.settings import AnswerOptions, ChatModel, ModelOptions
from bt_adapter.errors import CommandError
from bt_adapter.training.settings import COUNT, POSITIVE, check_numbers

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|min|h|)")
_UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The live source."""

    help_group: ClassVar[str] = "source"

    format: str | None = None
    """FFmpeg's name of the device or of the stream's format, such as v4l2, avfoundation, dshow or mpegts. Default:
    detected; a device needs it."""
    source_option: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME=VALUE")] = ()
    """Option of FFmpeg for the source, such as video_size=640x480 or rtsp_transport=udp; may be given several times."""
    pace: bool = False
    """Take frames at the times of their time stamps, as those of files and HLS always are: for a recording that comes
    faster than it plays."""
    open_timeout: float = 10.0
    """Longest time to connect, in seconds."""
    read_timeout: float = 10.0
    """Longest time between frames, in seconds; then the source is opened again."""
    give_up: float = 60.0
    """Longest outage, in seconds, after which the command ends with an error."""


@dataclass(frozen=True, kw_only=True)
class LiveFrames:
    """Frames of the stream that an answer is about."""

    help_group: ClassVar[str] = "frames"

    window: Literal["sliding", "whole"] = "sliding"
    """Part of the stream that an answer is about: sliding: the last --frames frames; whole: all so far."""
    frames: int | None = None
    """Frames of a sliding window; of a whole one, half the number of blocks of neighbouring frames that are kept.
    Default: as many as the branch was trained with time steps."""
    fps: float = 4.0
    """Frames taken per second of the stream."""
    long: Literal["average", "interpolate", "published"] | None = None
    """In windows of more frames than the branch was trained with: average neighbouring frames down to its time steps,
    interpolate the trained rows of its time table, or read all its rows as stored, trained or not (as published).
    Default: as the model was tuned, else average."""


@dataclass(frozen=True, kw_only=True)
class LiveQuestion:
    """The question, and when it is asked."""

    help_group: ClassVar[str] = "question"

    source: Positional[str]
    """URL (http, https, rtsp, udp, rtp, tcp, rtmp, srt), file (at its own pace), or device (with --format)."""
    question: Positional[str]
    """The question."""
    every: str = "2s"
    """Time of the stream between two answers: seconds, or with a unit: 500ms, 2s, 1m. Slower answers are followed by
    the next one at once."""
    answers: int | None = None
    """Answers after which the command ends. Default: it ends with the source."""


@dataclass(frozen=True, kw_only=True)
class LiveChat(AnswerOptions, LiveFrames, SourceOptions, ModelOptions, LiveQuestion):
    """Ask the same question about a live stream again and again: a camera, a network stream, or a file.

    Answers go to stdout, one per line, after the time of the stream; everything else goes to stderr.
    """

    @property
    def period(self) -> float:
        """Seconds between two answers. Raises CommandError if ``every`` is no duration."""
        found = _DURATION.fullmatch(self.every.strip())
        seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
        if not seconds > 0:
            raise CommandError(f"--every must be a time above 0, such as 2s or 500ms, got {self.every}")
        return seconds

    @property
    def options(self) -> dict[str, str]:
        """FFmpeg's options for the source. Raises CommandError if one is not NAME=VALUE."""
        pairs = [text.partition("=") for text in self.source_option]
        for text, (name, sign, _) in zip(self.source_option, pairs, strict=True):
            if not name or not sign:
                raise CommandError(f"--source-option must be NAME=VALUE, got {text}")
        return {name: value for name, _, value in pairs}

    @property
    def chat_model(self) -> ChatModel:
        """The options of the chat model, as the other commands have them."""
        names = {item.name for group in (AnswerOptions, ModelOptions) for item in fields(group)}
        return ChatModel(**{name: getattr(self, name) for name in names}, long=self.long)

    def check(self) -> None:
        """Raise CommandError for what is wrong with the options alone."""
        self.chat_model.check()
        positive = {"fps": POSITIVE, "open_timeout": POSITIVE, "read_timeout": POSITIVE, "give_up": POSITIVE}
        check_numbers(self, positive | {"frames": COUNT, "answers": COUNT})
        if not self.question.strip():
            raise CommandError("the question is empty")
        _ = self.period, self.options

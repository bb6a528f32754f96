"""Video and image files to what the language model is given, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bt_adapter.chat.ahead import DecodedVideo
from bt_adapter.chat.attach import video_tokens
from bt_adapter.chat.conversation import Visual, context, video_room
from bt_adapter.chat.streaming import WINDOW_ROWS, video_tokens_streamed
from bt_adapter.data import VideoError, read_image
from bt_adapter.data.patience import read_patiently
from bt_adapter.data.stream import FrameStream
from bt_adapter.progress import Progress
from bt_adapter.time_steps import Long

if TYPE_CHECKING:
    from bt_adapter.chat.engine import VideoChat

# Frames held at once as they were decoded: 16 of 1080p take 100 MB.
_CHUNK = 16


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are taken, and how many tokens they become.

    frames: so many, evenly spread; fps: so many a second (then frames is not read). repeat: repeat frames of a video
    that has fewer than ``frames``. windows, long: as for `video_tokens_streamed`; windows None: one for each
    2·``max_frames`` frames, and as many sets of tokens as there is room for. branch: False for the mean of the frames'
    tokens. side: pixels of the side that frames will be resized to, as for ``read_video``.
    """

    frames: int = 8
    fps: float | None = None
    repeat: bool = False
    windows: int | None = None
    long: Long = "average"
    branch: bool = True
    side: int | None = None

    def open(self, path: str | Path) -> FrameStream:
        """The frames of a file, checked and ready to be decoded. Raises VideoError, ValueError."""
        frames = None if self.fps is not None else self.frames
        stream = FrameStream(path, frames, self.fps, repeat=True, chunk=_CHUNK, side=self.side)
        if not self.repeat and self.fps is None and stream.total < self.frames:
            raise VideoError(
                f"{stream.path}: {self.frames} frames were asked for, but there are only {stream.total}; ask for fewer "
                f"(--frames {stream.total}), or let frames repeat (--repeat)"
            )
        return stream


@dataclass(frozen=True)
class Watched(Visual):
    """A video or still from a file. frames: taken of total; sets: of tokens; seconds: "decode" and "encode"."""

    frames: int = 1
    total: int = 1
    sets: int = 1
    truncated: bool = False
    decode: float = 0.0
    encode: float = 0.0


@torch.no_grad()
def watch(
    chat: VideoChat,
    video: str | Path | FrameStream | DecodedVideo,
    sampling: Sampling,
    progress: Progress | None = None,
    room: int | None = None,
) -> Watched:
    """Make the tokens of a video file, or of one that is open or decoded already, a chunk of frames at a time.

    ``progress`` is called with frames done and in all. room: tokens it may take where ``windows`` is None, though one
    set at least; None: what the model's context leaves. Raises VideoError; ValueError for values out of range.
    """
    begin = time.perf_counter()
    model = chat.branch
    if sampling.branch and model.branch.is_absent:
        raise ValueError("this chat model has no branch: attach one, or ask for the mean of the frames (branch=False)")
    stream = video if isinstance(video, (FrameStream, DecodedVideo)) else sampling.open(video)
    stream.progress = progress
    if isinstance(stream, FrameStream) and stream.side is None:
        stream.side = chat.images.largest_side
    decode = time.perf_counter() - begin
    seen = 0

    def prepared() -> Iterator[Tensor]:
        nonlocal decode, seen
        chunks = iter(stream)
        while True:
            start = time.perf_counter()
            chunk = next(chunks, None)
            decode += time.perf_counter() - start
            if chunk is None:
                return
            seen += len(chunk)
            yield chunk if isinstance(stream, DecodedVideo) else chat.prepare(chunk)[0]

    length = chat.family.video_length
    if len(chat.family.feature_layers) > 1:
        tokens = _whole(chat, prepared(), stream, sampling)
    else:
        sets = None
        if sampling.windows is None:
            sets = max(1, (video_room(context(chat.model), 0, 0) if room is None else room) // length)
        tokens = video_tokens_streamed(
            model, prepared(), len(stream), sampling.windows, sets, sampling.long, sampling.branch
        )
    visual = chat.visual("video", tokens)
    if tokens.device.type == "cuda":
        torch.cuda.synchronize(tokens.device)
    return Watched(
        "video", visual.tokens, Path(stream.path).name, visual.reads, seen, stream.total, len(tokens),
        stream.truncated, decode, time.perf_counter() - begin - decode,
    )  # fmt: skip


@torch.no_grad()
def look(chat: VideoChat, path: str | Path) -> Watched:
    """A still image's tokens, by the image chat model's own path.

    Raises VideoError where the file cannot be read, StorageError where its storage cannot be reached.
    """
    begin = time.perf_counter()
    image = read_patiently(path, read_image, path)
    decode = time.perf_counter() - begin
    visual, name = chat.see(image), Path(path).name
    return Watched(
        "image", visual.tokens, name, visual.reads, decode=decode, encode=time.perf_counter() - begin - decode
    )


def _whole(chat: VideoChat, pieces: Iterator[Tensor], stream: FrameStream | DecodedVideo, sampling: Sampling) -> Tensor:
    """Tokens ``[1, P+1, …]`` of a model that reads several tower layers: its frames run at once."""
    most = WINDOW_ROWS * chat.branch.config.max_frames
    if len(stream) > most or sampling.windows not in (None, 1):
        raise ValueError(
            f"{stream.path}: this model reads several layers of its tower, so that a video is one window of at most "
            f"{most} frames; {len(stream)} frames in {sampling.windows or 'automatic'} windows were asked for"
        )
    return video_tokens(chat.model, torch.cat(list(pieces))[None], long=sampling.long, branch=sampling.branch)

"""Encode video and image files as visual tokens for the language model, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bt_adapter.chat.ahead import DecodedVideo, PreparedVideo
from bt_adapter.chat.attach import video_tokens
from bt_adapter.chat.conversation import Visual, context, video_room
from bt_adapter.data import VideoError, read_image
from bt_adapter.data.patience import read_patiently
from bt_adapter.data.stream import FrameStream
from bt_adapter.model.time_steps import Long
from bt_adapter.model.video_tokens import WINDOW_ROWS, video_tokens_streamed
from bt_adapter.progress import Progress

if TYPE_CHECKING:
    from bt_adapter.chat.engine import VideoChat

# Decoded frames held in memory at once: 16 frames of 1080p take 100 MB.
_CHUNK = 16


@dataclass(frozen=True)
class Sampling:
    """Settings that choose the frames of a video and the number of its tokens.

    frames: number of evenly spaced frames; fps: frames per second instead (``frames`` is then ignored). repeat: repeat
    frames of a video that has fewer than ``frames``. windows, long: see `video_tokens_streamed`; windows None: one for
    each 2·``max_frames`` frames, and as many sets of tokens as fit. branch: False for the mean of the frames' tokens.
    side: target side of the resize in pixels, see ``read_video``.
    """

    frames: int = 8
    fps: float | None = None
    repeat: bool = False
    windows: int | None = None
    long: Long = "average"
    branch: bool = True
    side: int | None = None

    def open(self, path: str | Path, start: float | None = None, end: float | None = None) -> FrameStream:
        """Open and check a file, so that its frames can be decoded.

        start, end: seconds between which frames are chosen; None: its start and end. Raises VideoError, ValueError.
        """
        frames = None if self.fps is not None else self.frames
        stream = FrameStream(path, frames, self.fps, repeat=True, chunk=_CHUNK, side=self.side, start=start, end=end)
        if not self.repeat and self.fps is None and stream.total < self.frames:
            raise VideoError(
                f"{stream.path}: {self.frames} frames were asked for, but there are only {stream.total}; ask for fewer "
                f"(--frames {stream.total}), or let frames repeat (--repeat)"
            )
        return stream


@dataclass(frozen=True)
class EncodedVisual(Visual):
    """An encoded video or still image. frames: number used of total; sets: of tokens; decode, encode: seconds."""

    frames: int = 1
    total: int = 1
    sets: int = 1
    truncated: bool = False
    decode: float = 0.0
    encode: float = 0.0


@torch.no_grad()
def watch(
    chat: VideoChat,
    video: str | Path | FrameStream | DecodedVideo | PreparedVideo,
    sampling: Sampling,
    progress: Progress | None = None,
    room: int | None = None,
) -> EncodedVisual:
    """Encode a video file, an open stream or decoded frames as tokens, one chunk of frames at a time.

    ``progress`` is called with the frames done and in total. room: maximum number of tokens where ``windows`` is None
    (at least one set); None: what fits into the model's context. Raises VideoError; ValueError for values out of range.
    """
    begin = time.perf_counter()
    model = chat.branch
    stream = video if isinstance(video, (FrameStream, DecodedVideo, PreparedVideo)) else sampling.open(video)
    if not isinstance(stream, PreparedVideo):
        stream.progress = progress
    if isinstance(stream, FrameStream) and stream.side is None:
        stream.side = chat.images.largest_side
    decode = time.perf_counter() - begin
    frames = 0

    def prepared() -> Iterator[Tensor]:
        nonlocal decode, frames
        chunks = iter(stream)
        while True:
            start = time.perf_counter()
            chunk = next(chunks, None)
            decode += time.perf_counter() - start
            if chunk is None:
                return
            frames += len(chunk)
            yield chat.prepare(chunk)[0] if isinstance(stream, FrameStream) else chunk

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
    return EncodedVisual(
        "video", visual.tokens, Path(stream.path).name, visual.reads, frames, stream.total, len(tokens),
        stream.truncated, decode, time.perf_counter() - begin - decode,
    )  # fmt: skip


@torch.no_grad()
def encode_image(chat: VideoChat, path: str | Path) -> EncodedVisual:
    """Encode a still image file with the image chat model's own code.

    Raises VideoError if the file cannot be read, StorageError if its storage cannot be reached.
    """
    begin = time.perf_counter()
    image = read_patiently(path, read_image, path)
    decode = time.perf_counter() - begin
    visual, name = chat.encode_image(image), Path(path).name
    return EncodedVisual(
        "image", visual.tokens, name, visual.reads, decode=decode, encode=time.perf_counter() - begin - decode
    )


def _whole(
    chat: VideoChat,
    pieces: Iterator[Tensor],
    stream: FrameStream | DecodedVideo | PreparedVideo,
    sampling: Sampling,
) -> Tensor:
    """Encode all frames at once, for a model that reads several tower layers: tokens ``[1, P+1, …]``."""
    limit = WINDOW_ROWS * chat.branch.config.max_frames
    if len(stream) > limit or sampling.windows not in (None, 1):
        raise ValueError(
            f"{stream.path}: this model reads several layers of its tower, so that a video is one window of at most "
            f"{limit} frames; {len(stream)} frames in {sampling.windows or 'automatic'} windows were asked for"
        )
    return video_tokens(chat.model, torch.cat(list(pieces))[None], long=sampling.long, branch=sampling.branch)

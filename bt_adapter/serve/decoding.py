"""Decoding of stills and videos from bytes, within limits."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from bt_adapter.chat.ahead import PreparedVideo
from bt_adapter.data import VideoError, read_image
from bt_adapter.data.image_settings import ImageSettings
from bt_adapter.data.stream import FrameStream
from bt_adapter.serve.limits import Limits
from bt_adapter.serve.media import Media, MediaError
from bt_adapter.serve.requests import FrameChoice

_CHUNK = 16  # decoded frames held before they are resized


@dataclass
class DecodingTime:
    """The time limit of one decoding, and a flag that ends it early.

    Call :meth:`check` often while decoding. The time counts from the first call, not while the work waits for its turn.
    """

    seconds: float
    cancelled: threading.Event = field(default_factory=threading.Event)
    _end: float | None = None

    def check(self) -> None:
        """Raise VideoError if the time is over or the request is cancelled."""
        now = time.monotonic()
        self._end = now + self.seconds if self._end is None else self._end
        if self.cancelled.is_set():
            raise VideoError("the request was cancelled")
        if now > self._end:
            raise VideoError(f"decoding takes longer than the limit of {self.seconds:g} seconds")


@dataclass(frozen=True)
class ShownVideo(PreparedVideo):
    """A video's prepared frames, and on request the same frames to be shown. pictures: a JPEG file each."""

    pictures: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class DecodedStill:
    """A still, uint8 ``[3, H, W]``, and the seconds that decoding took."""

    pixels: Tensor
    decode: float


class MediaDecoder:
    """Decodes stills and videos and prepares the frames of videos for the tower.

    prepare: converts frames uint8 ``[t, 3, H, W]``, see ``VideoChat.prepare``. images: its resize and crop.
    """

    def __init__(self, prepare: Callable[[Tensor], Tensor], images: ImageSettings, limits: Limits) -> None:
        self.prepare, self.images, self.limits = prepare, images, limits

    def still(self, media: Media, timer: DecodingTime) -> DecodedStill:
        """Decode a still. Raises VideoError."""
        begin = time.perf_counter()
        pixels = read_image(media.pieces[0], self.limits.pixels, timer.check)
        return DecodedStill(pixels, time.perf_counter() - begin)

    def video(
        self, media: Media, choice: FrameChoice, repeat: bool, timer: DecodingTime, show: bool = False
    ) -> ShownVideo:
        """Decode the chosen frames of a video.

        choice: with ``frames`` or ``fps``. repeat: repeat frames of a video that has fewer than ``frames``.
        show: return the frames as pictures too.

        Raises:
            VideoError: the video cannot be decoded within the limits, or has too few frames.
        """
        timer.check()
        begin = time.perf_counter()
        if media.frames:
            chunks, numbers, total, cut = *self._pictures(media, choice, timer), False
            return ShownVideo(tuple(chunks), numbers, total, cut, time.perf_counter() - begin)
        stream = self._open(media.pieces[0], choice, repeat, timer)
        chunks, pictures = [], []
        for chunk in stream:
            chunks.append(self.prepare(chunk))
            pictures += [_jpeg(frame) for frame in self.images.crop(chunk)] if show else []
            timer.check()
        numbers = tuple(stream.numbers[: sum(map(len, chunks))])
        seconds = time.perf_counter() - begin
        return ShownVideo(tuple(chunks), numbers, stream.total, stream.truncated, seconds, pictures=tuple(pictures))

    def _open(self, content: bytes, choice: FrameChoice, repeat: bool, timer: DecodingTime) -> FrameStream:
        frames = choice.frames
        if frames is not None:
            self._check_frames(frames, "num_frames")
        stream = self._stream(content, frames, choice.fps, timer)
        if choice.most is not None and len(stream) > choice.most:
            self._check_frames(choice.most, "max_frames")
            stream = self._stream(content, choice.most, None, timer)
        self._check_frames(len(stream), f"{choice.fps} frames per second give {len(stream)}; frames, or max_frames,")
        if frames is not None and not repeat and stream.total < frames:
            raise VideoError(f"{frames} frames were asked for, but the video has {stream.total}")
        return stream

    def _stream(self, content: bytes, frames: int | None, fps: float | None, timer: DecodingTime) -> FrameStream:
        most, side = self.limits.pixels, self.images.largest_side
        return FrameStream(content, frames, fps, True, _CHUNK, side, most, threads=1, check=timer.check)

    def _check_frames(self, frames: int, name: str) -> None:
        if frames > self.limits.frames:
            raise MediaError(f"{name} must be at most {self.limits.frames} on this server")

    def _pictures(
        self, media: Media, choice: FrameChoice, timer: DecodingTime
    ) -> tuple[list[Tensor], tuple[int, ...], int]:
        """Decode frames that came as pictures: all, unless the request itself asks for fewer."""
        total = len(media.pieces)
        if choice.fps is not None:
            raise MediaError("fps must not be given with frames that came as pictures, whose times are not known")
        count = min(total if choice.frames is None else choice.frames, choice.most or total)
        self._check_frames(count, "the number of pictures (or num_frames)")
        numbers = tuple(((torch.arange(count) + 0.5) * total / count).long().tolist())
        frames = []
        for number in numbers:
            frames.append(self.prepare(read_image(media.pieces[number], self.limits.pixels, timer.check)[None]))
        return list(torch.cat(frames).split(_CHUNK)), numbers, total


def _jpeg(frame: Tensor) -> bytes:
    """Encode a frame uint8 ``[3, H, W]`` as a picture file to be shown."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()

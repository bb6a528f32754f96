"""The frames of a video that an answer is about, as the model's tower sees them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from PIL import Image

from bt_adapter.data import VideoError
from bt_adapter.page.talk import Choice, read_file
from bt_adapter.serve.decoding import DecodingTime, MediaDecoder
from bt_adapter.serve.errors import ApiError
from bt_adapter.serve.media import Media
from bt_adapter.serve.requests import FrameChoice
from bt_adapter.serve.service import Service


class FrameViewer:
    """Reads the frames that the service chooses, one video at a time."""

    def __init__(self, service: Service) -> None:
        images = service.chat.images
        self.limits, self.repeat = service.options.limits, service.options.sampling.repeat
        self._decoder = MediaDecoder(images.crop, images.largest_side, self.limits)
        self._one = asyncio.Semaphore(1)

    async def read(self, path: Path, choice: Choice) -> list[tuple[Image.Image, str]]:
        """Return the frames with their numbers in the file; none if the video cannot be read."""
        timer = DecodingTime(self.limits.seconds)
        async with self._one:
            try:
                return await asyncio.to_thread(self._read, path, choice, timer)
            except (VideoError, ApiError, ValueError, MemoryError):  # the answer says why
                return []
            except asyncio.CancelledError:
                timer.cancelled.set()
                raise

    def _read(self, path: Path, choice: Choice, timer: DecodingTime) -> list[tuple[Image.Image, str]]:
        wanted = FrameChoice(choice.frames) if choice.fps is None else FrameChoice(None, choice.fps, choice.frames)
        media = Media((read_file(path, self.limits.media),))
        video = self._decoder.video(media, wanted, self.repeat, timer)
        frames = (frame for chunk in video for frame in chunk)
        return [
            (Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()), f"{number + 1} of {video.total}")
            for frame, number in zip(frames, video.numbers, strict=True)
        ]

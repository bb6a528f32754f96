"""Decode the frames of a video that vLLM asks for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from bt_adapter.data.stream import FrameStream
from bt_adapter.data.video import read_video


def decode(
    data: bytes, num_frames: int = -1, fps: float = -1, side: int | None = None, **unknown: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """Decode evenly spread frames of a video file in memory, sampled as everywhere else in this package.

    Args:
        data: the file.
        num_frames: most frames; a shorter video is repeated if ``fps`` is not given. -1: all.
        fps: frames per second; of a video with more than ``num_frames`` of them, ``num_frames`` are taken. -1: not
            limited.
        side: largest side in pixels that is needed; much larger frames are scaled down while they are decoded.

    Returns:
        Frames uint8 ``[T, H, W, 3]``, and the description that vLLM keeps of a video.

    Raises:
        ValueError: another option, or a wrong value. VideoError: the video cannot be read.
    """
    if unknown:
        raise ValueError(
            f"media_io_kwargs of videos take num_frames, fps and side with this decoder, but have "
            f"{', '.join(sorted(unknown))}; video_backend names another decoder"
        )
    if not _is_whole(num_frames) or num_frames < 1 and num_frames != -1:
        raise ValueError(f"num_frames must be a positive int, or -1 for all frames, but is {num_frames!r}")
    if not isinstance(fps, (int, float)) or isinstance(fps, bool) or not math.isfinite(fps) or fps <= 0 and fps != -1:
        raise ValueError(f"fps must be a number above 0, or -1 for no limit, but is {fps!r}")
    if side is not None and (not _is_whole(side) or side < 1):
        raise ValueError(f"side must be a positive int, but is {side!r}")
    if fps != -1:
        stream = FrameStream(data, fps=fps, side=side)
        if num_frames == -1 or len(stream) <= num_frames:
            chunks = list(stream)
            described = _describe(stream.total, stream.fps, stream.duration, list(stream.numbers))
            return np.concatenate([_channels_last(chunk) for chunk in chunks]), described
    video = read_video(data, None if num_frames == -1 else num_frames, repeat=True, side=side)
    return _channels_last(video.frames), _describe(video.total, video.fps, video.duration, video.indices.tolist())


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _channels_last(frames: Tensor) -> np.ndarray:
    return np.ascontiguousarray(frames.permute(0, 2, 3, 1).numpy())


def _describe(total: int, fps: float, duration: float, indices: list[int]) -> dict[str, Any]:
    return {
        "total_num_frames": total, "fps": fps, "duration": duration, "video_backend": "bt_adapter",
        "frames_indices": indices, "do_sample_frames": False,
    }  # fmt: skip

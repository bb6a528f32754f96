"""Picture files to pixels, with PyAV."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError

from ._decode import VideoError
from .orientation import upright

_FORMATS = "png_pipe,jpeg_pipe,mjpeg,image2,webp_pipe,bmp_pipe,gif"


def read_image(path: str | os.PathLike[str]) -> torch.Tensor:
    """A PNG, JPEG, WebP, BMP or GIF file (its first picture) as uint8 ``[3, H, W]``, RGB, upright.

    Raises VideoError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"{path}: {'is a directory, not an image' if path.is_dir() else 'no such file'}")
    try:
        options = {"format_whitelist": _FORMATS}
        with av.open(str(path.absolute()), "r", options=options, metadata_errors="replace") as container:
            frame = next(container.decode(video=0), None)
    except (FFmpegError, OSError, ValueError, IndexError) as error:
        raise VideoError(f"{path}: cannot be read as an image ({error})") from error
    if frame is None:
        raise VideoError(f"{path}: holds no image")
    rgb = upright(frame.to_ndarray(format="rgb24"), frame)
    return torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)

"""Resizes, crops and normalises uint8 frames for a CLIP tower."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from bt_adapter.data.devices import to_device

# Per-channel mean and standard deviation of CLIP's training images, RGB in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Off the CPU, frames are resized in float32 this many at a time, to avoid a float copy of a long clip.
_CHUNK = 16
# The long side counts up to this many times the short one. Without a limit, the resize of a picture of 1 x 65,535
# pixels, a file of some hundred bytes, takes gigabytes, although the centre crop shows one of these pixels.
_LONGEST = 16


def preprocess(
    frames: torch.Tensor,
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Apply CLIP's evaluation transform to the frames of a clip.

    The short side is resized to `size` (the long one to `int(size · long / short)`), bicubic with
    antialiasing; the centre `size × size` is cropped; then `(x / 255 - mean) / std`. Resized values are
    rounded to integers in 0..255 as in image libraries, at most one level from Pillow's bicubic.

    Args:
        frames: uint8 `[T, 3, H, W]`, RGB, any memory format (fastest on the CPU: channels last, as
            `read_video` gives).
        size: side of the result in pixels.
        mean, std: per channel, on the scale [0, 1].
        dtype: floating-point dtype of the result; arithmetic is float32.

    Returns:
        `[T, 3, size, size]` on the device of `frames`.

    Raises:
        TypeError: `frames` is not a uint8 tensor, `dtype` not floating-point, or `size` not an int.
        ValueError: wrong rank or channel count, an empty side, `size` below 1, or wrong `mean` or `std`.
    """
    return normalise(resize_and_crop(frames, size), mean, std, dtype)


def resize_and_crop(
    frames: torch.Tensor, size: int, resize: int | tuple[int, int] | None = None, resample: str = "bicubic"
) -> torch.Tensor:
    """Resize and crop as `preprocess` does, without normalising: uint8 `[T, 3, H, W]` to `[T, 3, size, size]`.

    Args:
        resize: pixels of the short side before the centre crop, at least `size` (None: `size`), or (height, width),
            which stretches.
        resample: "bicubic", "bilinear" or "nearest-exact".
    """
    check_frames(frames)
    _check_size(size)
    if resize is None or isinstance(resize, int):
        frames = _cut_elongated(frames)
    height, width = frames.shape[-2:]
    short = size if resize is None else resize
    if not isinstance(short, int):
        target = short
    elif height <= width:
        target = (short, max(short, int(short * width / height)))
    else:
        target = (max(short, int(short * height / width)), short)
    frames = _resize(frames, target, resample)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return frames[:, :, top : top + size, left : left + size]


def _cut_elongated(frames: torch.Tensor) -> torch.Tensor:
    """Cut a very long side to its centre, of which a centre crop shows a small part.

    An even number of pixels goes, so that the centre stays where it is.
    """
    height, width = frames.shape[-2:]
    longest = _LONGEST * min(height, width)
    top, left = (max(0, side - longest) // 2 for side in (height, width))
    return frames[:, :, top : height - top, left : width - left]


class TrainTransform:
    """Training transform of a clip: one random resized crop for all its frames, then CLIP's normalisation.

    The crop covers a share of the frame's area drawn from `scale` at an aspect ratio (width : height) drawn
    log-uniformly from `ratio`, and is resized to `size × size`, bicubic with antialiasing. The defaults are
    those of the published pretraining recipe, which never flips: captions such as "moves left" would be wrong.

    Args:
        size: side of the result in pixels.
        scale: smallest and largest share of the area, in (0, 1].
        ratio: smallest and largest aspect ratio, above 0.
        flip: probability of a horizontal flip of the whole clip.
        mean, std, dtype: as for `preprocess`.
        resample: "bicubic", "bilinear" or "nearest-exact".

    Raises:
        TypeError, ValueError: as `preprocess`, or values outside the ranges above.
    """

    def __init__(
        self,
        size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.0,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        dtype: torch.dtype = torch.float32,
        resample: str = "bicubic",
    ) -> None:
        _check_size(size)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be ascending within (0, 1], got {scale}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be ascending and above 0, got {ratio}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability, got {flip}")
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip
        self.mean, self.std, self.dtype, self.resample = mean, std, dtype, resample

    def box(self, height: int, width: int, generator: torch.Generator | None = None) -> tuple[int, int, int, int]:
        """Draw a crop `(top, left, height, width)` in pixels inside a frame of `height × width`."""
        for _ in range(10):
            share = self._uniform(*self.scale, generator)
            aspect = math.exp(self._uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), generator))
            h = round(math.sqrt(share * height * width / aspect))
            w = round(math.sqrt(share * height * width * aspect))
            if 1 <= h <= height and 1 <= w <= width:
                top = round(self._uniform(0, height - h, generator))
                left = round(self._uniform(0, width - w, generator))
                return top, left, h, w
        # No draw fitted (a very elongated frame): take the largest centre crop of an allowed aspect ratio.
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        h, w = min(height, max(1, round(width / aspect))), min(width, max(1, round(height * aspect)))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, frames: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Transform uint8 `[T, 3, H, W]` to `[T, 3, size, size]`; draw from `generator`, or torch's global one."""
        return normalise(self.crop(frames, generator), self.mean, self.std, self.dtype)

    def crop(self, frames: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Transform without normalising; the result stays uint8, a fourth of the bytes to copy to a device."""
        check_frames(frames)
        top, left, h, w = self.box(frames.shape[-2], frames.shape[-1], generator)
        frames = _resize(frames[:, :, top : top + h, left : left + w], (self.size, self.size), self.resample)
        if self._uniform(0, 1, generator) < self.flip:
            frames = frames.flip(-1)
        return frames

    @staticmethod
    def _uniform(low: float, high: float, generator: torch.Generator | None) -> float:
        device = generator.device if generator is not None else "cpu"
        return low + (high - low) * float(torch.rand((), generator=generator, device=device))


def normalise(
    frames: torch.Tensor,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return `(frames / 255 - mean) / std` of uint8 frames `[T, 3, H, W]`, contiguous. Raises as `preprocess`."""
    check_frames(frames)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must hold 3 values, std above 0; got mean={mean}, std={std}")
    levels = torch.tensor([tuple(mean), tuple(std)], dtype=torch.float32)[:, :, None, None] * 255
    shift, scale = to_device(levels, frames.device)
    centred = frames.contiguous() - shift  # float32
    return torch.div(centred, scale, out=centred if dtype == torch.float32 else torch.empty_like(centred, dtype=dtype))


def _resize(frames: torch.Tensor, target: tuple[int, int], resample: str = "bicubic") -> torch.Tensor:
    if tuple(frames.shape[-2:]) == target:
        return frames
    if resample == "nearest-exact":
        return F.interpolate(frames, size=target, mode=resample)
    if frames.device.type == "cpu" and target != (1, 1):  # torch 2.13's uint8 kernel fails for one pixel
        # On the CPU torch resizes uint8 in fixed point like Pillow, an order of magnitude faster than float32.
        return F.interpolate(frames, size=target, mode=resample, antialias=True, align_corners=False)
    return torch.cat([_resize_float(chunk, target, resample) for chunk in frames.split(_CHUNK)])


def _resize_float(frames: torch.Tensor, target: tuple[int, int], resample: str = "bicubic") -> torch.Tensor:
    # Width first, then height, rounded and clamped after each, as in Pillow: without the intermediate clamp,
    # bicubic overshoot at hard edges differs by up to tens of levels.
    for size in ((frames.shape[-2], target[1]), target):
        resized = F.interpolate(frames.float(), size=size, mode=resample, antialias=True, align_corners=False)
        frames = resized.round_().clamp_(0, 255).to(torch.uint8)
    return frames


def check_frames(frames: torch.Tensor) -> None:
    """Raise unless `frames` is a non-empty uint8 tensor `[T, 3, H, W]`."""
    if not isinstance(frames, torch.Tensor):
        raise TypeError(f"frames must be a torch.Tensor, got {type(frames).__name__}")
    if frames.ndim != 4:
        raise ValueError(f"frames must have rank 4, [T, 3, H, W], got rank {frames.ndim}: {list(frames.shape)}")
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8 with values 0..255, got {frames.dtype}")
    if frames.shape[1] != 3:
        hint = "; permute the channels to dimension 1" if frames.shape[-1] == 3 else ""
        raise ValueError(f"frames must have 3 channels, [T, 3, H, W], got {list(frames.shape)}{hint}")
    if 0 in frames.shape:
        raise ValueError(f"frames must not be empty, got {list(frames.shape)}")


def _check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size must be an int, got {type(size).__name__} ({size!r})")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")

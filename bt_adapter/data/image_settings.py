"""Read the image preprocessing (resize, crop, normalisation) of an image model's own image processor."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bt_adapter.data.transforms import CLIP_MEAN, CLIP_STD, normalise, resize_and_crop
from bt_adapter.errors import CheckpointError

# Numbers of PIL, under which image processors store the interpolation.
_RESAMPLING = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
_FILE = "preprocessor_config.json (or processor_config.json)"


@dataclass(frozen=True)
class ImageSettings:
    """The preprocessing of frames, as in a CLIP's ``preprocessor_config.json``.

    Attributes:
        size: S, height and width of the result in pixels, equal to the tower's.
        resize: target of the resize before the centre crop of S x S: the short side in pixels, or (height, width),
            which may change the aspect ratio. None: the short side becomes S.
        resample: interpolation: "bicubic", "bilinear" or "nearest-exact".
        mean, std: per channel, for pixels on the scale [0, 1].
    """

    size: int
    resize: int | tuple[int, int] | None = None
    resample: str = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @property
    def largest_side(self) -> int:
        """The largest side in pixels that frames are resized or cropped to."""
        resize = self.resize if self.resize is not None else self.size
        return max(self.size, resize) if isinstance(resize, int) else max(self.size, *resize)

    def crop(self, frames: Tensor) -> Tensor:
        """Resize and crop uint8 ``[T, 3, H, W]`` to uint8 ``[T, 3, S, S]``, without normalisation."""
        return resize_and_crop(frames, self.size, self.resize, self.resample)

    def normalise(self, frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalise uint8 ``[T, 3, H, W]`` to ``(frames / 255 - mean) / std`` in ``dtype``."""
        return normalise(frames, self.mean, self.std, dtype)

    def prepare(self, frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Resize, crop and normalise uint8 ``[T, 3, H, W]`` to the tower's input, ``[T, 3, S, S]``."""
        return self.normalise(self.crop(frames), dtype)

    def at(self, size: int) -> ImageSettings:
        """Return these settings for a tower of another image size."""
        return self if size == self.size else replace(self, size=size, resize=None)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @staticmethod
    def of_dict(values: Mapping[str, Any]) -> ImageSettings:
        """Convert the result of :meth:`to_dict`, also after JSON, back to settings."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, (list, tuple))}
        return ImageSettings(**{**values, **lists})


def read_image_settings(name: str | os.PathLike[str], size: int, local: bool = False) -> ImageSettings:
    """Read the settings from the folder or hub repository of a CLIP whose tower takes ``size`` pixels.

    Without a settings file, CLIP's own are returned: bicubic, CLIP's mean and standard deviation.

    Args:
        local: use only local folders and the download cache.

    Raises:
        CheckpointError: a setting in the file is not supported, or its pictures do not fit the tower.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    name = os.fspath(name)
    if name == "mini":
        return ImageSettings(size)
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=local)
    except OSError as error:
        files = ("preprocessor_config.json", "processor_config.json")
        if any((Path(name) / file).exists() for file in files):
            raise CheckpointError(f"{name}: its {_FILE} cannot be read: {error}") from error
        if not local and not Path(name).is_dir():
            warnings.warn(f"{name} has no {_FILE} that can be read: CLIP's own normalisation is used", stacklevel=2)
        return ImageSettings(size)
    return _of_processor(name, values, size)


def read_crop_size(name: str | os.PathLike[str], local: bool = False) -> int | None:
    """Read the output height and width of the image processor of a folder or hub name; None: not known.

    It is needed for models that accept any image size and whose configuration does not name the usual one.

    Args:
        local: use only local folders and the download cache.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(os.fspath(name), local_files_only=local)
    except OSError:
        return None
    sizes = _crop(values) if values.get("do_center_crop", values.get("crop_size") is not None) else None
    if sizes is None:
        target = values.get("size")
        sizes = (target.get("height"), target.get("width")) if isinstance(target, Mapping) else (target, target)
    return sizes[0] if sizes[0] == sizes[1] and isinstance(sizes[0], int) else None


def settings_of_processor(processor: Any, size: int) -> ImageSettings:
    """Read the settings of a loaded image processor of transformers, for a tower that takes ``size`` pixels.

    Raises CheckpointError, see :func:`read_image_settings`.
    """
    return _of_processor(type(processor).__name__, processor.to_dict(), size)


def _of_processor(name: str, values: Mapping[str, Any], size: int) -> ImageSettings:
    resize = _resize(name, values, size)
    resample = values.get("resample", 3)
    if resize is not None and resample not in _RESAMPLING:
        raise CheckpointError(
            f"{name}: resample is {resample!r}, expected one of {sorted(_RESAMPLING)}, as PIL numbers them"
        )
    mean, std = _normalisation(name, values)
    return ImageSettings(size, None if resize == size else resize, _RESAMPLING.get(resample, "bicubic"), mean, std)


def _normalisation(name: str, values: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Convert mean and standard deviation from the file's scale to that of pixels in [0, 1]."""
    mean, std = [0.0] * 3, [1.0] * 3
    if values.get("do_normalize", True):
        given = [values.get("image_mean"), values.get("image_std")]
        mean, std = (_channels(v, clip) for v, clip in zip(given, (CLIP_MEAN, CLIP_STD), strict=True))
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0:
            raise CheckpointError(
                f"{name}: image_mean and image_std must be 3 numbers each, or one for all channels, and image_std "
                f"above 0, got {given[0]} and {given[1]}"
            )
    factor = values.get("rescale_factor") or 1 / 255
    scale = 1.0 if not values.get("do_rescale", True) else factor
    if abs(scale * 255 - 1) < 1e-6:
        return tuple(map(float, mean)), tuple(map(float, std))
    return tuple(value / (255 * scale) for value in mean), tuple(value / (255 * scale) for value in std)


def _crop(values: Mapping[str, Any]) -> Any:
    """Return (height, width) of ``crop_size``, or None."""
    crop: Any = values.get("crop_size")
    if isinstance(crop, Mapping):
        crop = (crop.get("height") or crop.get("shortest_edge"), crop.get("width") or crop.get("shortest_edge"))
    return (crop, crop) if isinstance(crop, int) else crop


def _channels(value: Any, default: Sequence[float]) -> list[float]:
    """Return one number per channel; a single number is repeated. An invalid value gives an empty list."""
    value = default if value is None else value
    listed = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    fitting = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in listed)
    return listed if fitting else []


def _resize(name: str, values: Mapping[str, Any], size: int) -> int | tuple[int, int] | None:
    """Return the target of the resize from which a crop, if any, gives the tower's size."""
    target: Any = values.get("size")
    if isinstance(target, Mapping):
        target = target.get("shortest_edge") or (target.get("height"), target.get("width"))
        if target == (None, None):
            wanted = "shortest_edge, or height and width"
            raise CheckpointError(f"{name}: size is {dict(values['size'])}, expected {wanted}")
    crop = _crop(values)
    cropped = bool(values.get("do_center_crop", crop is not None)) and crop is not None
    if not values.get("do_resize", True):
        raise CheckpointError(f"{name}: do_resize is false, but frames of any size must be brought to {size} pixels")
    if target is None or isinstance(target, (tuple, list)) and None in target:
        target = size
    if cropped and tuple(crop) != (size, size):
        raise CheckpointError(f"{name}: crop_size is {list(crop)}, but the tower takes {size} x {size} pixels")
    if isinstance(target, (tuple, list)):
        target = (int(target[0]), int(target[1]))
        if target == (size, size) or cropped and min(target) >= size:
            return target
        raise CheckpointError(f"{name}: size is {list(target)}, but the tower takes {size} x {size} pixels")
    if target < size or target > size and not cropped:
        raise CheckpointError(f"{name}: size is {target}, but the tower takes {size} x {size} pixels")
    return int(target)

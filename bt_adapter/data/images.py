"""Reads picture files with Pillow."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from bt_adapter.data._source import VideoError
from bt_adapter.data.patience import is_mistake
from bt_adapter.data.sampling import check_count

# Pillow's name of each format and its usual name. Other formats are not tried: some readers run external programs.
FORMATS = {
    "JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "BMP": "BMP", "DIB": "BMP", "TIFF": "TIFF",
    "JPEG2000": "JPEG 2000", "AVIF": "AVIF", "PPM": "PPM",
}  # fmt: skip
# Suffixes of these formats. An animation in one of them also counts as a video; GIF is a video by its suffix.
STILL_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".jp2", ".j2k", ".avif",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
_ANIMATED = ("PNG", "WEBP", "AVIF")  # formats of STILL_SUFFIXES that may hold an animation
_ORIENTATION_TAG = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BITS = 65535
_BLOCK = 4096  # bytes between two checks of a picture that is decoded piece by piece: a progressive JPEG repeats itself


class _Checked(io.BytesIO):
    """Bytes of a picture; a function is called before each read."""

    def __init__(self, content: bytes, check: Callable[[], object]) -> None:
        super().__init__(content)
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as a binary file."""
        self._check()
        return super().read(size)


def read_image(
    path: str | os.PathLike[str] | bytes, max_pixels: int | None = None, check: Callable[[], object] | None = None
) -> torch.Tensor:
    """Read a picture file, or its bytes, as uint8 ``[3, H, W]``, RGB, rotated upright by its EXIF orientation.

    JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF and PPM are detected by content, not by name. An animation or a
    file of several pages gives its first picture. Gray, palettes and CMYK become RGB, and 16 bits per colour become 8;
    transparency is dropped, as in CLIP's own preprocessing, and colour profiles are not applied.

    max_pixels: limit on the picture's pixels, checked against its header before any memory is allocated for them; None:
    Pillow's own limit. Pillow's settings apply: ``PIL.Image.MAX_IMAGE_PIXELS`` (twice as many pixels are an error) and
    ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` (if it is unset, a truncated file is an error).
    check: called often while bytes are read and decoded, to end it by raising VideoError; with bytes only.

    Raises:
        ValueError: ``max_pixels`` is below 1. TypeError: ``check`` is given with a file's name.
        VideoError: the file is missing, no regular file, of another format, truncated, damaged or too large; the
            message names it.
    """
    if max_pixels is not None:
        check_count("max_pixels", max_pixels)
    if check is not None and not isinstance(path, bytes):
        raise TypeError(f"check is called for bytes only, but path is {path!r}")
    name = "<bytes>" if isinstance(path, bytes) else os.fspath(path)
    try:
        with _opened(path, check) as file:
            pixels = _pixels(file, name, max_pixels)
    except VideoError:
        raise
    except FileNotFoundError as error:
        raise VideoError(f"{name}: no such file") from error
    except UnidentifiedImageError as error:
        known = ", ".join(dict.fromkeys(FORMATS.values()))
        raise VideoError(
            f"{name}: cannot be read as an image: its format is none of {known}, or its beginning is damaged"
        ) from error
    except Image.DecompressionBombError as error:
        raise VideoError(f"{name}: has too many pixels; PIL.Image.MAX_IMAGE_PIXELS sets the limit ({error})") from error
    except MemoryError as error:
        raise VideoError(f"{name}: not enough memory to read it") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        if is_mistake(error):
            raise
        words = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"{name}: cannot be read as an image ({words})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def is_animation(path: str | os.PathLike[str]) -> bool:
    """Tell whether a picture file is an animation (PNG, WebP or AVIF of several frames); False if it is unreadable.

    Only the file's header is read.
    """
    try:
        Image.init()
        with Image.open(path, formats=_ANIMATED) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception as error:  # reading the picture itself will report the error
        if is_mistake(error):
            raise
        return False


def _opened(path: str | os.PathLike[str] | bytes, check: Callable[[], object] | None) -> BinaryIO:
    """Open a picture. Raises VideoError for a name that is no regular file, OSError if it cannot be opened."""
    if isinstance(path, bytes):
        return io.BytesIO(path) if check is None else _Checked(path, check)
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        found = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise VideoError(f"{os.fspath(path)}: is {found}, not a picture")
    return open(path, "rb")


def _pixels(file: BinaryIO, name: str, max_pixels: int | None) -> np.ndarray:
    """Decode a picture to a new array, uint8 ``[H, W, 3]``. Raises VideoError if it has too many pixels."""
    Image.init()  # registers the less common formats too
    with Image.open(file, formats=tuple(FORMATS)) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise VideoError(
                f"{name}: its {image.width} x {image.height} pixels are more than the limit of {max_pixels:,}"
            )
        if isinstance(file, _Checked):
            image.decodermaxblock = _BLOCK
        image.load()
        try:
            turn = _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
        except Exception:  # damaged EXIF is ignored; the picture itself is intact
            turn = None
        picture = _eight_bits(image)
        if picture.mode == "P":
            picture = picture.convert("RGBA")  # conversion straight to RGB warns about transparent palettes
        picture = picture.convert("RGB")
        return np.array(picture if turn is None else picture.transpose(turn))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert a 16-bit gray picture to 8 bits; return 8-bit ones unchanged. Raises ValueError for other depths."""
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not is_16_bit and image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers; only 8 or 16 bits per colour are supported")
    if not is_16_bit:
        return image
    gray = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((gray * 255 + _SIXTEEN_BITS // 2) // _SIXTEEN_BITS).astype(np.uint8))

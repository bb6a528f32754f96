"""The bytes behind the address of a still or video: data URLs, and files below an allowed folder."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bt_adapter.data import VideoError

# "data:[type][;parameter…];base64,": a header longer than this is none of a still or video. A parameter may hold
# commas, as in the "video/webm;codecs=vp9,opus" of what browsers record.
_DATA = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;]{0,200})*;base64,", re.ASCII | re.IGNORECASE)
_LONGEST_HEADER = 500


@dataclass(frozen=True)
class Media:
    """The content of a still, of a video file, or of a video's frames as pictures.

    pieces: one file, or one picture per frame. frames: whether they are pictures of a video's frames.
    """

    pieces: tuple[bytes, ...]
    frames: bool = False


class MediaError(VideoError):
    """The content of an address cannot be had; the message is fit for the client."""


def read_data_url(url: str, most: int) -> Media:
    """Decode a data URL in base64; of the type ``video/jpeg`` it holds pictures, separated by commas.

    most: limit on the decoded bytes. Raises MediaError.
    """
    header = _DATA.match(url[:_LONGEST_HEADER])
    if header is None:
        raise MediaError("a data URL must begin with data:TYPE;base64,")
    text = url[header.end() :]
    if len(text) * 3 // 4 > most + 2:
        raise MediaError(f"holds more than the limit of {most:,} bytes")
    frames = (header["type"] or "").lower() == "video/jpeg"
    try:
        pieces = tuple(base64.b64decode(piece, validate=True) for piece in (text.split(",") if frames else [text]))
    except (binascii.Error, ValueError) as error:
        raise MediaError("the data URL is not valid base64") from error
    if not all(pieces):
        raise MediaError("the data URL is empty")
    return Media(pieces, frames)


def read_allowed_file(url: str, allowed: Path | None, most: int) -> Media:
    """Read the file of a ``file://`` URL, which must lie below a folder when all links are resolved.

    allowed: the folder; None: no file may be read. most: limit on the file's bytes. The same error stands for a file
    that is missing and one outside of the folder, so that a client learns nothing about other files. Raises MediaError.
    """
    if allowed is None:
        raise MediaError("file URLs are not allowed by this server (option --allowed-media-path of bt-adapter serve)")
    try:
        parts = urlsplit(url)
        path = Path(unquote(parts.path, errors="strict"))
    except ValueError as error:
        raise MediaError("the file URL is not valid") from error
    if parts.netloc not in ("", "localhost") or not path.is_absolute() or parts.query or parts.fragment:
        raise MediaError("a file URL must be file:///PATH without host, query and fragment")
    try:
        handle = _open_below(path, allowed)
    except (OSError, ValueError, RuntimeError) as error:  # missing, not allowed to read, or a loop of links
        raise MediaError("there is no such file below the allowed folder") from error
    with os.fdopen(handle, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise MediaError(f"the file is larger than the limit of {most:,} bytes")
    if not content:
        raise MediaError("the file is empty")
    return Media((content,))


def _open_below(path: Path, folder: Path) -> int:
    """Open a regular file below a folder; return its descriptor. Raises OSError, ValueError, RuntimeError."""
    root = folder.resolve(strict=True)
    path = path.resolve(strict=True)
    if not path.is_relative_to(root):
        raise ValueError("it lies outside")
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not block
    # a link may have taken a folder's place meanwhile
    opened = Path(os.readlink(f"/proc/self/fd/{handle}"))
    if not opened.is_relative_to(root) or not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is no regular file within")
    return handle

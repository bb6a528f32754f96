"""A clip and what is said of it: the one form in which every data set reaches training and evaluation."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from .video import Video, VideoError, read_video


class _Named(io.BytesIO):
    name: str


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an uncompressed tar: ``size`` bytes from ``offset`` on."""

    path: str
    offset: int
    size: int
    name: str

    def open(self) -> BinaryIO:
        """Its bytes as a file with a name. Raises as :meth:`read`."""
        file = _Named(self.read())
        file.name = f"{self.path}/{self.name}"
        return file

    def read(self) -> bytes:
        """Its bytes. Raises OSError, and VideoError where the tar ends before them."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise VideoError(f"{self.path}: ends inside {self.name}, after {len(content)} of its {self.size} bytes")
        return content


@dataclass(frozen=True, slots=True)
class Clip:
    """A video, or a part of one, with its captions.

    Attributes:
        key: its name, unique within its data set; what reports call it.
        source: a video file, or a video inside a shard.
        captions: of a training clip the alternatives of which one is drawn; of a test clip all that are right.
        start, end: the part of the video it is, in seconds; None: to that side all.
        label: number of its class, where the data set has classes; the class's name is then its caption.
    """

    key: str
    source: str | Member
    captions: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None
    label: int | None = None

    def read(self, frames: int | None, **options: Any) -> Video:
        """Its frames; arguments and errors as for :func:`read_video`."""
        source = self.source.open() if isinstance(self.source, Member) else self.source
        return read_video(source, frames, start=self.start, end=self.end, **options)


def digest(clips: Sequence[Clip]) -> str:
    """What tells these clips, in this order, from others; not where their files lie."""
    state = hashlib.blake2b(digest_size=8)
    for clip in clips:
        state.update(repr((clip.key, clip.captions, clip.start, clip.end)).encode())
    return state.hexdigest()

"""Defines a clip with its captions, the form in which every data set reaches training and evaluation."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from bt_adapter import files
from bt_adapter.data.video import Video, VideoError, read_video

# A member of a shard up to this size in bytes is read whole: a single request on network storage.
_AT_ONCE = 64 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an uncompressed tar: ``size`` bytes starting at ``offset``."""

    path: str
    offset: int
    size: int
    name: str

    def open(self) -> BinaryIO:
        """Open the member as a named binary file; a large one is read on demand. Raises as :meth:`read`."""
        window = _Window(self)
        if self.size > _AT_ONCE:
            return cast(BinaryIO, window)
        with window:
            file = _Named(window.readall())
        file.name = window.name
        return file

    def read(self) -> bytes:
        """Return the member's bytes. Raises OSError, and VideoError if the tar ends inside the member."""
        with self.open() as file:
            return file.read()


class _Named(io.BytesIO):
    name: str


class _Window(io.RawIOBase):
    """A read-only file view of a tar member. Raises OSError, and VideoError if the tar ends inside the member."""

    def __init__(self, member: Member) -> None:
        self.name, self._member, self._place = f"{member.path}/{member.name}", member, 0
        self._tar = open(member.path, "rb", buffering=0)
        there = max(0, os.fstat(self._tar.fileno()).st_size - member.offset)
        if there < member.size:
            self.close()
            raise VideoError(f"{member.path}: ends inside {member.name}, after {there} of its {member.size} bytes")

    def close(self) -> None:
        self._tar.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._member.size}[whence]
        self._place = max(0, begin + place)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._member.size - self._place))
        self._tar.seek(self._member.offset + self._place)
        read = self._tar.readinto(memoryview(buffer)[:count])
        self._place += read
        return read


@dataclass(frozen=True, slots=True)
class Clip:
    """A video, or a part of one, with its captions.

    Attributes:
        key: name of the clip, unique within its data set and used in reports.
        source: path of a video file, or a video inside a shard.
        captions: for training, alternatives of which one is drawn; for evaluation, all correct captions.
        start, end: range of the video in seconds; None: from the beginning, to the end.
        label: class number, if the data set has classes; the caption is then the class name.
    """

    key: str
    source: str | Member
    captions: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None
    label: int | None = None

    @property
    def path(self) -> str:
        """Path of the file on disk that holds the clip."""
        return self.source.path if isinstance(self.source, Member) else self.source

    def read(self, frames: int | None, **options: Any) -> Video:
        """Read the clip's frames; arguments and errors as for :func:`read_video`."""
        with self.source.open() if isinstance(self.source, Member) else nullcontext(self.source) as source:
            return read_video(source, frames, start=self.start, end=self.end, **options)


def digest(clips: Sequence[Clip]) -> str:
    """Return a hash of the clips' keys, captions and ranges in this order; file locations do not count."""
    return files.digest((repr((clip.key, clip.captions, clip.start, clip.end)).encode() for clip in clips), 16)

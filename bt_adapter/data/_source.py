"""Video files, or their bytes, as sources that can be opened any number of times."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import av
from av.error import FFmpegError
from av.stream import Disposition

# Containers FFmpeg may take a file for. Without the list it also "plays" text files, and follows playlists to
# others.
_CONTAINERS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,flv,asf,ogg,gif,apng,mxf,nut,dv,rm,"
    "yuv4mpegpipe,wav,w64,mp3,aac,flac,aiff"
)
# Twice the pixels of 8K. A decoder takes room for several frames, so a small file could ask for any amount of memory.
MAX_PIXELS = 1 << 26
MAX_PIXELS_VARIABLE = "BT_ADAPTER_MAX_PIXELS"
# Each thread of a decoder that works on whole frames holds one; of larger ones, threads share a frame's slices.
_FRAME_THREAD_PIXELS = 1 << 24
_FILE_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

PathLike = str | os.PathLike | bytes | BinaryIO


class VideoError(ValueError):
    """A video cannot be read or written as asked; the message names the file and what is wrong."""


def reason(error: BaseException) -> str:
    """The system's or FFmpeg's own words for an error."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@dataclass(frozen=True)
class Source:
    """A video file, or its bytes, that can be opened any number of times.

    Attributes:
        name: the file's name, for messages.
        target: an absolute path, the bytes, or a file that can be sought in.
        threads: of the decoder; 0: one a core.
        max_pixels: frames with more pixels (width times height) are refused.
        frame_threads: threads may work on a frame each. Without, a damaged file gives all frames that can be decoded:
            PyAV does not hand out those that a decoder of several frames still holds when it reports an error.
    """

    name: str
    target: str | bytes | BinaryIO
    threads: int = 0
    max_pixels: int = MAX_PIXELS
    frame_threads: bool = True

    @classmethod
    def of(cls, path: PathLike, threads: int = 0, max_pixels: int | None = None) -> Source:
        """Check what can be checked without opening a file. Raises TypeError, ValueError, VideoError.

        ``max_pixels`` None stands for the environment variable BT_ADAPTER_MAX_PIXELS, or 2**26 where it is not set.
        """
        if max_pixels is None:
            max_pixels = _max_pixels_of_environment()
        if isinstance(path, bytes | bytearray | memoryview):
            if len(path) == 0:
                raise VideoError("<bytes>: the file is empty (0 bytes)")
            return cls("<bytes>", bytes(path), threads, max_pixels)
        if isinstance(path, str | os.PathLike):
            name = os.fsdecode(path)
            _check_regular(name)
            # absolute: a name such as "a:b.mp4" is no protocol
            return cls(name, os.path.abspath(name), threads, max_pixels)
        if not callable(getattr(path, "read", None)):
            raise TypeError(f"path must be a file name, bytes or a binary file object, got {type(path).__name__}")
        name = str(getattr(path, "name", "<file>"))
        if isinstance(path, io.TextIOBase):
            raise TypeError(f"path must be opened in binary mode, got {type(path).__name__} ({name})")
        if callable(getattr(path, "seekable", None)) and path.seekable() and path.tell() == 0:
            return cls(name, path, threads, max_pixels)
        # containers count offsets from their own first byte
        return cls(name, path.read(), threads, max_pixels)

    @contextmanager
    def open(self, **options: str) -> Iterator[av.container.InputContainer]:
        """Open a fresh container, with options of FFmpeg's demuxers.

        What PyAV cannot make of the file within the context is a VideoError too, and so are too little memory and
        storage that fails: by itself, FFmpeg takes a file for one that ends where it cannot be read.
        """
        options = {"format_whitelist": _CONTAINERS, **options}
        with ExitStack() as stack:
            try:
                file = stack.enter_context(self.raw())
                # tags of old files are in the code page of who wrote them
                container = av.open(file, "r", options=options, metadata_errors="replace")
            except (FFmpegError, OSError, ValueError) as error:
                raise VideoError(f"{self.name}: cannot be read as a video file ({reason(error)})") from error
            except MemoryError as error:
                raise VideoError(f"{self.name}: there is too little memory to open it") from error
            try:
                with container:
                    try:
                        yield container
                    finally:
                        _settle(container)
            except VideoError:
                raise
            except (FFmpegError, ValueError) as error:
                raise VideoError(f"{self.name}: cannot be decoded ({reason(error)})") from error
            except OSError as error:
                raise VideoError(f"{self.name}: cannot be read ({reason(error)})") from error
            except MemoryError as error:
                raise VideoError(f"{self.name}: there is too little memory to decode it ({reason(error)})") from error

    @contextmanager
    def raw(self) -> Iterator[BinaryIO]:
        """The file's bytes, from the first one on."""
        if isinstance(self.target, str):
            with open(self.target, "rb", buffering=0) as file:  # FFmpeg has a buffer of its own
                yield file
        elif isinstance(self.target, bytes):
            yield io.BytesIO(self.target)
        else:
            self.target.seek(0)
            yield self.target

    def candidates(self, container: av.container.InputContainer) -> list[av.VideoStream]:
        """The streams that may be the video: neither marked as cover pictures nor of an unknown codec.

        Raises VideoError where there are none.
        """
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            kinds = {s.type for s in container.streams}
            names = {"audio": "sound", "video": "a cover picture", "subtitle": "subtitles", "data": "data"}
            found = [name for kind, name in names.items() if kind in kinds] or ["nothing that is known"]
            raise VideoError(f"{self.name}: holds no video, only {' and '.join(found)}")
        streams = [s for s in streams if s.codec_context is not None]
        if not streams:
            raise VideoError(f"{self.name}: no decoder for its video stream")
        return streams

    def check_size(self, height: int, width: int) -> None:
        """Raise VideoError for frames of more than ``max_pixels`` pixels."""
        if height * width > self.max_pixels:
            raise VideoError(
                f"{self.name}: its frames of {width} x {height} pixels are larger than the {self.max_pixels:,} pixels "
                f"that are read; to read it, set the environment variable {MAX_PIXELS_VARIABLE} (or max_pixels) to more"
            )

    def stream(self, container: av.container.InputContainer, number: int) -> av.VideoStream:
        """The container's stream ``number``, its decoder set up. Raises VideoError where its frames are too large."""
        stream = container.streams[number]
        assert isinstance(stream, av.VideoStream)
        decoder = stream.codec_context
        if not decoder.is_open:
            self.check_size(decoder.height, decoder.width)
            large = decoder.height * decoder.width > _FRAME_THREAD_PIXELS
            decoder.thread_type = "SLICE" if large or not self.frame_threads else "AUTO"
            decoder.thread_count = self.threads
            decoder.options = {"max_pixels": str(self.max_pixels)}  # also where the size changes on the way
        return stream


def _settle(container: av.container.InputContainer) -> None:
    """Let the threads of open decoders come to rest, before PyAV frees the decoders.

    PyAV frees them while it holds Python's interpreter lock. Where a program has set PyAV's log level, a thread that
    still works and has something to log waits for that lock, and both wait for ever. Flushing waits without the lock.
    """
    for stream in container.streams:
        if stream.type == "video" and stream.codec_context is not None and stream.codec_context.is_open:
            stream.codec_context.flush_buffers()


def _check_regular(name: str) -> None:
    """Raise VideoError unless there is a regular file of that name that is not empty; nothing is opened."""
    try:
        state = os.stat(name)
    except FileNotFoundError as error:
        raise VideoError(f"{name}: no such file") from error
    except (OSError, ValueError) as error:  # a loop of links, a folder without permission, a null character
        raise VideoError(f"{name}: cannot be read ({reason(error)})") from error
    if not stat.S_ISREG(state.st_mode):
        kind = _FILE_KINDS.get(stat.S_IFMT(state.st_mode), "something else")
        raise VideoError(f"{name}: is {kind}, not a regular file")
    if state.st_size == 0:
        raise VideoError(f"{name}: the file is empty (0 bytes)")


def _max_pixels_of_environment() -> int:
    text = os.environ.get(MAX_PIXELS_VARIABLE, "")
    if not text:
        return MAX_PIXELS
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 31:
        raise ValueError(f"the environment variable {MAX_PIXELS_VARIABLE} must be a number of pixels, got {text!r}")
    return int(text)

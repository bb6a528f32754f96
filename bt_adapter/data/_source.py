"""Opens video files, or their bytes, any number of times."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import av
from av.error import FFmpegError
from av.stream import Disposition

# Containers that FFmpeg may detect. Without this list it also decodes text files and opens files that playlists
# name.
_CONTAINERS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,flv,asf,ogg,gif,apng,mxf,nut,dv,rm,"
    "yuv4mpegpipe,wav,w64,mp3,aac,flac,aiff"
)
# Twice the pixels of 8K. A decoder allocates several frames, so a small file could request any amount of memory.
MAX_PIXELS = 1 << 26
MAX_PIXELS_VARIABLE = "BT_ADAPTER_MAX_PIXELS"
# With frame threading each thread holds a frame; for frames larger than this, threads share one frame's slices.
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
    """A video cannot be read or written; the message names the file and the cause."""


def reason(error: BaseException) -> str:
    """Return the message of the system or of FFmpeg for an error."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@dataclass(frozen=True)
class Source:
    """A video file, or its bytes, that can be opened any number of times.

    Attributes:
        name: the file's name, for messages.
        target: an absolute path, the bytes, or a seekable file object.
        threads: number of decoder threads; 0: one per core.
        max_pixels: frames with more pixels (width times height) raise VideoError.
        frame_threads: allow one frame per thread. False recovers all decodable frames of a damaged file: PyAV drops
            the frames that a frame-threaded decoder still holds when it reports an error.
        check: called before each packet is read or decoded; what it raises ends the reading.
    """

    name: str
    target: str | bytes | BinaryIO
    threads: int = 0
    max_pixels: int = MAX_PIXELS
    frame_threads: bool = True
    check: Callable[[], object] = lambda: None

    @classmethod
    def of(
        cls,
        path: PathLike,
        threads: int = 0,
        max_pixels: int | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> Source:
        """Make a source after the checks that need no open file. Raises TypeError, ValueError, VideoError.

        ``max_pixels`` None: the environment variable BT_ADAPTER_MAX_PIXELS, or 2**26 if it is not set.
        """
        if max_pixels is None:
            max_pixels = _max_pixels_of_environment()
        if isinstance(path, bytes | bytearray | memoryview):
            if len(path) == 0:
                raise VideoError("<bytes>: the file is empty (0 bytes)")
            return cls("<bytes>", bytes(path), threads, max_pixels, check=check)
        if isinstance(path, str | os.PathLike):
            name = os.fsdecode(path)
            _check_regular(name)
            # absolute, so that FFmpeg takes no name such as "a:b.mp4" for a protocol
            return cls(name, os.path.abspath(name), threads, max_pixels, check=check)
        if not callable(getattr(path, "read", None)):
            raise TypeError(f"path must be a file name, bytes or a binary file object, got {type(path).__name__}")
        name = str(getattr(path, "name", "<file>"))
        if isinstance(path, io.TextIOBase):
            raise TypeError(f"path must be opened in binary mode, got {type(path).__name__} ({name})")
        if callable(getattr(path, "seekable", None)) and path.seekable() and path.tell() == 0:
            return cls(name, path, threads, max_pixels, check=check)
        # containers count offsets from their own first byte
        return cls(name, path.read(), threads, max_pixels, check=check)

    @contextmanager
    def open(self, **options: str) -> Iterator[av.container.InputContainer]:
        """Open a new container with options of FFmpeg's demuxers.

        Errors of PyAV inside the context are raised as VideoError, and so are a lack of memory and failing storage:
        FFmpeg alone takes a read error for the end of the file.
        """
        # PyAV also gives them to the decoders that FFmpeg opens by itself to learn about the streams, which would
        # allocate memory for a first frame of any size. (FLV lists its streams too late for that.)
        options = {"format_whitelist": _CONTAINERS, "max_pixels": str(self.max_pixels), **options}
        with ExitStack() as stack:
            try:
                file = stack.enter_context(self.raw())
                # old files store tags in any code page
                container = av.open(file, "r", options=options, metadata_errors="replace")
            except (FFmpegError, OSError, ValueError) as error:
                raise VideoError(f"{self.name}: cannot be read as a video file ({reason(error)})") from error
            except MemoryError as error:
                raise VideoError(f"{self.name}: not enough memory to open it") from error
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
                raise VideoError(f"{self.name}: not enough memory to decode it ({reason(error)})") from error

    @contextmanager
    def raw(self) -> Iterator[BinaryIO]:
        """Open the file's bytes, positioned at the first one."""
        if isinstance(self.target, str):
            with open(self.target, "rb", buffering=0) as file:  # FFmpeg buffers by itself
                yield file
        elif isinstance(self.target, bytes):
            yield io.BytesIO(self.target)
        else:
            self.target.seek(0)
            yield self.target

    def candidates(self, container: av.container.InputContainer) -> list[av.VideoStream]:
        """Return the video streams that are neither cover pictures nor of an unknown codec.

        Raises VideoError if there are none.
        """
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            kinds = {s.type for s in container.streams}
            names = {"audio": "sound", "video": "a cover picture", "subtitle": "subtitles", "data": "data"}
            found = [name for kind, name in names.items() if kind in kinds] or ["streams of unknown kinds"]
            raise VideoError(f"{self.name}: holds no video, only {' and '.join(found)}")
        streams = [s for s in streams if s.codec_context is not None]
        if not streams:
            raise VideoError(f"{self.name}: no decoder for its video stream")
        return streams

    def check_size(self, height: int, width: int) -> None:
        """Raise VideoError if frames have more than ``max_pixels`` pixels."""
        if height * width > self.max_pixels:
            raise VideoError(
                f"{self.name}: its frames of {width} x {height} pixels are larger than the limit of "
                f"{self.max_pixels:,}; to read it, raise max_pixels or the environment variable {MAX_PIXELS_VARIABLE}"
            )

    def stream(self, container: av.container.InputContainer, number: int) -> av.VideoStream:
        """Return stream ``number`` with its decoder set up. Raises VideoError if its frames are too large."""
        stream = container.streams[number]
        assert isinstance(stream, av.VideoStream)
        decoder = stream.codec_context
        if not decoder.is_open:
            self.check_size(decoder.height, decoder.width)
            large = decoder.height * decoder.width > _FRAME_THREAD_PIXELS
            decoder.thread_type = "SLICE" if large or not self.frame_threads else "AUTO"
            decoder.thread_count = self.threads
            decoder.options = {"max_pixels": str(self.max_pixels)}  # also if the size changes within the stream
        return stream


def _settle(container: av.container.InputContainer) -> None:
    """Wait until the threads of open decoders are idle, before PyAV frees the decoders.

    PyAV frees them while it holds the GIL. If a program has set PyAV's log level, a decoder thread that logs a message
    waits for the GIL too: a deadlock. Flushing waits for the threads without holding the GIL.
    """
    for stream in container.streams:
        if stream.type == "video" and stream.codec_context is not None and stream.codec_context.is_open:
            stream.codec_context.flush_buffers()


def _check_regular(name: str) -> None:
    """Raise VideoError unless the name is a regular file that is not empty; do not open it."""
    try:
        state = os.stat(name)
    except FileNotFoundError as error:
        raise VideoError(f"{name}: no such file") from error
    except (OSError, ValueError) as error:  # a loop of links, a folder without permission, a null character
        raise VideoError(f"{name}: cannot be read ({reason(error)})") from error
    if not stat.S_ISREG(state.st_mode):
        kind = _FILE_KINDS.get(stat.S_IFMT(state.st_mode), "of another kind")
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

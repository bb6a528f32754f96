"""Passes over a video file: what is in it, and the frames wanted, decoded in sequence or by seeking."""

from __future__ import annotations

import bisect
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition

from bt_adapter.progress import Progress

from .orientation import read_orientation

# Containers FFmpeg may take a file for. Without the list it also "plays" text files, and follows playlists to
# others.
_CONTAINERS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,flv,asf,ogg,gif,mxf,nut,dv,rm,"
    "yuv4mpegpipe,wav,w64,mp3,aac,flac,aiff"
)
# Where one packet is one shown frame with its own time, so that frames can be counted and found without
# decoding.
_INDEXED_CONTAINERS = ("mov", "matroska")
_INDEXED_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d")
# A seek empties the decoder's pipeline, which costs about as much as decoding this many frames.
_SEEK_COST = 16

PathLike = str | os.PathLike | bytes | BinaryIO
Span = tuple[float, float]  # seconds from the start of the file, half-open


class VideoError(ValueError):
    """A video cannot be read or written as asked; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Source:
    """A video file, or its bytes, that can be opened any number of times."""

    name: str
    target: str | bytes | BinaryIO
    threads: int = 0  # of the decoder; 0: one a core

    @classmethod
    def of(cls, path: PathLike) -> Source:
        """Check what can be checked without decoding. Raises TypeError, VideoError."""
        if isinstance(path, bytes | bytearray | memoryview):
            if len(path) == 0:
                raise VideoError("<bytes>: the file is empty (0 bytes)")
            return cls("<bytes>", bytes(path))
        if isinstance(path, str | os.PathLike):
            name = os.fsdecode(path)
            if os.path.isdir(name):
                raise VideoError(f"{name}: is a directory, not a video file")
            if not os.path.exists(name):
                raise VideoError(f"{name}: no such file")
            if os.path.isfile(name) and os.path.getsize(name) == 0:
                raise VideoError(f"{name}: the file is empty (0 bytes)")
            return cls(name, os.path.abspath(name))  # absolute: a name such as "a:b.mp4" is no protocol
        if not callable(getattr(path, "read", None)):
            raise TypeError(f"path must be a file name, bytes or a binary file object, got {type(path).__name__}")
        name = str(getattr(path, "name", "<file>"))
        if isinstance(path, io.TextIOBase):
            raise TypeError(f"path must be opened in binary mode, got {type(path).__name__} ({name})")
        if callable(getattr(path, "seekable", None)) and path.seekable() and path.tell() == 0:
            return cls(name, path)
        return cls(name, path.read())  # containers count offsets from their own first byte

    @contextmanager
    def open(self) -> Iterator[av.container.InputContainer]:
        """A fresh container; what PyAV cannot make of the file within the context is a VideoError too."""
        target = self.target
        if isinstance(target, bytes):
            target = io.BytesIO(target)
        elif not isinstance(target, str):
            target.seek(0)
        try:
            # tags of old files are in the code page of who wrote them
            container = av.open(target, "r", options={"format_whitelist": _CONTAINERS}, metadata_errors="replace")
        except (FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{self.name}: cannot be read as a video file ({reason(error)})") from error
        try:
            with container:
                yield container
        except VideoError:
            raise
        except (FFmpegError, ValueError) as error:
            raise VideoError(f"{self.name}: cannot be decoded ({reason(error)})") from error

    def stream(self, container: av.container.InputContainer) -> av.VideoStream:
        """The first video stream that is no cover picture. Raises VideoError."""
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise VideoError(f"{self.name}: holds no video, only {kinds}")
        if streams[0].codec_context is None:
            raise VideoError(f"{self.name}: no decoder for its video stream")
        if not streams[0].codec_context.is_open:
            streams[0].thread_type = "AUTO"
            streams[0].codec_context.thread_count = self.threads
        return streams[0]


@dataclass(frozen=True)
class Index:
    """What the packets of a video tell without decoding."""

    origin: Fraction  # start of the file in seconds: timestamps count from here
    time_base: Fraction
    fps: float
    duration: float
    packets: int
    times: list[int]  # presentation times of the packets, ascending, in units of time_base
    place: dict[int, int]  # presentation time -> place among the packets, from 1
    keys: list[int]  # presentation times of the key frames, ascending
    exact: bool  # one packet is one frame with its own time: frames can be counted and sought
    truncated: bool

    def seconds(self, pts: int) -> float:
        """Seconds from the start of the file."""
        return float(pts * self.time_base - self.origin)

    def count(self, span: Span) -> int:
        """Frames within `span`; an estimate unless `exact`."""
        if len(self.times) < self.packets:
            return self.packets
        return self.before(span[1]) - self.before(span[0])

    def before(self, seconds: float) -> int:
        """Frames shown before a time."""
        return bisect.bisect_left(self.times, seconds, key=self.seconds)


@dataclass
class Taken:
    """Frames kept from one pass over a video."""

    capacity: int
    pixels: np.ndarray | None = None  # uint8 [capacity, H, W, 3]
    seconds: list[float] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # place among all frames of the file
    count: int = 0  # frames seen within the span
    damaged: bool = False

    def keep(self, frame: av.VideoFrame, seconds: float, number: int) -> None:
        """Store a frame as RGB, upright, in the size of the first one (a stream may change its size)."""
        orientation = read_orientation(frame)
        if self.pixels is None:
            size = (frame.width, frame.height) if orientation.transposed else (frame.height, frame.width)
            self.pixels = np.empty((self.capacity, *size, 3), np.uint8)
        height, width = self.pixels.shape[2:0:-1] if orientation.transposed else self.pixels.shape[1:3]
        rgb = frame.to_ndarray(format="rgb24", height=height, width=width)
        self.pixels[len(self.numbers)] = orientation.apply(rgb)
        self.seconds.append(seconds)
        self.numbers.append(number)


def scan(source: Source) -> Index:
    """Read all packets without decoding any. Raises VideoError."""
    times, ends, place, keys, packets, discarded = [], [], {}, [], 0, 0
    clean, broken = True, False
    with source.open() as container:
        stream = source.stream(container)
        try:
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                broken |= packet.is_corrupt
                if packet.is_discard:  # cut off by an edit list: decoded, never shown
                    discarded, clean = discarded + 1, False
                    continue
                packets += 1
                # AVI keeps no times of presentation; what FFmpeg gives there is wrong with B-frames.
                if packet.pts is None or container.format.name == "avi":
                    clean = False
                    continue
                clean &= packet.pts not in place
                place[packet.pts] = packets
                times.append(packet.pts)
                ends.append(packet.pts + (packet.duration or 0))
                if packet.is_keyframe:
                    keys.append(packet.pts)
        except FFmpegError:
            broken = True
        times.sort()
        end = max(ends, default=0)
        base = stream.time_base or Fraction(1, av.time_base)
        origin = Fraction(container.start_time or 0, av.time_base)
        if times and abs(times[0] * base - origin) <= Fraction(1, av.time_base):
            origin = times[0] * base  # the container rounds to microseconds
        duration = float((end - times[0]) * base) if times else 0.0
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate else (packets / duration if duration else 1.0)
        indexed = container.format.name.startswith(_INDEXED_CONTAINERS)
        # Matroska states a stream's end, MP4 its number of frames, of the whole file as it was written
        stated_end = _clock_seconds(stream.metadata.get("DURATION", ""))
        missing = packets + discarded < stream.frames or float(end * base) < stated_end - 1.5 / fps
    return Index(
        origin=origin,
        time_base=base,
        fps=fps,
        duration=duration if duration > 0 else packets / fps,
        packets=packets,
        times=times,
        place=place,
        keys=sorted(keys),
        exact=indexed and stream.codec.name in _INDEXED_CODECS and clean and not broken and bool(keys),
        truncated=broken or missing,
    )


def take_in_sequence(
    source: Source, index: Index, span: Span, wanted: list[int], total: int, progress: Progress | None
) -> Taken:
    """Decode from the first frame to the end of `span`, keeping the frames `wanted` (numbers in the span)."""
    taken, wanted_set = Taken(len(wanted)), set(wanted)
    with source.open() as container:
        for number, frame in enumerate(_decode(source, container, taken)):
            if index.times and frame.pts is not None:
                seconds = index.seconds(frame.pts)
            else:
                seconds = number / index.fps
            if seconds >= span[1]:
                break
            if seconds < span[0]:
                continue
            if taken.count in wanted_set:
                taken.keep(frame, seconds, number)
            taken.count += 1
            taken.damaged |= frame.is_corrupt
            if progress is not None:
                progress(min(taken.count, total), total)
    return taken


def take_by_seeking(
    source: Source,
    index: Index,
    span: Span,
    wanted: list[int],
    total: int,
    progress: Progress | None,
    force: bool,
) -> Taken | None:
    """Decode only from the key frame before each frame wanted (ascending); `index` must be exact.

    None where that does not at least halve the work (unless `force`: decoding in sequence also finds damage),
    and where the file turns out otherwise than its index says.
    """
    before = index.before(span[0])
    steps, cost, position = [], 0, 0
    for number in wanted:
        pts = index.times[before + number]
        at = bisect.bisect_right(index.keys, pts)
        if at == 0:
            return None
        place, key = index.place[pts], index.place[index.keys[at - 1]]
        going_on, jumping = max(0, place - position), place - key + 1 + _SEEK_COST
        jump = jumping < going_on or (force and key > position)
        cost += jumping if jump else going_on
        position = max(place, 0 if jump else position)
        steps.append((pts, before + number, jump))
    if not force and 2 * cost > before + total:
        return None

    taken = Taken(len(wanted), count=total)
    with source.open() as container:
        stream = source.stream(container)
        decoded = _decode(source, container, taken)
        for done, (pts, number, jump) in enumerate(steps, 1):
            if jump:
                container.seek(pts, stream=stream)
                decoded = _decode(source, container, taken, until=pts)
            frame = next((f for f in decoded if f.pts is None or f.pts >= pts), None)
            if frame is None or frame.pts != pts or frame.is_corrupt or taken.damaged:
                return None
            taken.keep(frame, index.seconds(pts), number)
            if progress is not None:
                progress(done, len(steps))
    return taken


def reason(error: BaseException) -> str:
    """The system's or FFmpeg's own words for an error."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _decode(
    source: Source, container: av.container.InputContainer, taken: Taken, until: int | None = None
) -> Iterator[av.VideoFrame]:
    """All frames from here on that can be decoded, in order of presentation; damage is noted in `taken`.

    After a seek, `until` is the time sought: if the file does not go on with a key frame at or before it, the
    seek went wrong, and nothing comes.
    """
    stream = source.stream(container)
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            if until is not None and packet.size:
                if not packet.is_keyframe or packet.pts is None or packet.pts > until:
                    return
                until = None
        except FFmpegError:  # the file breaks off here; the decoder still holds good frames
            taken.damaged, packet, packets = True, None, iter(())
        try:
            decoded = packet.decode() if packet is not None else stream.decode(None)
        except FFmpegError:
            taken.damaged = True
            continue
        yield from decoded


def _clock_seconds(text: str) -> float:
    """Matroska's "00:01:02.500000000" in seconds; 0 if it is not of that form."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", text)
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0

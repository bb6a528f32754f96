"""Frames of a live source, the newest ones, through outages, stalls and clock jumps."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import av
import torch
from torch import Tensor

from bt_adapter.data._decode import Taken
from bt_adapter.data._source import VideoError
from bt_adapter.data.orientation import OrientationReader
from bt_adapter.data.sampling import check_count, check_positive
from bt_adapter.live.clock import StreamClock, interval_of
from bt_adapter.live.connection import Connection

# Seconds between attempts to reconnect: each pause is twice the one before.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
# Seconds beyond its limits after which the thread that reads counts as hanging in the system.
_GRACE = 5.0


@dataclass(frozen=True)
class LiveFrame:
    """A frame: pixels uint8 ``[3, H, W]``, RGB, upright; time: seconds since the stream's first frame."""

    pixels: Tensor
    time: float


@dataclass(frozen=True)
class LiveCounts:
    """Counts of a source so far.

    decoded: frames. thinned: frames left out by ``fps``. dropped: frames that were replaced by newer ones before the
    program took them. damaged: packets that could not be decoded. lost: times that the source was lost (ended,
    silent, refused); each is followed by a reconnection. jumps: of its time stamps.
    """

    decoded: int = 0
    thinned: int = 0
    dropped: int = 0
    damaged: int = 0
    lost: int = 0
    jumps: int = 0


class LiveSource:
    """A live source of frames: a network stream, a device, or a file at its own pace. Iterate over it once.

    A thread reads and decodes. If the program takes frames more slowly than they come, the oldest are dropped and
    counted. A source that ends, is silent, or refuses the connection is opened again, after pauses of 0.25 to 10
    seconds, until ``give_up`` seconds have passed without a frame. Files end, and so do recordings with a known
    duration.

    Args:
        source: a URL (http and https with MPEG-TS, multipart JPEG, HLS and other formats; rtsp, udp, rtp, tcp, rtmp,
            srt as far as the installed FFmpeg has them), a file, or the name of a device together with ``format``.
        fps: most frames per second, at regular times; others are not converted to pixels. None: all.
        format: FFmpeg's name of the device ("v4l2", "avfoundation", "dshow") or of the stream's format. None: detected.
        options: options of FFmpeg, such as ``{"video_size": "640x480"}``.
        open_timeout, read_timeout: most seconds to connect, and between frames; then the source counts as lost.
        give_up: most seconds of an outage; None: no limit. An error when it is opened for the first time is raised at
            once.
        pace: True: frames are released at the times of their time stamps. False: as they come; a file is then read as
            fast as the program takes its frames, and none is dropped. None: True for files and HLS.
        buffer: most frames that wait to be taken.
        max_gap: seconds by which time stamps may leap ahead of the wall clock, or stand still, before it counts as a
            jump.
        side: side in pixels that frames will be resized to: much larger ones are reduced while they are decoded.
        max_pixels: see ``read_video``.

    Attributes:
        name: the source without user name and password. side: as given; may be set before frames are read.

    Raises:
        ValueError, TypeError: an argument is outside its range, or the scheme is not supported.
        VideoError: the file does not exist. While iterating: the source cannot be opened, or was lost for longer than
            ``give_up``.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        fps: float | None = None,
        format: str | None = None,
        options: Mapping[str, str] | None = None,
        open_timeout: float = 10.0,
        read_timeout: float = 10.0,
        give_up: float | None = 60.0,
        pace: bool | None = None,
        buffer: int = 2,
        max_gap: float = 10.0,
        side: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        limits = {"fps": fps, "open_timeout": open_timeout, "read_timeout": read_timeout, "give_up": give_up}
        for name, value in (limits | {"max_gap": max_gap}).items():
            if value is not None or name not in ("fps", "give_up"):
                check_positive(name, value)
        check_count("buffer", buffer)
        for name, count in (("side", side), ("max_pixels", max_pixels)):
            if count is not None:
                check_count(name, count)
        if pace is not None and not isinstance(pace, bool):
            raise TypeError(f"pace must be a bool or None, but is {pace!r}")
        self._connection = Connection(
            os.fsdecode(source), format, options or {}, open_timeout, read_timeout, max_pixels
        )  # fmt: skip
        self.name, self.side = self._connection.name, side
        self._fps, self._give_up, self._size = fps, give_up, buffer
        self._pace = (self._connection.is_file or self._connection.is_playlist) if pace is None else pace
        self._waits = self._connection.is_file and not self._pace  # for the program, so that nothing is dropped
        self._clock, self._orientations = StreamClock(max_gap), OrientationReader()
        self._counts, self._interval = LiveCounts(), -1
        self._begin: float | None = None  # wall clock at stream time 0
        # Shared by both threads, under the condition.
        self._changed = threading.Condition()
        self._frames: deque[LiveFrame] = deque()
        self._error: BaseException | None = None
        self._closing = self._ended = False
        self._alive_until = math.inf
        self._thread: threading.Thread | None = None

    @property
    def counts(self) -> LiveCounts:
        """The counts at this moment."""
        return self._counts

    def __iter__(self) -> Iterator[LiveFrame]:
        """Yield frames until the source ends or :meth:`close` is called. See the class for the errors."""
        if self._thread is not None:
            raise ValueError("a LiveSource can be iterated over only once: make another one")
        self._thread = threading.Thread(target=self._read, name=f"reads {self.name}", daemon=True)
        self._thread.start()
        try:
            while (frame := self._take()) is not None:
                yield frame
        finally:
            self.close()

    def close(self) -> None:
        """End the reading, after the read in progress: at most ``read_timeout`` seconds, or twice ``open_timeout``."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            hangs = time.monotonic() > self._alive_until
        if self._thread is not None and self._thread is not threading.current_thread() and not hangs:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> LiveFrame | None:
        """Wait for a frame; None at the end."""
        with self._changed:
            while not self._frames:
                if self._error is not None:
                    raise self._error
                if self._ended or self._closing:
                    return None
                if time.monotonic() > self._alive_until:
                    raise VideoError(f"{self.name}: the system does not answer, beyond all timeouts")
                self._changed.wait(1.0)
            frame = self._frames.popleft()
            self._changed.notify_all()
            return frame

    def _alive(self, seconds: float) -> None:
        self._alive_until = time.monotonic() + seconds + _GRACE

    def _read(self) -> None:
        """Read until the end, in the thread."""
        try:
            self._reconnect_until_end()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _reconnect_until_end(self) -> None:
        pause, seen, connected = _FIRST_PAUSE, time.monotonic(), False
        while not self._closing:
            try:
                for frame in self._connection.frames(self._alive):
                    if self._closing:
                        return
                    if frame is None:
                        self._counts = replace(self._counts, damaged=self._counts.damaged + 1)
                        continue
                    self._receive(frame)
                    pause, seen, connected = _FIRST_PAUSE, time.monotonic(), True
                return
            except VideoError as error:
                if self._connection.is_file or not connected:
                    raise
                self._counts = replace(self._counts, lost=self._counts.lost + 1)
                outage = time.monotonic() - seen
                if self._give_up is not None and outage + pause > self._give_up:
                    raise VideoError(f"{error}; given up after {outage:.0f} s without a frame") from error
            self._clock.restart()
            self._wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _receive(self, frame: av.VideoFrame) -> None:
        """Time a decoded frame, wait until it is due, and put it into the buffer, unless it is left out."""
        now = time.monotonic()
        stamp = self._clock.advance(frame.time, None if self._waits else now)
        counts = self._counts = replace(self._counts, decoded=self._counts.decoded + 1, jumps=self._clock.jumps)
        if self._begin is None:
            self._begin = now
        if self._pace:
            self._wait(self._begin + stamp - now)
        if self._fps is not None:
            interval = interval_of(stamp, self._fps)
            if interval <= self._interval:
                self._counts = replace(counts, thinned=counts.thinned + 1)
                return
            self._interval = interval
        taken = Taken(self.name, 1, self.side, orientations=self._orientations)
        taken.keep(frame, 0)
        assert taken.pixels is not None
        self._put(LiveFrame(torch.from_numpy(taken.pixels[0]).permute(2, 0, 1), stamp))

    def _put(self, frame: LiveFrame) -> None:
        with self._changed:
            while self._waits and len(self._frames) >= self._size and not self._closing:
                self._alive_until = math.inf  # the program decides how long this takes
                self._changed.wait()
            if len(self._frames) >= self._size:
                self._frames.popleft()
                self._counts = replace(self._counts, dropped=self._counts.dropped + 1)
            self._frames.append(frame)
            self._changed.notify_all()

    def _wait(self, seconds: float) -> None:
        """Wait unless the source is closed meanwhile."""
        until = time.monotonic() + seconds
        self._alive(max(0.0, seconds))
        with self._changed:
            while not self._closing and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
